"""PaD-TS's population term against the reference's way of computing it, with the same numbers.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_population.py`` prints milliseconds of CPU time of correlations,
discrepancy and their gradient for one step, and how many operations it issues (views included), for three sizes of the
paper: a loop over windows and one exponential per kernel and block of distances, as in the reference, and ours, whose
loss and gradient are compared with the former's in float64. The contestants take turns and the fastest run of each
counts, since the machine may be busy.
The goals are 3 ms and 200 operations for 64 windows of 6 dimensions, and 179 ms for 64 of 28 (pad_ts.md section 8).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sgm.objectives.discrepancy import VARIANCES
from lightning_sgm.objectives.population import Population
from lightning_sgm.processes.chains import CosineChain
from lightning_sgm.random import Draw

TERM, LEVEL = Population(alpha=1.0), CosineChain().level(torch.full((1,), 0.5))
SIZES = ((64, 24, 6), (64, 24, 28), (32, 24, 50))  # Stocks, Energy, fMRI


class Operations(TorchDispatchMode):
    """Counts what reaches the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and pass on."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def naive(answer: Tensor, x0: Tensor) -> Tensor:
    """The mean discrepancy window by window and kernel by kernel."""
    dimensions = x0.shape[2]
    row, column = torch.tril_indices(dimensions, dimensions, -1)
    u, v = (torch.stack([torch.corrcoef(window.T)[row, column].nan_to_num(0.0) for window in x]) for x in (x0, answer))
    total = torch.zeros(len(row), dtype=x0.dtype)
    for a, b, factor in ((u, u, 1.0), (v, v, 1.0), (u, v, -2.0)):
        square = (a.T[:, :, None] - b.T[:, None, :]) ** 2
        for variance in VARIANCES:
            total = total + factor * torch.exp(-square / (2.0 * variance)).mean((1, 2))
    return total.mean()


def ours(answer: Tensor, x0: Tensor) -> Tensor:
    """The same by the library."""
    return TERM(answer, x0, LEVEL)["term"]


def step(loss: Callable[[Tensor, Tensor], Tensor], answer: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    answer = answer.detach().requires_grad_()
    value = loss(answer, x0)
    value.backward()
    assert answer.grad is not None
    return value.detach(), answer.grad


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="runs of each contestant")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    # As in training, where the network's activations come and go: the allocator keeps pages of that size.
    for _ in range(3):
        torch.zeros(7_500_000)
    for size in SIZES:
        draw = Draw(0)
        x0 = draw.normal(size).cumsum(1)
        answer = x0 + 0.3 * draw.normal(size)
        seconds: dict[str, list[float]] = {"naive": [], "ours": []}
        for _ in range(repeats):
            for name, loss in (("naive", naive), ("ours", ours)):
                begin = time.process_time()
                step(loss, answer, x0)
                seconds[name].append(time.process_time() - begin)
        counts = {}
        for name, loss in (("naive", naive), ("ours", ours)):
            with Operations() as operations:
                step(loss, answer, x0)
            counts[name] = operations.count
        slow, fast = min(seconds["naive"]) * 1e3, min(seconds["ours"]) * 1e3
        truth, found = step(naive, answer.double(), x0.double()), step(ours, answer, x0)
        value, gradient = (float((a - b).norm() / a.norm()) for a, b in zip(truth, found, strict=True))
        print(
            f"{size}: {slow:.1f} -> {fast:.1f} ms, ratio {slow / fast:.1f}; operations {counts['naive']} -> "
            f"{counts['ours']}; relative difference of loss {value:.0e}, gradient {gradient:.0e}"
        )


if __name__ == "__main__":
    main()
