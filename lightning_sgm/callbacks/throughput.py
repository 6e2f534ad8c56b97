"""How fast training runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_sgm.callbacks.clock import updates


class Throughput(Callback):
    """Logs the speed of training, all processes together.

    - ``speed/examples_per_second``, and ``speed/tokens_per_second`` if ``batch["x"]`` holds tokens (long);
    - ``speed/step_ms``: time per batch;
    - ``speed/data_ms``: the part of it between two steps, which is waiting for data and moving them to the device;
    - ``speed/examples``: examples seen since the start of the run.

    Validation is not counted, nor what runs inside :func:`untimed`. The device is synchronised only when numbers are
    written and when the clock stops. Put it after callbacks that work at the end of a batch, so that their time
    counts as step and not as data.

    Args:
        every: cadence in updates; by default the trainer's ``log_every_n_steps``.
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"the cadence of Throughput must be at least 1 update, got {every}")
        self.every = every
        self._examples = 0
        self._seen = 0
        self._stopped = 0
        self._stopped_at = 0.0
        self._processes = 1
        self._restart()

    def _restart(self) -> None:
        """Begin a new window."""
        self._began = self._left = time.perf_counter()
        self._waiting = self._excluded = 0.0
        self._batches = self._window_examples = self._window_tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._seen = updates(trainer, pl_module)
        self._stopped = 0
        self._processes = trainer.world_size
        self._restart()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The data are here."""
        self._waiting += time.perf_counter() - self._left

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; write at the cadence."""
        x = batch["x"]
        self._batches += 1
        self._window_examples += len(x) * self._processes
        self._examples += len(x) * self._processes
        if x.dtype == torch.long:
            self._window_tokens += x.numel() * self._processes
        now = updates(trainer, pl_module)
        every = self.every or max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if now // every > self._seen // every:
            self._write(trainer, pl_module, now)
        self._seen = now
        self._left = time.perf_counter()

    def _write(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        _synchronise(pl_module)
        seconds = time.perf_counter() - self._began - self._excluded
        values = {
            "speed/examples_per_second": self._window_examples / seconds,
            "speed/step_ms": 1000.0 * seconds / self._batches,
            "speed/data_ms": 1000.0 * self._waiting / self._batches,
            "speed/examples": float(self._examples),
        }
        if self._window_tokens:
            values["speed/tokens_per_second"] = self._window_tokens / seconds
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        self._restart()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._go_on()

    def _stop(self, pl_module: LightningModule) -> None:
        if not self._stopped:
            _synchronise(pl_module)
            self._stopped_at = time.perf_counter()
        self._stopped += 1

    def _go_on(self) -> None:
        self._stopped -= 1
        if not self._stopped:
            self._left = time.perf_counter()
            self._excluded += self._left - self._stopped_at

    def state_dict(self) -> dict[str, Any]:
        """Examples seen."""
        return {"examples": self._examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved by :meth:`state_dict`."""
        self._examples = int(state_dict["examples"])


@contextmanager
def untimed(trainer: Trainer) -> Iterator[None]:
    """Stops the clock of the trainer's Throughput inside the block: for callbacks that sample or write files in fit."""
    meters = [c for c in trainer.callbacks if isinstance(c, Throughput)]  # type: ignore[attr-defined]
    for meter in meters:
        meter._stop(trainer.lightning_module)
    try:
        yield
    finally:
        for meter in meters:
            meter._go_on()


def _synchronise(pl_module: LightningModule) -> None:
    """Wait for the device."""
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
