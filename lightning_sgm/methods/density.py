"""What ``test`` says of likelihood: bits per dimension of the data, and what the number depends on."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.likelihood import Likelihood
from lightning_sgm.metrics.base import ExampleMean
from lightning_sgm.metrics.likelihood import BitsPerDim
from lightning_sgm.processes.gaussian import GaussianProcess

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Batch, GenerativeModule

_PROBES = 1  # purpose of random numbers


class DensityTest(nn.Module):
    """Collects the likelihoods of test examples, on all processes.

    Args:
        likelihood: how they are computed.
        spec: of the data: shape, levels and range of images, whether they are dequantized; std of standardised arrays,
            whose density is given in their own units.
        examples: those with an index below this count; None for all.

    Raises:
        ValueError: the data are not dequantised, or ``examples`` is below 1.
    """

    def __init__(self, likelihood: Likelihood, spec: dict[str, Any], examples: int | None = None) -> None:
        super().__init__()
        if not spec.get("dequantized", spec.get("kind") != "image"):
            raise ValueError(
                "the likelihood of discrete data has no bound: set data.dequantize to true (and train with it), or "
                "leave out model.likelihood"
            )
        if examples is not None and examples < 1:
            raise ValueError(f"likelihood_examples must be at least 1, or null for all, got {examples}")
        self.likelihood = copy.copy(likelihood)  # it counts evaluations
        self.examples = examples
        self.levels, self.range = spec.get("levels"), spec.get("range", [0.0, 1.0])
        dimensions = math.prod(spec["shape"])
        self.bits = BitsPerDim(dimensions, self.levels, self.range)
        deviations = torch.tensor(spec.get("std", [1.0]), dtype=torch.float64)
        self.log_volume = dimensions * float(deviations.log().mean())  # of the data's units in standardised ones
        self.evaluations, self.mean, self.square = ExampleMean(), ExampleMean(), ExampleMean()

    def describe(self, process: GaussianProcess) -> str:
        """What the numbers depend on, in one line."""
        who = "all test examples" if self.examples is None else f"the first {self.examples} test examples"
        cells = f"{self.levels} levels in {list(self.range)}" if self.levels else "continuous data in their own units"
        return f"bits/dim of {who}, {cells}: {self.likelihood.describe(process)}"

    def update(self, module: GenerativeModule, denoiser: BaseDenoiser, batch: Batch) -> None:
        """Add the examples of a batch that are asked for."""
        if self.examples is not None:
            chosen = batch["index"] < self.examples
            batch = {name: value[chosen] for name, value in batch.items()}
        x = batch["x"]
        if not len(x):
            return
        draw = module.evaluation_draw(batch).fork(_PROBES)
        self.bits.update(self.likelihood(denoiser, x, draw, **module.conditions(batch)) - self.log_volume)
        self.evaluations.update(torch.full((len(x),), float(self.likelihood.evaluations), device=x.device))
        self.mean.update(x.flatten(1).double().mean(1))
        self.square.update(x.flatten(1).double().square().mean(1))

    def compute(self, process: GaussianProcess) -> dict[str, Tensor]:
        """Numbers over the examples of all processes, float64 scalars.

        Returns:
            bits_per_dim and bits_per_dim_standard_error, see :class:`~lightning_sgm.metrics.BitsPerDim`; prior_bias, by
            how many of the bits per dimension the prior is to blame if the data are Gaussian, see
            :meth:`Likelihood.prior_bias`; likelihood_evaluations of the network per example.
        """
        found, mean = self.bits.compute(), float(self.mean.compute())
        deviation = math.sqrt(max(0.0, float(self.square.compute()) - mean**2))
        bias = self.likelihood.prior_bias(process, mean, deviation) / math.log(2)
        return {
            "bits_per_dim": found["bits_per_dim"],
            "bits_per_dim_standard_error": found["standard_error"],
            "prior_bias": torch.tensor(bias, dtype=torch.float64),
            "likelihood_evaluations": self.evaluations.compute(),
        }

    def reset(self) -> None:
        """Forget all examples."""
        for metric in (self.bits, self.evaluations, self.mean, self.square):
            metric.reset()
