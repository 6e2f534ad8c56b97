"""An update of TAD-SR with the teacher's solutions kept, and with the teacher sampled in every step.

``OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/bench_distillation.py`` prints CPU seconds (process time) of an
update at the size of the recipe: SRResNet of 72 channels and 10 blocks with random weights, 16 squares of 64 x 64
pixels, x4, a teacher of 15 steps; medians over updates, for the terms one after the other, and what each term adds. The
goal for all terms is a ratio of 2.5 (tad_sr.md 8: the teacher is 15 of about 22 network evaluations).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch

from datamodules import SuperResolutionDataModule
from lightning_sgm.codecs import PixelUnshuffle
from lightning_sgm.denoiser import EDMPreconditioning
from lightning_sgm.methods import Distillation, ResShift
from lightning_sgm.methods.solutions import Solutions
from lightning_sgm.networks import SRResNet
from lightning_sgm.objectives import Adversarial, HighFrequencyScore, Regression, Term
from lightning_sgm.processes.residual import ResidualShift

TERMS = (Regression, HighFrequencyScore, Adversarial)


class Clock(pl.Callback):
    """CPU seconds of every update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Start."""
        self._start = time.process_time()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Stop."""
        self.seconds.append(time.process_time() - self._start)


def seconds(terms: list[Term], kept: bool, data: SuperResolutionDataModule, updates: int) -> float:
    """Median over updates; the first, in which solutions are found, does not count."""
    torch.manual_seed(0)
    teacher = ResShift(
        SRResNet,
        data.spec,
        codec=PixelUnshuffle(4),
        process=ResidualShift(kappa=0.3),
        preconditioning=EDMPreconditioning(0.09),
    )
    module = Distillation(terms, data.spec, teacher, solutions=Solutions() if kept else None, clip=1.0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=updates + 1,
            accelerator="cpu",
            default_root_dir=folder,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=data)
    return statistics.median(clock.seconds[1:])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=7)
    options = parser.parse_args()
    # One batch is an epoch: every update after the first finds all solutions.
    data = SuperResolutionDataModule(crop=64, crops_per_image=8, fixed=True, batch_size=16)
    print("CPU seconds of an update")
    print(f"{'terms':50} {'kept':>8} {'online':>8} {'ratio':>6} {'adds':>8}")
    before = 0.0
    for count in range(1, len(TERMS) + 1):
        kept, online = (
            seconds([term() for term in TERMS[:count]], each, data, options.updates) for each in (True, False)
        )
        names = " + ".join(term.__name__ for term in TERMS[:count])
        print(f"{names:50} {kept:8.3f} {online:8.3f} {online / kept:6.2f} {kept - before:8.3f}", flush=True)
        before = kept


if __name__ == "__main__":
    main()
