"""Population-aware training of PaD-TS (Li et al. 2025, 2501.00910): windows are right one by one and as a population.

To the squared error comes a discrepancy between the batch's estimates of x_0 and its data: of each pair of dimensions,
how the correlation is distributed over windows. It belongs to a batch, not to an example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, distributed

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.metrics.correlations import correlations
from lightning_sgm.objectives.denoising import ChainTimes, DenoisingObjective, Times
from lightning_sgm.objectives.discrepancy import VARIANCES, mmd
from lightning_sgm.objectives.weights import DataWeight, Weight
from lightning_sgm.processes.gaussian import GaussianProcess, Level
from lightning_sgm.random import Draw


class SharedTime(Times):
    """One time for a whole batch, on all processes: "same step sampling".

    With a time for each window, the batch's correlations would be a mixture over noise levels.

    Args:
        times: law of that time.
    """

    def __init__(self, times: Times = ChainTimes()) -> None:
        self.times = times

    def __call__(self, process: GaussianProcess, count: int, draw: Draw) -> Tensor:
        """(count,) float64 times, all equal."""
        return self.times(process, 1, draw.shared).expand(count)


class Population:
    """How far the distribution of correlations over a batch's estimates is from that over its data.

    With several processes it is that of all their batches together, and its gradient too: their mean, which DDP takes,
    is the gradient of the joined batch (with ``fade``, where all share one time). Their batches must be of one size.
    With accumulated gradients it is that of each batch. Data of one dimension have no correlations: 0.

    Args:
        alpha: weight beside the squared error; 5e-4 for most of the paper's data, 8e-4 for stocks, 2e-5 for fMRI.
        variances: of the Gaussian kernels that are added up.
        fade: the weight also falls with the noise level, by (1 + (sigma / alpha_t / fade_ratio)^2)^-fade. 0 is the
            paper, 1 at ``fade_ratio`` 1 the share of the data in the variance. At high noise E[x_0 | x_t] should not
            have the data's correlations, so there the term pulls against the squared error.
        fade_ratio: noise level sigma / alpha_t at which it begins to fall.
    """

    def __init__(
        self, alpha: float = 5e-4, variances: Sequence[float] = VARIANCES, fade: float = 0.0, fade_ratio: float = 1.0
    ) -> None:
        if alpha < 0 or fade < 0 or fade_ratio <= 0:
            raise ValueError(
                f"Population needs alpha >= 0, fade >= 0 and fade_ratio > 0, got {alpha}, {fade} and {fade_ratio}"
            )
        if not variances or min(variances) <= 0:
            raise ValueError(f"variances of Population must be positive numbers, got {list(variances)}")
        self.alpha, self.variances, self.fade, self.fade_ratio = alpha, tuple(variances), fade, fade_ratio
        self._rows = 0

    def restart(self) -> None:
        """Forget the size of the batches: another fit may have others."""
        self._rows = 0

    def __call__(
        self, answer: Tensor, x0: Tensor, level: Level, decode: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The term of a batch.

        Args:
            answer: (B, L', D) estimates of x_0.
            x0: (B, L', D) data.
            level: where they were estimated, (B,).
            decode: from the model's space to windows (B, L, D), differentiable; None where they differ by a positive
                affine change of each dimension at most, which correlations do not see.

        Returns:
            Scalars: "term", to be added to the loss; "population", the mean over pairs of the squared discrepancy, and
            "population_unbiased", the same without the bias that makes it positive for equal populations, which only
            the first has a gradient.

        Raises:
            ValueError: fewer than two windows, or processes with batches of different sizes.
        """
        both = torch.cat([x0, answer])
        truth, found = correlations(both if decode is None else decode(both)).float().chunk(2)
        if not found.shape[1]:
            zero = found.sum()
            return {"term": zero, "population": zero, "population_unbiased": zero}
        truth, found, processes = self._joined(truth, found)
        biased, unbiased = (value.mean() for value in mmd(truth.T, found.T, self.variances))
        # All processes have the same value and a gradient of their own rows only, of which DDP takes the mean.
        value = biased.detach() + processes * (biased - biased.detach()) if processes > 1 else biased
        weight = self.alpha * ((1.0 + (level.ratio / self.fade_ratio) ** 2) ** -self.fade).mean()
        return {
            "term": weight.to(value.dtype) * value,
            "population": biased.detach(),
            "population_unbiased": unbiased,
        }

    def _joined(self, truth: Tensor, found: Tensor) -> tuple[Tensor, Tensor, int]:
        """Both of all processes, of which only this one's rows have a gradient, and how many processes there are."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return truth, found, 1
        processes = distributed.get_world_size()
        if processes == 1:
            return truth, found, 1
        self._check_rows(truth, processes)
        own = torch.stack([truth, found]).detach()
        parts = [torch.empty_like(own) for _ in range(processes)]
        distributed.all_gather(parts, own)
        rank = distributed.get_rank()
        return (
            torch.cat([part[0] for part in parts]),
            torch.cat([found if i == rank else part[1] for i, part in enumerate(parts)]),
            processes,
        )

    def _check_rows(self, values: Tensor, processes: int) -> None:
        """Refuse batches of different sizes: gathering them would hang."""
        rows = len(values)
        sizes = [rows]
        if not self._rows:  # once: later batches are compared with this one, which needs no communication
            own = torch.tensor([rows], device=values.device)
            parts = [torch.empty_like(own) for _ in range(processes)]
            distributed.all_gather(parts, own)
            sizes = [int(part) for part in parts]
        if len({*sizes, self._rows or rows}) > 1:
            raise ValueError(
                f"the population term needs batches of one size on all processes and in all steps, got {rows} windows "
                f"beside {max({*sizes, self._rows} - {rows})}: drop the last, smaller batch of an epoch"
            )
        self._rows = rows


class PopulationObjective(DenoisingObjective):
    """Squared error of x_0 and the :class:`Population` term, all windows of a batch at one time: PaD-TS's loss.

    Args:
        times: law of t; a law without :class:`SharedTime` gives each window a time of its own (the paper's ablation).
        weight: of the squared error of x_0.
        reduction: see :class:`~lightning_sgm.objectives.denoising.DenoisingObjective`.
        population: the term; None for the squared error alone (the paper's ablation).
    """

    def __init__(
        self,
        times: Times = SharedTime(),
        weight: Weight = DataWeight(),
        reduction: Literal["mean", "half_sum"] = "mean",
        population: Population | None = Population(),
    ) -> None:
        super().__init__(times, weight, reduction)
        if weight.of != "x0":
            raise ValueError(
                f"PopulationObjective compares estimates of x_0, but {type(weight).__name__} squares the error of "
                f"{weight.of}: choose DataWeight, EDMWeight or PosteriorWeight"
            )
        self.population = copy.copy(population)  # it remembers the size of batches

    def __call__(  # type: ignore[override]  # a condition called decode is not to be had
        self,
        denoiser: BaseDenoiser,
        x0: Tensor,
        draw: Draw,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        **conditions: Tensor,
    ) -> dict[str, Tensor]:
        """Terms of a training batch.

        Args:
            denoiser: what is trained.
            x0: (B, L', D) windows.
            draw: source of times and noise.
            decode: see :class:`Population`.
            conditions: passed on to the network.

        Returns:
            "loss" (B,), whose mean is minimised, and "error" (B,), its squared error; of the batch, scalars, those of
            :class:`Population`.
        """
        times = self.times(denoiser.process, len(x0), draw)
        answer, squared = self.answered(times, denoiser, x0, draw, **conditions)
        error = self.reduce(squared)
        if self.population is None:
            return {"loss": error, "error": error}
        found = self.population(answer, x0, denoiser.process.level(times, x0.device), decode)
        return {"loss": error + found.pop("term"), "error": error, **found}

    def evaluate(self, denoiser: BaseDenoiser, x0: Tensor, draw: Draw, **conditions: Tensor) -> dict[str, Tensor]:
        """The squared error of held-out windows, "loss" (B,), each at a time of its own.

        One time for a batch would make it noisy and dependent on how the split is cut into batches, as the population
        term is, which is left out: samples are judged by FDDS.
        """
        law = self.times.times if isinstance(self.times, SharedTime) else self.times
        return {"loss": self.at(law(denoiser.process, len(x0), draw), denoiser, x0, draw, **conditions)}
