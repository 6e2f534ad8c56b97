"""Where a run is and how long it will take, on a terminal and in a log file."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lightning_sgm.callbacks.clock import updates
from lightning_sgm.callbacks.display import Bar, Display, Lines, Pace


class Progress(ProgressBar):
    """Steps done of the whole run (not of the epoch), loss, steps per second, time left, last validation numbers.

    On a terminal it is a bar; elsewhere (pipes, files, notebooks) a line every ``refresh`` seconds and one at the end.
    Validation, test and predict show batches or samples in the same way. Time left is that of the whole run at its
    average speed so far, validation and samples included; steps per second are those of training since the last look.

    The loss is the module's ``last_loss`` and is read only when it is shown, so that a GPU never waits for it.

    Args:
        refresh: seconds between two lines where there is no terminal.
    """

    def __init__(self, refresh: float = 10.0) -> None:
        super().__init__()
        if refresh <= 0:
            raise ValueError(f"the seconds between two lines of progress must be positive, got {refresh}")
        self.refresh = refresh
        self._enabled = True
        self._display: Display = Lines(refresh)
        self._fit = Pace("step")
        self._begin("")
        self._validated: dict[str, float] = {}

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look where the output goes."""
        super().setup(trainer, pl_module, stage)
        self._display = Bar() if sys.stdout.isatty() else Lines(self.refresh)

    # Training.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock where a resumed run is."""
        self._validated = {}
        self._fit = Pace("step", updates(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show a line if it is time."""
        if self._enabled and self._display.due():
            self._show_fit(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last line."""
        if self._enabled:
            self._show_fit(trainer, pl_module)
            self._display.close()

    def _show_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = updates(trainer, pl_module)
        loss = getattr(pl_module, "last_loss", None)
        numbers = {"loss": float(loss)} if isinstance(loss, torch.Tensor) else {}
        self._display.show(self._fit.report(now, _planned(trainer, now), {**numbers, **self._validated}))

    # Validation, test, predict.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a pass."""
        self._fit.pause()
        self._begin("check" if trainer.sanity_checking else "validate")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show a line if it is time."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._advance(1, _sum(batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the numbers for the lines of training; those of samples, "val/samples/...", stay in the logs."""
        self._fit.go_on()
        if trainer.state.fn != TrainerFn.FITTING:
            self._finish()
        elif not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            shown = {name: value for name, value in metrics if name.startswith("val") and name.count("/") <= 1}
            self._validated = {name: float(value) for name, value in shown.items()}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a pass."""
        self._begin("test")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show a line if it is time."""
        self._advance(1, _sum(trainer.num_test_batches))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last line."""
        self._finish()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a pass; it also shows the parts of a sample that the method tells of."""
        loader: Any = trainer.predict_dataloaders
        if isinstance(getattr(loader, "count", None), int):
            self._begin(getattr(loader, "label", "sample"), loader.count)
        else:
            self._begin("predict")
        pl_module.on_part = self._show_part  # type: ignore[assignment]

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show a line if it is time: samples of all processes if the loader knows their ``count``, else batches."""
        count = getattr(trainer.predict_dataloaders, "count", None)
        if isinstance(count, int):
            # Other processes have as many or one less.
            self._advance(min(len(batch["index"]) * trainer.world_size, count - self._done), count)
        else:
            self._advance(1, _sum(trainer.num_predict_batches))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last line."""
        pl_module.on_part = None  # type: ignore[assignment]
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._display.close()

    def _begin(self, label: str, total: int | None = None) -> None:
        self._pass = Pace(label)
        self._done = 0
        self._total = total
        self._in_parts = False

    def _advance(self, more: int, total: int | None) -> None:
        self._done, self._total = self._done + more, total
        if self._in_parts:
            self._pass.report(self._done, total, {})  # takes the time of the whole now, not after the next part
        if self._enabled and self._display.due():
            self._display.show(self._pass.report(self._done, total, {}))

    def _show_part(self, done: int, total: int) -> None:
        self._in_parts = True
        if self._enabled and self._display.due():
            self._display.show(self._pass.report(self._done, self._total, {"part": done, "of": total}))

    def _finish(self) -> None:
        if self._enabled:
            self._display.show(self._pass.report(self._done, self._total, {}))
            self._display.close()


def _sum(batches: int | float | list[int | float]) -> int | None:
    """Batches of all loaders; None if that is not known."""
    total = sum(batches) if isinstance(batches, list) else batches
    return int(total) if math.isfinite(total) else None


def _planned(trainer: Trainer, done: int) -> int | None:
    """Updates of the whole run; None if it has no end."""
    limits: list[int] = []
    if trainer.max_steps > 0:
        # Lightning counts the steps of all optimisers; their number per update of the model shows as they run.
        per_update = max(1, round(trainer.global_step / done)) if done else 1
        limits.append(trainer.max_steps // per_update)
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(batches):
        limits.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(limits) if limits else None
