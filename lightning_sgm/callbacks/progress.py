"""Where a run is and how long it will take, on a terminal and in a log file."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lightning_sgm.callbacks.clock import updates

if TYPE_CHECKING:
    from rich.progress import TaskID

_BAR_SECONDS = 0.5


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
        self._display: _Display = _Lines(refresh)
        self._fit = _Pace("step")
        self._pass = _Pace("")
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
        self._display = _Bar() if sys.stdout.isatty() else _Lines(self.refresh)

    # Training.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock where a resumed run is."""
        self._validated = {}
        self._fit = _Pace("step", updates(trainer, pl_module))

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
        self._pass = _Pace("check" if trainer.sanity_checking else "validate")

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
        self._advance(1, _total(batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the numbers for the lines of training."""
        self._fit.go_on()
        if trainer.state.fn != TrainerFn.FITTING:
            self._finish()
        elif not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self._validated = {name: float(value) for name, value in metrics if name.startswith("val")}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a pass."""
        self._pass = _Pace("test")

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
        self._advance(1, _total(trainer.num_test_batches))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last line."""
        self._finish()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a pass."""
        samples = isinstance(getattr(trainer.predict_dataloaders, "count", None), int)
        self._pass = _Pace("sample" if samples else "predict")

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
            self._advance(len(batch["index"]) * trainer.world_size, count)
        else:
            self._advance(1, _total(trainer.num_predict_batches))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last line."""
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._display.close()

    def _advance(self, more: int, total: int | None) -> None:
        self._pass.done += more
        self._pass.total = total
        if self._enabled and self._display.due():
            self._display.show(self._pass.report(self._pass.done, total, {}))

    def _finish(self) -> None:
        if self._enabled:
            self._display.show(self._pass.report(self._pass.done, self._pass.total, {}))
            self._display.close()


def _total(batches: int | float | list[int | float]) -> int | None:
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


@dataclass
class _Report:
    """What is to be shown. Seconds; ``left`` is None if it is not known."""

    label: str
    done: int
    total: int | None
    rate: float
    elapsed: float
    left: float | None
    numbers: dict[str, float]

    def facts(self) -> list[str]:
        """Everything but how far it is, in words."""
        words = [f"{name} {value:.4g}" for name, value in self.numbers.items()]
        words.append(f"{self.rate:.3g} it/s" if self.rate < 1000 else f"{self.rate:.0f} it/s")
        words.append(f"elapsed {_clock(self.elapsed)}")
        if self.left is not None:
            words.append(f"ETA {_clock(self.left)}")
        return words

    def __str__(self) -> str:
        part = f" ({self.done / self.total:.1%})" if self.total else ""
        return "  ".join([f"{self.label} {self.done}{f'/{self.total}' if self.total else ''}{part}", *self.facts()])


@dataclass
class _Pace:
    """Speed and time left of one loop."""

    label: str
    first: int = 0
    done: int = 0
    total: int | None = None
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._looked, self._then = self.began, self.first
        self._paused = 0.0
        self._paused_at = self.began

    def pause(self) -> None:
        """Stop the clock of the speed, not that of the time left."""
        self._paused_at = time.monotonic()

    def go_on(self) -> None:
        """Start it again."""
        self._paused += time.monotonic() - self._paused_at

    def report(self, done: int, total: int | None, numbers: dict[str, float]) -> _Report:
        """State after ``done`` of ``total`` steps; the speed is that since the last report which saw a step."""
        now = time.monotonic()
        working = max(1e-9, now - self._looked - self._paused)
        rate = (done - self._then) / working
        if done > self._then:
            self._looked, self._then, self._paused = now, done, 0.0
        elapsed = now - self.began
        known = total is not None and done > self.first
        left = max(0, (total or 0) - done) * elapsed / (done - self.first) if known else None
        return _Report(self.label, done, total, rate, elapsed, left, numbers)


class _Display(Protocol):
    """How reports are shown."""

    def due(self) -> bool:
        """Whether it is time for the next one."""

    def show(self, report: _Report) -> None:
        """Show it now."""

    def close(self) -> None:
        """Nothing follows for now."""


class _Lines:
    """A line per report."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def show(self, report: _Report) -> None:
        print(report, flush=True)
        self._next = time.monotonic() + self._seconds

    def close(self) -> None:
        self._next = time.monotonic() + self._seconds


class _Bar:
    """Bars of rich, one per label, drawn only when told to (no thread)."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self._bars = Bars(*columns, auto_refresh=False)
        self._tasks: dict[str, TaskID] = {}
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def show(self, report: _Report) -> None:
        facts = "  ".join(report.facts())
        if report.label not in self._tasks:
            self._bars.start()
            self._tasks[report.label] = self._bars.add_task(report.label, total=report.total, facts=facts)
        task = self._tasks[report.label]
        self._bars.update(task, completed=report.done, total=report.total, facts=facts, refresh=True)
        self._next = time.monotonic() + _BAR_SECONDS

    def close(self) -> None:
        self._bars.stop()
        self._tasks = {}
        for task in list(self._bars.task_ids):
            self._bars.remove_task(task)
