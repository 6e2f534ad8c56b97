"""Exact log-likelihood by the probability-flow ODE (Song et al. 2021, section 4.3 and appendix D.2), in bits.

The ODE moves density without diffusing it, so the density of an example is that of its latent times a volume. With the
coordinates of samplers/integrators.py all that depends on the model is one integral along the way of x from t_min:

    ln p(x) = ln p_1(x_1) + D ln(sigma_1 / sigma_min) - integral of (alpha + sigma) tr(dx_0/dx) d ln(u),

whose second term stays finite, and exact, for every process: the noise's own volume never has to be solved for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.gaussian import Level
from lightning_sgm.random import Draw
from lightning_sgm.samplers.integrators import Course, Integrator, Solver, size

Probe = Literal["rademacher", "gaussian"]


class Likelihood:
    def __init__(
        self,
        probes: int = 1,
        probe: Probe = "rademacher",
        exact: bool = False,
        solver: Solver = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        t_min: float | None = None,
        data_mean: float = 0.0,
        data_std: float | None = None,
        every: int = 1,
    ) -> None:
        self.integrate = Integrator(solver, rtol, atol)
        self.probes, self.probe, self.exact = probes, probe, exact
        self.t_min = t_min
        self.data_mean, self.data_std, self.every = data_mean, data_std, every
        self.evaluations = 0

    @torch.no_grad()
    def __call__(self, denoiser: BaseDenoiser, x: Tensor, draw: Draw, **conditions: Tensor) -> Tensor:
        course = Course(denoiser.process, self.t_min)
        noisy, clean = course.noisy, course.clean
        probes = self._probes(x, draw)
        count = x[0].numel()
        self.evaluations = 0

        def slope(position: float, flat: Tensor) -> Tensor:
            level = course.level(position)
            z = flat[:, :-1]
            n = size(level)
            state = (n * z).to(x.dtype).view_as(x)
            x0, vjp = torch.func.vjp(lambda y: denoiser.x0(y, level.t, **conditions), state)
            self.evaluations += denoiser.cost
            trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            for probe in probes:
                trace += (vjp(probe)[0] * probe).flatten(1).sum(1, dtype=torch.float64)
            if not self.exact:
                trace = trace / len(probes)
            dz = course.slope(level, z, x0.flatten(1))
            return torch.cat([dz, ((level.alpha + level.sigma) * trace / count)[:, None]], 1)

        start = torch.cat([x.flatten(1).double() / size(clean), torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)], 1)
        end = self.integrate(slope, start, course.end, course.begin)
        latent = size(noisy) * end[:, :-1]
        return self._prior(latent, noisy) + count * (torch.log(noisy.sigma / clean.sigma) - end[:, -1])

    def _prior(self, latent, level):
        mean, var = 0.0, level.sigma**2
        if self.data_std is not None:
            mean, var = level.alpha*self.data_mean, level.sigma**2 + (level.alpha*self.data_std)**2
        return -0.5 * ((latent - mean) ** 2 / var + torch.log(2 * torch.pi * var)).sum(1)

    def _probes(self, x: Tensor, draw: Draw) -> list[Tensor]:
        if self.exact:
            return [e.expand(x.shape) for e in torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, 1, *x.shape[1:])]
        shape = (len(x), self.probes, *x.shape[1:])
        noise = draw.integers(2, shape)*2.0-1 if self.probe == "rademacher" else draw.normal(shape)
        return list(noise.to(x).unbind(1))
