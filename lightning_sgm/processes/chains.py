"""Discrete chains as Gaussian processes over their own tables: DDPM and cosine (VP), and SMLD (VE).

A chain x_0, ..., x_{N-1} of noisy states has a time for each: index i is at t = (i + 1) / N, so that t = 0 is the clean
data (the paper's sigma_{-1} = 0) and t = 1 the last state. At these times the levels are the chain's table, hence its
transition and posterior between them those of the chain; in between, log-SNR is interpolated smoothly and every method
of a process works (Song et al. 2021, 2011.13456, appendix B).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sgm.processes.gaussian import GaussianProcess, Time, as_time


class Chain(GaussianProcess):
    """Base of the discrete chains.

    Args:
        steps: N, at least 2.

    Attributes:
        steps: number of indices.
        t_min: time of index 0.
        chain_step: time between two indices.
    """

    def __init__(self, steps: int) -> None:
        _check_steps(steps, type(self).__name__)
        self.steps = steps
        self.t_min = self.chain_step = 1.0 / steps

    def time(self, index: int | Tensor) -> Tensor:
        """Times (index + 1) / N of integer indices in 0 .. N - 1, float64."""
        return (torch.as_tensor(index) + 1).to(torch.float64) / self.steps

    def index(self, t: Time) -> Tensor:
        """Float64 index in [0, N - 1] of a time: the integer itself at the chain's times, linear in between."""
        index = as_time(t) * self.steps - 1.0
        whole = index.round()
        # A time is a rounded quotient; never rely on its floor (score_sde.md, trap 8).
        return torch.where((index - whole).abs() < 1e-6, whole, index).clamp(0.0, self.steps - 1.0)

    def label(self, t: Time) -> Tensor:
        """What networks of the discrete models are told, float64: here the index."""
        return self.index(t)


class _BetaChain(Chain):
    """Base of the chains x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z, given their table.

    Args:
        betas: (N,) float64, in (0, 1).

    Attributes:
        betas: the same.
    """

    def __init__(self, betas: Tensor) -> None:
        super().__init__(len(betas))
        self.betas = betas
        # B = -ln(alpha^2) at t = 0, 1/N, ..., 1, (N + 1,).
        lost = -torch.log1p(-betas)
        self._total = MonotoneCubic(torch.cat([torch.zeros(1, dtype=torch.float64), lost.cumsum(0)]))

    def integral(self, t: Tensor) -> Tensor:
        """B(t) = -ln(alpha^2), a monotone cubic through the chain's own values."""
        return self._total(t)

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-B / 2), the square root of the product of 1 - beta."""
        return torch.exp(-0.5 * self.integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - exp(-B))."""
        return torch.sqrt(-torch.expm1(-self.integral(t)))


