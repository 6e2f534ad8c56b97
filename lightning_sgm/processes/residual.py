"""ResShift: a Gaussian process on what a degraded image lacks (Yue et al. 2023, 2307.12348).

The state is the residual r_t = x_t - y, where y is the degraded image on the grid of x: x_0 - y at t = 0 and noise
around y at t = 1. A model adds y to what a sampler returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_sgm.processes.chains import Chain, MonotoneCubic
from lightning_sgm.processes.gaussian import Level, match

LowerEnd = Literal["resshift", "sinsr"]


class ResidualShift(Chain):
    """r_t = (1 - eta) r_0 + kappa sqrt(eta) eps, eta growing from 0 at t = 0 to ``sqrt_eta_end``^2 at t = 1.

    The chain's index i = 0 .. T - 1 is the reference's, at t = (i + 1) / T, where sqrt(eta) is
    s (sqrt_eta_end / s)^((i / (T - 1))^power); in between it is a monotone cubic. ``transition``, ``drift`` and
    ``diffusion`` are those of the Markov process with these marginals, which needs no data: f = -eta' / (1 - eta) and
    g^2 = kappa^2 eta' (1 + eta) / (1 - eta). The paper's own chain, dr = -eta' r_0 dt + kappa sqrt(eta') dw, is Markov
    only given the data: see :meth:`shift` and :meth:`posterior`.

    The noise must suit the residuals: kappa = 2 is for latents of unit variance; for pixels of bicubically enlarged
    images, with residuals of standard deviation 0.09, it leaves nothing to do in most steps, and 0.3 works.

    Args:
        steps: T of the chain; the paper's are 15 and 4.
        kappa: noise over the share of y that has come in.
        min_noise: the noise kappa s of index 0, for kappa >= 1; 0.04 for 15 steps and 0.2 for 4 in the paper.
        power: how much of the growth comes early; the paper's p.
        sqrt_eta_end: sqrt(eta) at t = 1 (the reference's "etas_end").
        lower_end: s = min(min_noise / kappa, min_noise) in today's "resshift", and at most sqrt(0.001) in "sinsr", the
            formula of SinSR, TAD-SR and older ResShift. They differ for 4 steps.
        sqrt_eta: sqrt(eta) of every index, increasing in (0, 1], in place of the formula: released models were trained
            with a table which their files do not tell.

    Raises:
        ValueError: an argument out of range, or a table that is not increasing or not of ``steps`` values.
    """

    def __init__(
        self,
        steps: int = 15,
        kappa: float = 2.0,
        min_noise: float = 0.04,
        power: float = 0.3,
        sqrt_eta_end: float = 0.99,
        lower_end: LowerEnd = "resshift",
        sqrt_eta: Sequence[float] | None = None,
    ) -> None:
        super().__init__(steps)
        if kappa <= 0:
            raise ValueError(f"kappa of ResidualShift must be positive, got {kappa}")
        self.kappa = kappa
        if sqrt_eta is None:
            table = _exponential(steps, kappa, min_noise, power, sqrt_eta_end, lower_end)
        else:
            table = _checked(sqrt_eta, steps)
        self._sqrt_eta = MonotoneCubic(torch.cat([torch.zeros(1, dtype=torch.float64), table]))

    @property
    def table(self) -> Tensor:
        """sqrt(eta) of the indices, (T,) float64: what a checkpoint must keep."""
        return self._sqrt_eta.values[1:]

    def sqrt_eta(self, t: Tensor) -> Tensor:
        """sqrt(eta) at time t, 0 at t = 0: a monotone cubic through the table."""
        return self._sqrt_eta(t)

    def alpha(self, t: Tensor) -> Tensor:
        """1 - eta, without cancellation near eta = 1."""
        root = self.sqrt_eta(t)
        return (1.0 - root) * (1.0 + root)

    def sigma(self, t: Tensor) -> Tensor:
        """kappa sqrt(eta)."""
        return self.kappa * self.sqrt_eta(t)

    def shift(self, x0: Tensor, x: Tensor, level: Level, target: Level) -> tuple[Tensor, Tensor]:
        """Mean (B, *) and standard deviation of r_t given r_s = ``x`` at ``level`` and the data, t = ``target`` > s.

        mean = r_s - (eta_t - eta_s) r_0, variance kappa^2 (eta_t - eta_s) (Yue et al. 2023, section 2.1).
        """
        gap = (target.sigma - level.sigma) * (target.sigma + level.sigma)
        return x - match(gap / self.kappa**2, x0) * x0, torch.sqrt(gap)

    def posterior(self, x0: Tensor, x: Tensor, level: Level, target: Level) -> tuple[Tensor, Tensor]:
        """Mean (B, *) and standard deviation of r_s given r_t = ``x`` at ``level`` and the data, s = ``target`` < t.

        mean = (eta_s / eta_t) r_t + (1 - eta_s / eta_t) r_0, variance kappa^2 eta_s (1 - eta_s / eta_t) (Yue et al.
        2023, section 2.1): Bayes' rule for :meth:`shift`, not for ``transition``; the marginals are the same.
        """
        # 1 - eta_s / eta_t without cancellation for s near t.
        lost = -torch.expm1(2.0 * (torch.log(target.sigma) - torch.log(level.sigma)))
        mean = match((target.sigma / level.sigma) ** 2, x) * x + match(lost, x0) * x0
        return mean, target.sigma * torch.sqrt(lost)


def _exponential(steps: int, kappa: float, min_noise: float, power: float, end: float, lower_end: LowerEnd) -> Tensor:
    """The formula of :class:`ResidualShift`, (T,) float64."""
    if lower_end not in ("resshift", "sinsr"):
        raise ValueError(f"lower_end of ResidualShift must be resshift or sinsr, got {lower_end!r}")
    start = min(min_noise / kappa, min_noise, *((math.sqrt(0.001),) if lower_end == "sinsr" else ()))
    if not 0 < start < end <= 1 or power <= 0:
        raise ValueError(
            f"ResidualShift needs power > 0 and 0 < min_noise / max(kappa, 1) < sqrt_eta_end <= 1, got power {power}, "
            f"min_noise {min_noise}, kappa {kappa} and sqrt_eta_end {end}"
        )
    share = torch.linspace(0.0, 1.0, steps, dtype=torch.float64) ** power
    return start * torch.exp(share * math.log(end / start))


def _checked(sqrt_eta: Sequence[float], steps: int) -> Tensor:
    """A given table, (T,) float64."""
    table = torch.tensor([float(value) for value in sqrt_eta], dtype=torch.float64)
    if len(table) != steps:
        raise ValueError(f"sqrt_eta has {len(table)} values for {steps} steps: give one for each step")
    if not (table[0] > 0 and table[-1] <= 1 and (table.diff() > 0).all()):
        raise ValueError(f"sqrt_eta must increase strictly within (0, 1], got {[round(v, 6) for v in table.tolist()]}")
    return table
