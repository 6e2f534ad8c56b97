"""Metrics of series against the reference's ways: all pairs for VDS and FDDS, one network after another for scores.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_series_metrics.py`` prints CPU seconds, ratios and differences. All
pairs are compared on a part and scaled by the number of pairs. Goals: VDS and FDDS of 10000 windows of Sines in 0.5
CPU s, of 50 dimensions (1225 pairs) in 15.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_sgm.metrics import ClassifierTwoSample, CorrelationDistance, DiscriminativeAccuracy, ValueDistance
from lightning_sgm.metrics.binned import VARIANCES
from lightning_sgm.metrics.correlations import correlations

WINDOWS, FEW = 10000, 1500
Numbers = dict[str, float]


def sines(seed: int, dims: int) -> Tensor:
    """(10000, 24, dims) float32 windows in [-1, 1] of the data set Sines."""
    draws = np.random.default_rng(seed).uniform(0, 0.1, (WINDOWS, 1, dims, 2))
    return torch.from_numpy(np.sin(draws[..., 0] * np.arange(24)[:, None] + draws[..., 1])).float()


def dense(u: Tensor, v: Tensor) -> float:
    """Squared MMD of two samples over all pairs, as the reference has it."""

    def mean(a: Tensor, b: Tensor) -> float:
        square = (a[:, None] - b).square()
        return float(sum((-square / (2 * s)).exp().mean() for s in VARIANCES))

    return mean(u, u) + mean(v, v) - 2 * mean(u, v)


def pairwise(real: Tensor, generated: Tensor) -> Numbers:
    """VDS of the first windows' values and FDDS, dimension by dimension and pair by pair."""
    unit = [((part[: FEW // 24].double() + 1) / 2).flatten(0, 1) for part in (real, generated)]
    together = [correlations(part.double()) for part in (real, generated)]
    found = {}
    for name, (a, b) in {"vds": unit, "fdds": together}.items():
        found[name] = float(np.mean([dense(a[:, i], b[:, i]) for i in range(a.shape[1])]))
    return found


def ours(real: Tensor, generated: Tensor, few: bool = False) -> Numbers:
    """Both by the metrics, fed in batches of 256."""
    found = {}
    for metric in (ValueDistance(), CorrelationDistance()):
        count = FEW // 24 if few and metric.name == "vds" else len(real)
        for windows, is_real in ((real, True), (generated, False)):
            for batch in windows[:count].split(256):
                metric.update(batch, real=is_real)
        found[metric.name] = float(metric.compute()[metric.name])
    return found


def timed(run: Callable[[], Numbers]) -> tuple[float, Numbers]:
    """CPU seconds and result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def populations() -> None:
    """VDS and FDDS of few and of many dimensions."""
    for dims, goal in ((5, 0.5), (50, 15.0)):
        real, generated = sines(0, dims), sines(1, dims)
        first, second = (part[:FEW, :, :5] for part in (real, generated))
        # As many values as correlations, as in the reference, which draws 10000 values: all take FEW^2 pairs.
        loop, expected = timed(partial(pairwise, first, second))
        found = ours(first, second, few=True)
        pairs = dims * (dims - 1) // 2
        scaled = loop * (WINDOWS / FEW) ** 2 * (dims + pairs) / (5 + 10)
        seconds, _ = timed(partial(ours, real, generated))
        worst = max(abs(found[name] - value) for name, value in expected.items())
        print(
            f"{dims} dimensions: VDS and FDDS {seconds:.2f} CPU s (goal {goal}), all pairs {scaled:.0f} (scaled), "
            f"ratio {scaled / seconds:.0f}, largest difference {worst:.0e}"
        )


def scores(iterations: int, repeats: int) -> None:
    """Networks together and one after another, and the stronger test beside them."""
    real, generated = sines(0, 6)[:1000], sines(1, 6)[:1000]
    generated = generated + 0.06 * torch.from_numpy(np.random.default_rng(2).normal(size=generated.shape)).float()

    def run(metric: DiscriminativeAccuracy | ClassifierTwoSample) -> Numbers:
        metric.update(real, real=True)
        metric.update(generated, real=False)
        return {key: float(value) for key, value in metric.compute().items()}

    def accuracy(count: int, seed: int = 0) -> DiscriminativeAccuracy:
        return DiscriminativeAccuracy(count, iterations, halves=False, seed=seed)

    together, found = timed(partial(run, accuracy(repeats)))
    alone = sum(timed(partial(run, accuracy(1, seed)))[0] for seed in range(repeats))
    seconds, trees = timed(partial(run, ClassifierTwoSample(halves=False)))
    print(
        f"{repeats} discriminators, {iterations} steps: {together:.1f} CPU s, one after another {alone:.1f}, ratio "
        f"{alone / together:.1f}"
    )
    print(
        f"Sines with noise of 0.03: discriminative {found['discriminative']:.3f}, two_sample {trees['two_sample']:.3f} "
        f"in {seconds:.1f} CPU s"
    )


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=400, help="of the networks; the paper's are 2000")
    parser.add_argument("--repeats", type=int, default=5, help="networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    populations()
    scores(arguments.iterations, arguments.repeats)


if __name__ == "__main__":
    main()
