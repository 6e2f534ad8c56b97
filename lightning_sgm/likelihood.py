"""Exact log-likelihood by the probability-flow ODE (Song et al. 2021, 2011.13456, section 4.3 and appendix D.2).

The ODE moves density without diffusing it: the density of an example is that of its latent, times the change of volume
on the way, which is the integral of the ODE's divergence. In the coordinates of samplers/integrators.py, D dimensions,

    ln p(x) = ln p_1(x_1) + D ln(n_1 / n_min) - integral of (alpha + sigma) tr(dx_0/dx - alpha / n^2) d ln(u)

from t_min to 1: the same for every process, and finite where alpha = 0. alpha / n^2 is the Jacobian of x_0 for data of
unit variance; without it integral and probes' noise would grow with the range of noise levels.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.gaussian import GaussianProcess, Level, match
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import first
from lightning_sgm.samplers.integrators import Course, Integrator, Solver, size

Trace = Literal["rademacher", "gaussian", "exact"]
_MOST_EXACT = 1024  # dimensions for which the whole Jacobian is asked


class Likelihood:
    """ln p(x) of data under a model: ``Likelihood()(model.denoiser, x, Draw(0, keys=index))``.

    For every process, network and guided denoiser; gradients stay off. Drift and divergence come from one forward and
    one backward pass of the network. The divergence is exact, or the Skilling-Hutchinson estimate e^T J e with random e
    of unit covariance, drawn once per example: unbiased for ln p, and exact for one Rademacher probe where the Jacobian
    J is diagonal. Probes of a ``Draw`` with keys depend on the key alone. An example's value then depends on its batch
    only within the tolerance, as all share their steps.

    State these beside a number; :meth:`describe` does:

    * ``t_min``: x is taken for a state at t_min, so what is judged is the model's law with that much noise;
    * the prior: the law at t = 1 is replaced by a Gaussian. By default N(0, sigma(1)^2), as in the paper, which lacks
      what is left of the data at t = 1. With the data's mean and standard deviation this bias all but vanishes;
      :meth:`prior_bias` says how large it is;
    * probes and tolerance.

    Discrete data need dequantisation first, or ln p has no bound; :class:`~lightning_sgm.metrics.BitsPerDim` turns the
    values into bits per dimension. A model that predicts noise or the score says nothing where alpha = 0 (cosine, flow
    at t = 1) and is refused there; one that predicts v, x0 or the velocity is not.

    Args:
        trace: "rademacher" (probes of +-1) or "gaussian" probes, or "exact": as many backward passes as dimensions, at
            most 1024.
        probes: number of probes per example, each a further backward pass; their noise falls as 1 / sqrt(probes).
            Of no use with "exact".
        solver, rtol, atol: of the ODE, see :class:`~lightning_sgm.samplers.ODESampler`. The tolerances are those of
            the state and of ln p per dimension alike. The default keeps every example of a Gaussian within 5e-5
            bits/dim of the closed form; the paper's 1e-5 keeps their mean there and takes a fifth fewer evaluations.
        t_min: the data's end, in [0, 1); None for the process's own.
        data_mean: mean of the data in their own units, for the prior.
        data_std: their standard deviation, for the prior.

    Attributes:
        evaluations: network evaluations in the last call, per example, backward passes not counted.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        trace: Trace = "rademacher",
        probes: int = 1,
        solver: Solver = "dopri5",
        rtol: float = 3e-6,
        atol: float = 3e-6,
        t_min: float | None = None,
        data_mean: float = 0.0,
        data_std: float = 0.0,
    ) -> None:
        self.integrate = Integrator(solver, rtol, atol)
        if trace not in get_args(Trace):
            raise ValueError(f"trace of a Likelihood must be one of {', '.join(get_args(Trace))}, got {trace!r}")
        if probes < 1:
            raise ValueError(f"a Likelihood needs at least 1 probe, got {probes}")
        if trace == "exact" and probes > 1:
            raise ValueError(f"the exact trace takes no probes: leave out probes {probes}, or trace exact")
        if t_min is not None and not 0 <= t_min < 1:
            raise ValueError(f"t_min of a Likelihood must lie in [0, 1), got {t_min}")
        if data_std < 0:
            raise ValueError(f"data_std of a Likelihood must be at least 0, got {data_std}")
        self.trace: Trace = trace
        self.probes, self.solver, self.t_min = probes, solver, t_min
        self.data_mean, self.data_std = data_mean, data_std
        self.evaluations = 0

    @torch.no_grad()
    def __call__(self, denoiser: BaseDenoiser, x: Tensor, draw: Draw, **conditions: Tensor) -> Tensor:
        """ln p(x | conditions), (B,) float64, in nats for the density in the units of ``x``.

        Args:
            denoiser: the model, its networks in evaluation mode.
            x: (B, *) continuous data.
            draw: source of the probes; with keys, the rows of ``x``.
            conditions: passed to the denoiser.

        Raises:
            ValueError: integer data, too many dimensions for the exact trace, no answer of the model at alpha = 0.
            FloatingPointError: the model's answers are not finite or change too fast for the solver.
        """
        if not x.is_floating_point():
            raise ValueError(f"a likelihood is of continuous data, got {x.dtype}: dequantise and scale them")
        if torch.finfo(x.dtype).bits < 32:
            raise ValueError(f"a likelihood needs a model and data in float32, got {x.dtype}: set trainer.precision 32")
        course = Course(denoiser.process, self.t_min)
        noisy, clean = first(course.noisy), first(course.clean)
        _check_noise_end(denoiser, x, noisy, conditions)
        directions, count, dimensions = self._directions(x, draw), len(x), x[0].numel()
        self.evaluations = 0

        def slope(position: float, state: Tensor) -> Tensor:
            level, z = first(course.level(position)), state[:count]
            n = size(level)
            x0, trace = self.answer(denoiser, (n * z).to(x.dtype).view_as(x), level, directions, conditions)
            dz = course.slope(level, z, x0.flatten(1))
            divergence = -(level.alpha + level.sigma) * trace / dimensions
            return torch.cat([dz, divergence[:, None].expand_as(dz)])

        start = x.flatten(1).double() / size(clean)
        # The divergence in rows of its own and as long as the others, so that the solver minds it as much.
        begin = torch.cat([start, torch.zeros_like(start)])
        with torch.autocast(x.device.type, enabled=False):  # half precision would never meet the tolerance
            end = self.integrate(slope, begin, course.end, course.begin)
        volume = torch.log(size(noisy) / size(clean)) + end[count:, 0]
        return self._log_prior(size(noisy) * end[:count], noisy) + dimensions * volume

    def answer(
        self, denoiser: BaseDenoiser, x: Tensor, level: Level, directions: Tensor, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t = x], like ``x``, and tr(dx_0/dx - alpha / n^2), (B,) float64, by ``directions`` (P, B, *)."""
        x0, pull = torch.func.vjp(lambda x: denoiser.x0(x, level.t, **conditions), x)[:2]
        self.evaluations += denoiser.cost
        unit = match(level.alpha / size(level) ** 2, x)
        # Not vmap: the backward passes of attention and of resampling have no rules for it.
        traces = [
            ((pull(direction)[0] - unit * direction) * direction).flatten(1).sum(1, dtype=torch.float64)
            for direction in directions
        ]
        total = torch.stack(traces).sum(0)
        return x0, total if self.trace == "exact" else total / len(traces)

    def prior_bias(self, process: GaussianProcess, mean: float, std: float) -> float:
        """How much the prior lowers the mean of ln p, in nats per dimension: KL(p_1 || prior) >= 0.

        Exact for data of independent N(``mean``, ``std``^2) and a perfect model; for others of these moments what a
        Gaussian law would give.
        """
        level = process.level(1.0)
        center, variance = self._prior(level)
        true_variance = level.sigma**2 + (level.alpha * std) ** 2
        excess = (true_variance + (level.alpha * mean - center) ** 2) / variance - 1.0
        return float(0.5 * (excess - torch.log(true_variance / variance)))

    def describe(self, process: GaussianProcess) -> str:
        """What a number under ``process`` depends on besides model and data, in one line."""
        center, variance = self._prior(process.level(1.0))
        probes = f"{self.probes} {self.trace} {'probe' if self.probes == 1 else 'probes'}"
        how = "exact trace" if self.trace == "exact" else probes
        t_min = process.t_min if self.t_min is None else self.t_min
        return (
            f"probability-flow ODE from t = {t_min:g} by {self.solver}, rtol {self.integrate.rtol:g}, atol "
            f"{self.integrate.atol:g}, {how}, prior N({float(center):.4g}, {float(variance.sqrt()):.6g}^2)"
        )

    def _prior(self, level: Level) -> tuple[Tensor, Tensor]:
        """Mean and variance of the Gaussian that stands for the law at ``level``."""
        return level.alpha * self.data_mean, level.sigma**2 + (level.alpha * self.data_std) ** 2

    def _log_prior(self, latent: Tensor, level: Level) -> Tensor:
        """ln p_1 of latents (B, D), (B,)."""
        center, variance = self._prior(level)
        return -0.5 * ((latent - center) ** 2 / variance + torch.log(2.0 * torch.pi * variance)).sum(1)

    def _directions(self, x: Tensor, draw: Draw) -> Tensor:
        """Probes, or for the exact trace all unit vectors, (P, B, *) like ``x``."""
        if self.trace == "exact":
            dimensions = x[0].numel()
            if dimensions > _MOST_EXACT:
                raise ValueError(
                    f"the exact trace of {dimensions} dimensions takes as many backward passes per step: it is for at "
                    f"most {_MOST_EXACT}; use trace rademacher with several probes"
                )
            unit = torch.eye(dimensions, dtype=x.dtype, device=x.device)
            return unit.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
        shape = (len(x), self.probes, *x.shape[1:])
        noise = draw.normal(shape) if self.trace == "gaussian" else 2.0 * draw.integers(2, shape) - 1.0
        return noise.to(x).transpose(0, 1)


def _check_noise_end(denoiser: BaseDenoiser, x: Tensor, noisy: Level, conditions: dict[str, Tensor]) -> None:
    """Ask for one row where alpha = 0."""
    if noisy.alpha == 0:
        one = {name: value[:1] for name, value in conditions.items()}
        if not denoiser.x0(x[:1], noisy.t, **one).isfinite().all():
            raise ValueError(
                f"nothing of the data is left at t = 1 under {type(denoiser.process).__name__}, where a model of noise "
                "or the score says nothing about x_0: no likelihood; predict v, x0 or velocity"
            )