class DDPMChain(_BetaChain):
    """x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z, beta_i from beta_min / N to beta_max / N (Ho et al. 2020).

    The discrete form of :class:`~lightning_sgm.processes.gaussian.VP`. Network label: i, as in their code.

    Args:
        steps: N; must be larger than ``beta_max``.
        beta_min: N times the first beta.
        beta_max: N times the last.
    """

    def __init__(self, steps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        _check_steps(steps, "DDPMChain")
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min and beta_max must satisfy 0 < beta_min < beta_max, got {beta_min}, {beta_max}")
        if beta_max >= steps:
            raise ValueError(
                f"a DDPMChain of {steps} steps has beta_max / steps = {beta_max / steps:.3g}, but no step can replace "
                f"all of the signal by noise: use more than {beta_max:g} steps, or a smaller beta_max"
            )
        self.beta_min, self.beta_max = beta_min, beta_max
        super().__init__(torch.linspace(beta_min, beta_max, steps, dtype=torch.float64) / steps)


class CosineChain(_BetaChain):
    """The cosine chain: alpha^2 is f((i + 1) / N) / f(0), f(u) = cos^2(pi/2 (u + s) / (1 + s)).

    beta_i = 1 - f((i + 1) / N) / f(i / N), cut at ``beta_max`` (Nichol and Dhariwal 2021, 2102.09672, eq. 17), which
    only the last one is. The discrete form of :class:`~lightning_sgm.processes.gaussian.Cosine`. Network label: i.

    Args:
        steps: N; 250 or 500 in PaD-TS (Li et al. 2025, 2501.00910), 1000 or 4000 for images.
        offset: s >= 0.
        beta_max: largest beta, below 1.
    """

    def __init__(self, steps: int = 250, offset: float = 0.008, beta_max: float = 0.999) -> None:
        _check_steps(steps, "CosineChain")
        if offset < 0 or not 0 < beta_max < 1:
            raise ValueError(f"CosineChain needs offset >= 0 and beta_max in (0, 1), got {offset} and {beta_max}")
        self.offset, self.beta_max = offset, beta_max
        place = torch.arange(steps + 1, dtype=torch.float64) / steps
        angle = 0.5 * math.pi * (place + offset) / (1.0 + offset)
        low, high = angle[:-1], angle[1:]
        # cos^2(low) - cos^2(high) as a product: the difference would cancel.
        betas = torch.sin(high - low) * torch.sin(high + low) / torch.cos(low) ** 2
        super().__init__(betas.clamp_max(beta_max))


class SMLDChain(Chain):
    """x_i = x_{i-1} + sqrt(sigma_i^2 - sigma_{i-1}^2) z with geometric sigma_i, sigma_{-1} = 0 (Song and Ermon 2019).

    The discrete form of :class:`~lightning_sgm.processes.gaussian.VE`. Network label: N - 1 - i, so that 0 is the
    largest noise, as in their code.

    Args:
        steps: N.
        sigma_min: sigma_0; 0.01 for data of unit range, twice that for images in [-1, 1].
        sigma_max: sigma_{N-1}.
    """

    def __init__(self, steps: int = 1000, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__(steps)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}"
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def label(self, t: Time) -> Tensor:
        """N - 1 - index."""
        return self.steps - 1.0 - self.index(t)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Geometric in the index from index 0 on; before it a power of t with the same slope, 0 at t = 0."""
        growth = math.log(self.sigma_max / self.sigma_min) / (self.steps - 1)
        place = t * self.steps
        # ln(place) is place - 1 to first order around index 0.
        rise = torch.where(place < 1.0, torch.log(place.clamp_max(1.0)), place.clamp_min(1.0) - 1.0)
        return self.sigma_min * torch.exp(growth * rise)

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """The inverse of both parts."""
        growth = math.log(self.sigma_max / self.sigma_min) / (self.steps - 1)
        rise = (-0.5 * as_time(log_snr) - math.log(self.sigma_min)) / growth
        place = torch.where(rise < 0.0, torch.exp(rise.clamp_max(0.0)), rise + 1.0)
        return (place / self.steps).clamp(0.0, 1.0)


def _check_steps(steps: int, name: str) -> None:
    if steps < 2:
        raise ValueError(f"{name} needs at least 2 steps, got {steps}")


def as_chain(process: GaussianProcess, user: str) -> Chain:
    """The process itself if it is a discrete chain.

    Raises:
        ValueError: it is not; ``user`` is what needs a chain.
    """
    if not isinstance(process, Chain):
        raise ValueError(
            f"{user} needs a discrete chain, and {type(process).__name__} is none: choose DDPMChain or CosineChain "
            f"(discrete VP) or SMLDChain (the discrete VE); sub-VP has no discrete form, train it in continuous time"
        )
    return process


class MonotoneCubic:
    """A curve through N + 1 values that never fall, at t = 0, 1/N, ..., 1, smooth and never falling itself.

    Args:
        values: (N + 1,) float64, on the CPU. (Fritsch and Carlson 1980.)
    """

    def __init__(self, values: Tensor) -> None:
        self._tables = {values.device: (values, _slopes(values.diff()))}

    @property
    def values(self) -> Tensor:
        """What it goes through, on the CPU."""
        return self._tables[torch.device("cpu")][0]

    def __call__(self, t: Tensor) -> Tensor:
        """At times in [0, 1], like ``t``."""
        if t.device not in self._tables:
            values, slope = self._tables[torch.device("cpu")]
            self._tables[t.device] = (values.to(t.device), slope.to(t.device))
        values, slope = self._tables[t.device]
        cells = len(values) - 1
        place = t * cells
        cell = place.detach().long().clamp(0, cells - 1)
        u = place - cell
        rise, left, right = values[cell + 1] - values[cell], slope[cell], slope[cell + 1]
        curve = u * (left + u * (3.0 * rise - 2.0 * left - right + u * (left + right - 2.0 * rise)))
        return values[cell] + curve


def _slopes(rises: Tensor) -> Tensor:
    """Slopes (N + 1,) at the ends of N cells that rise by ``rises``, such that the cubic through them never falls."""
    inner = 0.5 * (rises[1:] + rises[:-1])
    ends = (1.5 * rises[:1] - 0.5 * rises[1:2], 1.5 * rises[-1:] - 0.5 * rises[-2:-1])
    slopes = torch.cat([ends[0], inner, ends[1]])
    limit = 3.0 * torch.minimum(torch.cat([rises[:1], rises]), torch.cat([rises, rises[-1:]]))
    return torch.minimum(slopes.clamp_min(0.0), limit)
