"""Looking at samples: during training, and as files from ``predict``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import distributed

from lightning_sgm.callbacks.clock import updates
from lightning_sgm.callbacks.ema import EMA
from lightning_sgm.callbacks.throughput import untimed
from lightning_sgm.io.figures import CurveWriter
from lightning_sgm.io.writers import Writer, names_of, writer_for
from lightning_sgm.methods.base import Curve

if TYPE_CHECKING:
    from lightning_sgm.methods.base import GenerativeModule

# Their parameters are spread over the processes: one alone cannot run the network.
_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


class SampleLogger(Callback):
    """Draws a few samples at a cadence during ``fit`` and at its end, with the EMA weights, and shows them.

    They go to TensorBoard as ``samples`` and to ``RUN/samples/UPDATES.png`` or ``.txt``. The same sample numbers,
    hence the same start noise, are drawn every time: successive pictures show one set of samples getting better.
    ``samples/evaluations`` logs how many network evaluations a sample took. The training is not changed by looking.
    The method's other :meth:`~lightning_sgm.methods.base.GenerativeModule.pictures` follow under their own names.

    Nothing is drawn from a method without samples, such as a classifier.

    Only the first process draws while the others wait, unless parameters are sharded: then all draw, one writes.

    Args:
        every: cadence in optimiser updates of the model.
        count: number of samples.
        writer: how they are shown; by default as the data specification says.
    """

    def __init__(self, every: int = 500, count: int = 16, writer: Writer | None = None) -> None:
        if every < 1 or count < 1:
            raise ValueError(f"samples need every >= 1 and count >= 1, got every = {every} and count = {count}")
        self.every = every
        self.count = count
        self.writer = writer
        self._folder = Path()
        self._drawn = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run's folder (every process must ask for it) and start counting where a resumed run is."""
        self._folder = _run_folder(trainer) / "samples"
        self._drawn = updates(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when the number of updates has passed a multiple of ``every``."""
        if updates(trainer, pl_module) // self.every > self._drawn // self.every:
            self._draw(trainer, cast("GenerativeModule", pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw from the finished model, unless that was just done."""
        if updates(trainer, pl_module) > self._drawn:
            self._draw(trainer, cast("GenerativeModule", pl_module))

    def _draw(self, trainer: Trainer, module: GenerativeModule) -> None:
        self._drawn = step = updates(trainer, module)
        if not module.can_sample:
            return
        if not trainer.is_global_zero and not isinstance(trainer.strategy, _SHARDED):
            return
        with untimed(trainer):
            self._draw_now(trainer, module, step)

    def _draw_now(self, trainer: Trainer, module: GenerativeModule, step: int) -> None:
        with _averaged(trainer, module), _evaluating(module), trainer.precision_plugin.predict_step_context():
            batch = module.sample(torch.arange(self.count, device=module.device))
            evaluations = module.sampler_evaluations
            pictures = module.pictures()
        if not trainer.is_global_zero:
            return
        writer = self.writer or writer_for(module.spec)
        for logger in trainer.loggers:
            logger.log_metrics({"samples/evaluations": evaluations}, step=step)
        for name, picture in {"samples": batch, **pictures}.items():
            painter: Any = CurveWriter() if isinstance(picture, Curve) else writer
            for logger in trainer.loggers:
                painter.log(logger, name, picture, step)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                suffix = "" if name == "samples" else f"_{name}"
                painter.save(picture, self._folder / f"{step:08d}{suffix}")


class _Written(NamedTuple):
    """A sample on disk: its name, and the file in which the overview finds it."""

    folder: Path
    name: str
    file: Path


class PredictionWriter(Callback):
    """Writes what ``predict`` samples: a file per sample, with its name or number, and one overview of all of them.

    Every process writes its own samples as they come; at the end the first one joins them into ``samples.png`` or
    ``samples.txt`` and says where they are. Samples in a folder that other nodes cannot see are left out there.

    Args:
        folder: where to write; by default ``predictions`` in the run's folder, or ``restored`` for samples that
            complete something (those with a ``before``), which may have been read from ``predictions``.
        writer: how they are written; by default as the data specification says.
    """

    def __init__(self, folder: str | None = None, writer: Writer | None = None) -> None:
        self.folder = folder
        self.writer = writer
        self._run = Path()
        self._written: dict[int, _Written] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder: every process must ask for it, and one without samples has no start of predict."""
        if stage == "predict":
            self._run = _run_folder(trainer)
            self._written = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear what the writer lacks before hours pass."""
        self._writer(pl_module)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the samples ``outputs["x"]`` under their names or numbers ``outputs["index"]``."""
        default = self._run / ("restored" if "before" in outputs else "predictions")
        folder = default if self.folder is None else Path(self.folder)
        files = self._writer(pl_module).save_each(outputs, folder)
        named = zip(outputs["index"].tolist(), names_of(outputs), files, strict=True)
        self._written |= {number: _Written(folder, name, file) for number, name, file in named}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the samples of all processes, also of those that had none and no end of predict."""
        if stage != "predict":
            return
        written = dict(self._written)
        if trainer.world_size > 1:
            everybody: list[Any] = [None] * trainer.world_size
            # Also waits until every process has written.
            distributed.all_gather_object(everybody, self._written)
            written = {number: one for part in everybody for number, one in part.items() if one.file.exists()}
        if not trainer.is_global_zero or not written:
            return
        samples = [written[number] for number in sorted(written)]
        folder = samples[0].folder
        overview = self._writer(pl_module).collect([one.file for one in samples], folder / "samples")
        print(f"{len(samples)} samples are in {folder}, together in {', '.join(map(str, overview))}")
        names, suffix = {one.name for one in samples}, samples[0].file.suffix
        others = sum(path.stem.isdigit() and path.stem not in names for path in folder.glob(f"*{suffix}"))
        if others > 0:
            print(f"beside them are {others} of earlier predictions")

    def _writer(self, pl_module: LightningModule) -> Writer:
        return self.writer or writer_for(cast("GenerativeModule", pl_module).spec)


def _run_folder(trainer: Trainer) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir)


def _averaged(trainer: Trainer, module: LightningModule) -> AbstractContextManager[None]:
    """The EMA weights, if the trainer keeps any."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            return callback.averaged(module)
    return nullcontext()


@contextmanager
def _evaluating(module: LightningModule) -> Iterator[None]:
    """Eval mode without gradients; every submodule gets its own mode back, also those kept in eval in training."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
