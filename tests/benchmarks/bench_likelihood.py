"""Likelihood by one network call per evaluation against the reference's two, with the same numbers.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_likelihood.py`` prints CPU seconds of ln p of 32 images of 16 x 16
under a DDPM++ of 0.75 million random weights (VP, one Rademacher probe, dopri5 at 1e-4), with drift and divergence from
one call, and with the drift from a call of its own as in the reference; and what further probes cost. The contestants
take turns and the fastest run of each counts, since the machine may be busy. The goal is a ratio of at least 1.4
(score_sde.md section 8).
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser, Denoiser, EDMPreconditioning
from lightning_sgm.likelihood import Likelihood
from lightning_sgm.networks.ncsnpp import NCSNpp
from lightning_sgm.processes.gaussian import VP, Level
from lightning_sgm.random import Draw

IMAGES, SIDE = 32, 16


class TwoCalls(Likelihood):
    """The drift first, then the network again for its divergence."""

    def answer(
        self, denoiser: BaseDenoiser, x: Tensor, level: Level, directions: Tensor, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As the parent's."""
        x0 = denoiser.x0(x, level.t, **conditions)
        return x0, super().answer(denoiser, x, level, directions, conditions)[1]


def build() -> Denoiser:
    """A DDPM++ whose last convolutions are not zero."""
    torch.manual_seed(0)
    spec = {"kind": "image", "shape": [1, SIDE, SIDE], "classes": 0}
    network = NCSNpp(spec, channels=[32, 64], attention=[8], layers_per_block=1).eval()
    for parameter in network.parameters():
        if parameter.ndim == 4 and parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=0.01)
    print(f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters")
    return Denoiser(network, VP(), EDMPreconditioning())


@torch.inference_mode()
def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contestant")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    denoiser, x = build(), 0.5 * Draw(1).normal((IMAGES, 1, SIDE, SIDE))
    contestants = {
        "two calls": TwoCalls(rtol=1e-4, atol=1e-4),
        "one call": Likelihood(rtol=1e-4, atol=1e-4),
        "one call, 4 probes": Likelihood(probes=4, rtol=1e-4, atol=1e-4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    found: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, likelihood in contestants.items():
            start = time.process_time()
            found[name] = likelihood(denoiser, x, Draw(0, torch.arange(IMAGES)))
            seconds[name].append(time.process_time() - start)
    for name, likelihood in contestants.items():
        fastest = min(seconds[name])
        each = 1e3 * fastest / likelihood.evaluations
        print(f"  {name:<20} {fastest:7.2f} s, {likelihood.evaluations} evaluations of {each:.1f} ms")
    difference = float((found["two calls"] - found["one call"]).abs().max())
    ratio = min(seconds["two calls"]) / min(seconds["one call"])
    print(f"two calls / one call {ratio:.2f} (goal 1.40), largest difference of ln p {difference:.1e}")


if __name__ == "__main__":
    main()
