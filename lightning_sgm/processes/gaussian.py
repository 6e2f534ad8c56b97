"""Gaussian processes: x_t = alpha(t) x_0 + sigma(t) eps, with t in [0, 1] from data to noise.

A process is two functions; drift, diffusion, signal-to-noise ratio, transition and posterior of the Markov process
with these marginals are derived once (Song et al. 2021, 2011.13456; Kingma et al. 2021, 2107.00630). All schedule
quantities are float64, whatever the precision of the network, and use expm1/log1p where 1 - exp(-B) would cancel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sgm.random import Draw

Time = float | Tensor


class Level(NamedTuple):
    """What a process makes of a time: ``t``, ``alpha``, ``sigma``, each float64 of shape () or (B,)."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def ratio(self) -> Tensor:
        """sigma / alpha, the noise level in the coordinate y = x / alpha."""
        return self.sigma / self.alpha


CLEAN = Level(*(torch.tensor(v, dtype=torch.float64) for v in (0.0, 1.0, 0.0)))
"""The end of a sampling grid: no noise at all, which no schedule with sigma(0) > 0 reaches by itself."""


def as_time(t: Time, device: torch.device | None = None) -> Tensor:
    """Times as a float64 tensor."""
    return torch.as_tensor(t, dtype=torch.float64, device=device)


def match(value: Tensor, x: Tensor) -> Tensor:
    """``value`` of shape () or (B,) made ready to multiply ``x`` of shape (B, *): same dtype, trailing ones."""
    value = value.to(x.device, x.dtype)
    return value.reshape(-1, *(1,) * (x.ndim - 1)) if value.ndim else value


