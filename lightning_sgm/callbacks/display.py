"""How progress looks: its speed and time left, as lines or as bars."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import TaskID

_BAR_SECONDS = 0.5


@dataclass
class Report:
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


class Pace:
    """Speed and time left of one loop.

    Args:
        label: what a step is.
        first: number of steps done before the clock started.
    """

    def __init__(self, label: str, first: int = 0) -> None:
        self.label = label
        self._first = self._then = first
        self._began = self._looked = self._paused_at = time.monotonic()
        self._paused = self._rate = 0.0

    def pause(self) -> None:
        """Stop the clock of the speed, not that of the time left."""
        self._paused_at = time.monotonic()

    def go_on(self) -> None:
        """Start it again."""
        self._paused += time.monotonic() - self._paused_at

    def report(self, done: int, total: int | None, numbers: dict[str, float]) -> Report:
        """State after ``done`` of ``total`` steps; the speed is that since the last report which saw a step."""
        now = time.monotonic()
        if done > self._then:
            self._rate = (done - self._then) / max(1e-9, now - self._looked - self._paused)
            self._looked, self._then, self._paused = now, done, 0.0
        elapsed = now - self._began
        known = total is not None and done > self._first
        left = max(0, (total or 0) - done) * elapsed / (done - self._first) if known else None
        return Report(self.label, done, total, self._rate, elapsed, left, numbers)


class Display(Protocol):
    """How reports are shown."""

    def due(self) -> bool:
        """Whether it is time for the next one."""

    def show(self, report: Report) -> None:
        """Show it now."""

    def close(self) -> None:
        """Nothing follows for now."""


class Lines:
    """A line per report."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = ""
        self._next = time.monotonic() + seconds

    def due(self) -> bool:
        """Whether the time has passed."""
        return time.monotonic() >= self._next

    def show(self, report: Report) -> None:
        """Print it, unless it says what the line before said."""
        if (line := str(report)) != self._last:
            print(line, flush=True)
        self._last = line
        self._next = time.monotonic() + self._seconds

    def close(self) -> None:
        """Wait for the full time again."""
        self._next = time.monotonic() + self._seconds


class Bar:
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
        """Whether the time has passed."""
        return time.monotonic() >= self._next

    def show(self, report: Report) -> None:
        """Draw it."""
        facts = "  ".join(report.facts())
        if report.label not in self._tasks:
            self._bars.start()
            self._tasks[report.label] = self._bars.add_task(report.label, total=report.total, facts=facts)
        task = self._tasks[report.label]
        self._bars.update(task, completed=report.done, total=report.total, facts=facts, refresh=True)
        self._next = time.monotonic() + _BAR_SECONDS

    def close(self) -> None:
        """Leave the bars on the screen as they are."""
        self._bars.stop()
        self._tasks = {}
        for task in list(self._bars.task_ids):
            self._bars.remove_task(task)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
