"""Lightning's Trainer with this framework's run folder, loggers, atomic checkpoints and callbacks already in place."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_sgm.callbacks import EMA, Checkpoints, PredictionWriter, Progress, SampleLogger, StepSeeds, Throughput
from lightning_sgm.io.checkpoint import AtomicCheckpointIO
from lightning_sgm.io.files import next_version


class RunCSV(CSVLogger):
    """metrics.csv of a run. Lightning's logger deletes an earlier one; here it is kept as metrics.1.csv, 2, ...

    Only training writes: what ``test`` and ``validate`` find goes to JSON files of their own.

    Attributes:
        trainer: set by the Trainer that logs.
    """

    trainer: pl.Trainer

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), name="", version="")

    @property
    def experiment(self) -> Any:
        """The writer, made when a fit begins; none for other commands."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return None
        if self._experiment is None:
            self._set_earlier_aside(Path(self.log_dir) / "metrics.csv")
        with warnings.catch_warnings():  # that earlier files will be deleted, which is no longer true
            warnings.simplefilter("ignore")
            return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """One row, while training."""
        if self.experiment is not None:
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that wait."""
        if self.experiment is not None:
            super().save()

    @staticmethod
    @rank_zero_only
    def _set_earlier_aside(path: Path) -> None:
        if path.exists():
            numbers = [int(p.name.split(".")[1]) for p in path.parent.glob("metrics.*.csv")]
            path.rename(path.with_name(f"metrics.{max(numbers, default=0) + 1}.csv"))


class Trainer(pl.Trainer):
    """``lightning.pytorch.Trainer`` for generative models.

    One folder holds everything of a run: config, TensorBoard events, metrics.csv, checkpoints/, samples/. EMA, step
    seeds, progress, throughput, checkpoints and sample pictures are on; pass an own instance in ``callbacks`` to
    change one, and any keyword of Lightning's Trainer.

    Args:
        run_dir: folder of the run, in place of Lightning's ``default_root_dir``; the next free ``runs/version_N`` by
            default.
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
        root = kwargs.pop("default_root_dir", None)
        chosen = run_dir or root
        folder = Path(chosen) if chosen else next_version(Path("runs"))
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
        for each in self.loggers:
            if isinstance(each, RunCSV):
                each.trainer = self
        cores = os.cpu_count() or 1
        if isinstance(self.accelerator, CPUAccelerator) and self.num_devices > cores:
            raise ValueError(f"devices is {self.num_devices}, but this machine has {cores} CPU cores and no GPU in use")
        if self.world_size > 1:
            atexit.register(_leave_process_group)

    def predict(
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = False,
        ckpt_path: Any = None,
        weights_only: bool | None = True,
        num_samples: int | None = None,
        batch_size: int = 16,
        path: str | None = None,
    ) -> Any:
        """Draw samples and write them to ``predictions/`` in the run folder, or what is completed to ``restored/``.

        Args:
            model: the method.
            dataloaders: batches of sample numbers; made from ``num_samples`` by default.
            datamodule: not needed for sampling, ignored.
            return_predictions: keep the samples in memory too.
            ckpt_path: checkpoint to load first.
            weights_only: kept True; checkpoints never unpickle foreign code.
            num_samples: how many samples, 16 by default, or one for each text of a file of texts to complete; number i
                depends on the seed and i alone.
            batch_size: samples drawn at once on each process; files are completed one by one.
            path: a picture or a folder of pictures that the model completes (--data.path is the same).
        """
        loader = dataloaders
        if path is not None:
            if num_samples is not None or dataloaders is not None:
                raise ValueError(f"path {path} says what to complete: leave out num_samples and dataloaders")
            if model is None:
                raise ValueError("predict needs the model: give model=")
            loader = Inputs(self, cast(Any, model).inputs(path))
        elif loader is None:
            wanted = int(getattr(model, "samples_wanted", 16)) if num_samples is None else num_samples
            if wanted < 1 or batch_size < 1:
                raise ValueError(f"num_samples and batch_size must be at least 1, got {wanted} and {batch_size}")
            loader = SampleNumbers(self, wanted, batch_size)
        return super().predict(
            model,
            dataloaders=loader,
            return_predictions=return_predictions,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
        )


class SampleNumbers:
    """This process's share of the sample numbers 0..count-1 as batches {"index": (n,)}."""

    label = "sample"

    def __init__(self, trainer: pl.Trainer, count: int, batch_size: int) -> None:
        self.trainer, self.count, self.batch_size = trainer, count, batch_size

    def _mine(self) -> Tensor:
        return torch.arange(self.count)[self.trainer.global_rank :: self.trainer.world_size]

    def __len__(self) -> int:
        return -(-len(self._mine()) // self.batch_size)

    def __iter__(self) -> Any:
        for part in self._mine().split(self.batch_size):
            yield {"index": part}


class Inputs:
    """This process's share of what a model completes, see ``GenerativeModule.inputs``."""

    label = "file"

    def __init__(self, trainer: pl.Trainer, items: Sequence[dict[str, Any]]) -> None:
        self.trainer, self.items, self.count = trainer, items, len(items)

    def _mine(self) -> range:
        return range(self.count)[self.trainer.global_rank :: self.trainer.world_size]

    def __len__(self) -> int:
        return len(self._mine())

    def __iter__(self) -> Any:
        for number in self._mine():
            yield self.items[number]


def _leave_process_group() -> None:
    """Close the connections between processes: gloo's threads abort an interpreter that ends with them running."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _with_defaults(given: list[Callback], kwargs: dict[str, Any]) -> list[Callback]:
    """The callbacks given and each default that none of them replaces."""
    checkpoints = kwargs.get("enable_checkpointing", True) is not False and not kwargs.get("fast_dev_run")
    if not checkpoints:
        given = [callback for callback in given if not isinstance(callback, ModelCheckpoint)]
    bar = kwargs.get("enable_progress_bar", True) is not False
    defaults: list[type[Callback]] = [StepSeeds, EMA, Throughput, SampleLogger, PredictionWriter]
    defaults += [Checkpoints] if checkpoints else []
    defaults += [Progress] if bar else []
    missing = [kind() for kind in defaults if not any(isinstance(callback, kind) for callback in given)]
    # EMA first: pictures of an update are drawn with the average that includes it.
    return sorted([*given, *missing], key=lambda callback: not isinstance(callback, EMA))


def _loggers(folder: Path) -> list[Logger]:
    return [TensorBoardLogger(str(folder), name="", version="", default_hp_metric=False), RunCSV(folder)]