class GaussianProcess:
    """Base of all processes with marginals N(alpha(t) x_0, sigma(t)^2 I).

    A subclass gives :meth:`alpha` and :meth:`sigma` as smooth functions of a float64 tensor in [0, 1], alpha
    decreasing or constant and sigma / alpha strictly increasing; it may give :meth:`t_from_log_snr` in closed form.

    Attributes:
        t_min: smallest time at which training and sampling look (the eps of Song et al. 2021, appendix C).
        chain_step: time of one step of the discrete chain that the process stands for, 1 / 1000 in that paper.
    """

    t_min: float = 1e-5
    chain_step: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time t (float64, any shape)."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t (float64, any shape)."""
        raise NotImplementedError

    def level(self, t: Time, device: torch.device | None = None) -> Level:
        """(t, alpha, sigma) at a time or several."""
        time = as_time(t, device)
        return Level(time, self.alpha(time), self.sigma(time))

    def log_snr(self, t: Time) -> Tensor:
        """ln(alpha^2 / sigma^2), decreasing in t."""
        level = self.level(t)
        return 2.0 * (torch.log(level.alpha) - torch.log(level.sigma))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """Inverse of :meth:`log_snr` on [0, 1], by bisection to the last bit of float64; clamped to [0, 1] outside."""
        target = as_time(log_snr)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(64):
            middle = 0.5 * (low + high)
            too_clean = self.log_snr(middle) > target
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        return 0.5 * (low + high)

    def t_from_ratio(self, ratio: Time) -> Tensor:
        """Time at which sigma / alpha equals ``ratio``."""
        return self.t_from_log_snr(-2.0 * torch.log(as_time(ratio)))

    def derivatives(self, t: Time) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt), by forward-mode differentiation: valid in every grad mode.

        Infinite, or not a number, at t = 0 where sigma grows as sqrt(t) from 0 (VP, cosine): stay above ``t_min``.
        """
        time = as_time(t).contiguous()  # forward mode refuses one time expanded over a batch
        return torch.func.jvp(lambda u: (self.alpha(u), self.sigma(u)), (time,), (torch.ones_like(time),))[1]

    def drift(self, t: Time) -> Tensor:
        """f(t) of dx = f(t) x dt + g(t) dw: d ln(alpha) / dt; infinite where alpha = 0."""
        level = self.level(t)
        return self.derivatives(level.t)[0] / level.alpha

    def diffusion(self, t: Time) -> Tensor:
        """g(t): g^2 = d sigma^2 / dt - 2 f sigma^2; infinite where alpha = 0, and see :meth:`derivatives` for t = 0."""
        level = self.level(t)
        d_alpha, d_sigma = self.derivatives(level.t)
        squared = 2.0 * level.sigma * (d_sigma - d_alpha / level.alpha * level.sigma)
        return torch.sqrt(squared.clamp_min(0.0))

    def perturb(self, x0: Tensor, level: Level, noise: Tensor) -> Tensor:
        """x_t of shape (B, *) for data and standard normal noise of that shape."""
        return match(level.alpha, x0) * x0 + match(level.sigma, x0) * noise

    def prior(self, shape: tuple[int, ...], draw: Draw) -> Tensor:
        """Start noise N(0, sigma(1)^2 I) of ``shape``, float32."""
        noise = draw.normal(shape)
        return match(self.sigma(as_time(1.0)), noise) * noise

    def transition(self, s: Level, t: Level) -> tuple[Tensor, Tensor]:
        """(scale, std) of x_t given x_s for s < t: x_t = scale x_s + std eps."""
        return t.alpha / s.alpha, t.sigma * torch.sqrt(self._lost(s, t))

    def posterior(self, x0: Tensor, x: Tensor, level: Level, target: Level) -> tuple[Tensor, Tensor]:
        """Mean (B, *) and standard deviation of x_s given x_t = ``x`` at ``level`` and the data, s = ``target`` < t.

        mean = alpha_ts sigma_s^2 / sigma_t^2 x_t + alpha_s (1 - snr_t / snr_s) x_0, variance
        sigma_s^2 (1 - snr_t / snr_s) (Kingma et al. 2021, appendix A.2).
        """
        lost = self._lost(target, level)
        from_x = level.alpha / target.alpha * (target.sigma / level.sigma) ** 2
        mean = match(from_x, x) * x + match(target.alpha * lost, x0) * x0
        return mean, target.sigma * torch.sqrt(lost)

    @staticmethod
    def _lost(s: Level, t: Level) -> Tensor:
        """1 - snr_t / snr_s, the share of information lost from s to t, without cancellation for s near t."""
        log_ratio = torch.log(t.alpha) - torch.log(s.alpha) + torch.log(s.sigma) - torch.log(t.sigma)
        return -torch.expm1(2.0 * log_ratio)


class _LinearBeta(GaussianProcess):
    """The linear beta(t) = beta_min + t (beta_max - beta_min) that VP and sub-VP share."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min and beta_max must satisfy 0 < beta_min < beta_max, got {beta_min}, {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def integral(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta from 0 to t."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-B / 2)."""
        return torch.exp(-0.5 * self.integral(t))

    def _t_from_integral(self, integral: Tensor) -> Tensor:
        # The root in its cancellation-free form: 2 B / (b + sqrt(b^2 + 2 (b1 - b0) B)).
        spread = self.beta_max - self.beta_min
        integral = integral.clamp_max(0.5 * (self.beta_min + self.beta_max))
        t = 2.0 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2.0 * spread * integral))
        return t.clamp_max(1.0)


class VP(_LinearBeta):
    """Variance preserving SDE dx = -beta x / 2 dt + sqrt(beta) dw (Song et al. 2021, eq. 11)."""

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - exp(-B))."""
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """B = ln(1 + sigma^2 / alpha^2)."""
        return self._t_from_integral(torch.nn.functional.softplus(-as_time(log_snr), threshold=700.0))


class SubVP(_LinearBeta):
    """Sub-variance-preserving SDE, g^2 = beta (1 - exp(-2 B)) (Song et al. 2021, eq. 12)."""

    def sigma(self, t: Tensor) -> Tensor:
        """1 - exp(-B)."""
        return -torch.expm1(-self.integral(t))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """sigma / alpha = 2 sinh(B / 2)."""
        return self._t_from_integral(2.0 * torch.asinh(0.5 * torch.exp(-0.5 * as_time(log_snr))))


