"""What the framework costs per training step over a bare PyTorch loop on the same model, data and optimiser.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_overhead.py`` prints CPU microseconds per step of the bare loop, the
same with an average of the weights by hand, of Lightning without callbacks and loggers, and of
``lightning_sgm.Trainer`` with everything on at its default cadence: EMA, step seeds, throughput, progress in a pipe,
TensorBoard and CSV every 50 steps, sample and checkpoint callbacks (which neither draw nor write in between). Runs
alternate and the fastest of each counts, since the machine may be busy. The goal is at most 600 us from the second to
the last row (platform.md 5.1).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from datamodules.loaders import TrainLoader
from lightning_sgm.callbacks import Checkpoints, SampleLogger
from lightning_sgm.methods.base import Batch, GenerativeModule
from lightning_sgm.random import Draw
from lightning_sgm.trainer import Trainer

WIDTH, EXAMPLES = 384, 4096


class Denoise(GenerativeModule):
    """A multilayer perceptron (6 layers, 0.6 million parameters, 12 tensors) that removes noise from vectors."""

    def __init__(self) -> None:
        super().__init__(
            spec={"kind": "image", "shape": [1, 8, 8], "classes": 0, "levels": 256, "range": [-1.0, 1.0]},
            optimizer=make_optimizer,
        )
        sizes = [64, *[WIDTH] * 5, 64]
        layers = [module for a, b in itertools.pairwise(sizes) for module in (nn.Linear(a, b), nn.SiLU())]
        self.network = nn.Sequential(*layers[:-1])

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Squared error per example."""
        x = batch["x"]
        noise = draw.normal(x.shape)
        return {"loss": (self.network(x + noise) - noise).square().mean(1)}


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def loader(batch_size: int) -> TrainLoader:
    """Vectors in memory."""
    x = torch.randn(EXAMPLES, 64)
    return TrainLoader(lambda index, epoch: {"x": x[index]}, EXAMPLES, batch_size, ranks=(0, 1))


def bare(batch_size: int, steps: int, averaged: bool = False) -> float:
    """CPU seconds of a loop by hand."""
    model, data, done = Denoise(), loader(batch_size), 0
    optimizer, draw = make_optimizer(model.parameters()), Draw(0)
    weights = [parameter.detach() for parameter in model.network.parameters()]
    average = [weight.clone() for weight in weights]
    start = time.process_time()
    while True:
        for batch in data:
            optimizer.zero_grad()
            model.losses(batch, draw)["loss"].mean().backward()
            optimizer.step()
            if averaged:
                torch._foreach_lerp_(average, weights, 1e-4)
            done += 1
            if done == steps:
                return time.process_time() - start


class Stopwatch(pl.Callback):
    """CPU seconds from the start of the first step to that of the last, after which a checkpoint is written."""

    def on_train_start(self, *_: Any) -> None:
        """Start."""
        self.start = time.process_time()

    def on_train_batch_start(self, *_: Any) -> None:
        """Stop, unless another step follows."""
        self.seconds = time.process_time() - self.start


def fit(trainer: pl.Trainer, watch: Stopwatch, batch_size: int) -> float:
    """CPU seconds of a fit, its output caught."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(Denoise(), train_dataloaders=loader(batch_size))
    return watch.seconds


def lightning_alone(batch_size: int, steps: int) -> float:
    """Nothing but Lightning's loop and the method."""
    watch = Stopwatch()
    off: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return fit(pl.Trainer(accelerator="cpu", max_steps=steps + 1, callbacks=watch, **off), watch, batch_size)


def framework(batch_size: int, steps: int) -> float:
    """All defaults; drawing and saving beyond the end of the run."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[pl.Callback] = [watch, SampleLogger(every=10**9), Checkpoints(every=10**9)]
        callbacks[1].on_train_end = lambda *_: None  # type: ignore[method-assign]
        trainer = Trainer(run_dir=str(Path(folder)), accelerator="cpu", max_steps=steps + 1, callbacks=callbacks)
        return fit(trainer, watch, batch_size)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    kinds: dict[str, Callable[[int, int], float]] = {
        "bare loop": bare,
        "with EMA by hand": partial(bare, averaged=True),
        "Lightning alone": lightning_alone,
        "everything on": framework,
    }
    for batch_size in options.batch_sizes:
        best = dict.fromkeys(kinds, math.inf)
        for _ in range(options.rounds):
            for name, kind in kinds.items():
                best[name] = min(best[name], 1e6 * kind(batch_size, options.steps) / options.steps)
        base = best["bare loop"]
        for name, value in best.items():
            print(
                f"batch {batch_size:4d}  {name:16s} {value:8.0f} us/step  {value - base:+6.0f} us  {value / base:.3f}x"
            )


if __name__ == "__main__":
    main()
