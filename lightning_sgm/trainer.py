"""Lightning's Trainer with this framework's run folder, loggers, atomic checkpoints and callbacks already in place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_sgm.callbacks import EMA, Checkpoints, PredictionWriter, Progress, SampleLogger, StepSeeds, Throughput
from lightning_sgm.io.checkpoint import AtomicCheckpointIO


def next_version(folder: Path) -> Path:
    """``folder/version_N`` with the smallest N above all that exist."""
    pattern = re.compile(r"version_(\d+)$")
    numbers = [int(m.group(1)) for p in folder.glob("version_*") if (m := pattern.search(p.name))]
    return folder / f"version_{max(numbers, default=-1) + 1}"


class Trainer(pl.Trainer):
    """``lightning.pytorch.Trainer`` for generative models.

    One folder holds everything of a run: config, TensorBoard events, metrics.csv, checkpoints/, samples/. EMA, step
    seeds, progress, throughput, checkpoints and sample pictures are on; pass an own instance in ``callbacks`` to
    change one, and any keyword of Lightning's Trainer.

    Args:
        run_dir: folder of the run; the next free ``runs/version_N`` by default.
        callbacks: further callbacks, or replacements for the default ones (matched by class).
        logger: loggers; TensorBoard and CSV in the run folder by default, False for none.
        plugins: further plugins; checkpoints are written atomically in any case.
    """

    def __init__(
        self,
        *,
        run_dir: str | None = None,
        callbacks: Callback | list[Callback] | None = None,
        logger: Logger | list[Logger] | bool | None = None,
        plugins: Any = None,
        **kwargs: Any,
    ) -> None:
        folder = Path(run_dir) if run_dir else next_version(Path("runs"))
        given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        if logger is None or logger is True:
            logger = _loggers(folder) if not kwargs.get("fast_dev_run") else False
        more = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
        super().__init__(
            callbacks=_with_defaults(given, kwargs),
            logger=logger,
            plugins=[AtomicCheckpointIO(), *more],
            default_root_dir=str(folder),
            use_distributed_sampler=False,
            enable_model_summary=kwargs.pop("enable_model_summary", None) or False,
            **kwargs,
        )

    def predict(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = False,
        ckpt_path: Any = None,
        weights_only: bool | None = True,
        num_samples: int = 16,
        batch_size: int = 16,
    ) -> Any:
        """Draw samples and write them to ``samples/`` in the run folder.

        Args:
            model: the method.
            dataloaders: batches of sample numbers; made from ``num_samples`` by default.
            datamodule: not needed for sampling, ignored.
            return_predictions: keep the samples in memory too.
            ckpt_path: checkpoint to load first.
            weights_only: kept True; checkpoints never unpickle foreign code.
            num_samples: how many samples; number i depends on the seed and i alone.
            batch_size: samples drawn at once on each process.
        """
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}")
        loader = dataloaders if dataloaders is not None else SampleNumbers(self, num_samples, batch_size)
        return super().predict(
            model,
            dataloaders=loader,
            return_predictions=return_predictions,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
        )


class SampleNumbers:
    """This process's share of the sample numbers 0..count-1 as batches {"index": (n,)}."""

    def __init__(self, trainer: pl.Trainer, count: int, batch_size: int) -> None:
        self.trainer, self.count, self.batch_size = trainer, count, batch_size

    def _mine(self) -> Tensor:
        return torch.arange(self.count)[self.trainer.global_rank :: self.trainer.world_size]

    def __len__(self) -> int:
        return -(-len(self._mine()) // self.batch_size)

    def __iter__(self) -> Any:
        for part in self._mine().split(self.batch_size):
            yield {"index": part}


def _with_defaults(given: list[Callback], kwargs: dict[str, Any]) -> list[Callback]:
    """The callbacks given and each default that none of them replaces."""
    checkpoints = kwargs.get("enable_checkpointing", True) is not False and not kwargs.get("fast_dev_run")
    bar = kwargs.get("enable_progress_bar", True) is not False
    defaults: list[type[Callback]] = [StepSeeds, EMA, Throughput, SampleLogger, PredictionWriter]
    defaults += [Checkpoints] if checkpoints else []
    defaults += [Progress] if bar else []
    missing = [kind() for kind in defaults if not any(isinstance(callback, kind) for callback in given)]
    # EMA first: pictures of an update are drawn with the average that includes it.
    return sorted([*given, *missing], key=lambda callback: not isinstance(callback, EMA))


def _loggers(folder: Path) -> list[Logger]:
    """TensorBoard and CSV in one folder; an earlier metrics.csv is kept, which CSVLogger would delete."""
    _keep_earlier_metrics(folder / "metrics.csv")
    return [
        TensorBoardLogger(str(folder), name="", version="", default_hp_metric=False),
        CSVLogger(str(folder), name="", version=""),
    ]


@rank_zero_only
def _keep_earlier_metrics(path: Path) -> None:
    if path.exists():
        number = len(list(path.parent.glob("metrics.*.csv"))) + 1
        path.rename(path.with_name(f"metrics.{number}.csv"))