class VE(GaussianProcess):
    """Variance exploding SDE, sigma geometric in t (Song et al. 2021, eq. 9, as in their code: sigma(0) = sigma_min).

    Args:
        sigma_min: noise at t = 0; 0.01 for data of unit range, twice that for images in [-1, 1].
        sigma_max: noise at t = 1; the largest distance between two training examples (their Technique 1).
    """

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}"
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """ln(sigma / sigma_min) / ln(sigma_max / sigma_min)."""
        spread = math.log(self.sigma_max / self.sigma_min)
        return ((-0.5 * as_time(log_snr) - math.log(self.sigma_min)) / spread).clamp(0.0, 1.0)


class EDM(GaussianProcess):
    """alpha = 1 and the power-law noise levels of Karras et al. 2022 (2206.00364, eq. 5): uniform t is their grid."""

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max or rho <= 0:
            raise ValueError(
                f"EDM needs 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max} and rho {rho}"
            )
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """(sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + t * (high - low)) ** self.rho

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """Root of the power law."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((torch.exp(-0.5 * as_time(log_snr) / self.rho) - low) / (high - low)).clamp(0.0, 1.0)


class Cosine(GaussianProcess):
    """Variance preserving, alpha = cos(u) / cos(u_0), u = pi/2 (t + s) / (1 + s) (Nichol and Dhariwal 2021, eq. 17).

    Args:
        offset: s >= 0; 0.008 in the paper, 0 gives alpha = cos(pi t / 2).
    """

    def __init__(self, offset: float = 0.008) -> None:
        if offset < 0:
            raise ValueError(f"offset of the cosine schedule must be at least 0, got {offset}")
        self.offset = offset

    def _angle(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * (t + self.offset) / (1.0 + self.offset)

    @property
    def _start(self) -> float:
        return 0.5 * math.pi * self.offset / (1.0 + self.offset)

    def alpha(self, t: Tensor) -> Tensor:
        """cos(u) / cos(u_0), through the sine of the complement: exactly 0 at t = 1."""
        return torch.sin(0.5 * math.pi * (1.0 - t) / (1.0 + self.offset)) / math.cos(self._start)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(sin(u - u_0) sin(u + u_0)) / cos(u_0), which equals sqrt(1 - alpha^2)."""
        u, start = self._angle(t), self._start
        step = 0.5 * math.pi * t / (1.0 + self.offset)
        return torch.sqrt(torch.sin(step) * torch.sin(u + start)) / math.cos(start)

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """u from tan(u), both legs known without cancellation."""
        target = as_time(log_snr)
        alpha2, sigma2 = torch.sigmoid(target), torch.sigmoid(-target)
        cos2, sin2 = math.cos(self._start) ** 2, math.sin(self._start) ** 2
        # u - u_0 = atan2 of sin(u - u_0), with sin^2(u) = sin^2(u_0) + sigma^2 cos^2(u_0).
        sin_u, cos_u = torch.sqrt(sin2 + sigma2 * cos2), torch.sqrt(alpha2 * cos2)
        # sin(u) cos(u_0) - cos(u) sin(u_0), rationalised so that it does not cancel near u_0.
        root = sin_u * math.sqrt(cos2) + cos_u * math.sqrt(sin2)
        sine = sigma2 * cos2 / root if self.offset else sin_u
        cosine = cos_u * math.sqrt(cos2) + sin_u * math.sqrt(sin2)
        return torch.atan2(sine, cosine) * 2.0 / math.pi * (1.0 + self.offset)


class Flow(GaussianProcess):
    """Straight path x_t = (1 - t) x_0 + t eps of flow matching (Lipman et al. 2023, 2210.02747)."""

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t.clone()

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """Logistic function of -log_snr / 2."""
        return torch.sigmoid(-0.5 * as_time(log_snr))
