"""The absorbing process on tokens: every token waits for its turn to become the mask and then stays it.

Each real token jumps to the mask at rate sigma(t), independently of all others (Austin et al. 2021, 2107.03006; Ou et
al. 2024, 2406.03736, section 2). With S(t) = integral of sigma, a token is masked at time t with probability
lambda(t) = 1 - exp(-S(t)); everything else follows from S and sigma. Times are in [0, 1], 0 = data, and all schedule
quantities float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sgm.processes.gaussian import Time, as_time
from lightning_sgm.random import Draw


class Schedule:
    """How fast tokens are masked: a subclass gives S(t) and its derivative sigma(t)."""

    def integral(self, t: Time) -> Tensor:
        """S(t), increasing, >= 0; float64 of the shape of ``t``."""
        raise NotImplementedError

    def rate(self, t: Time) -> Tensor:
        """sigma(t) = S'(t); float64 of the shape of ``t``."""
        raise NotImplementedError


def _check_eps(eps: float) -> float:
    if not 0 < eps < 1:
        raise ValueError(f"eps of a mask schedule must lie strictly between 0 and 1, got {eps}")
    return eps


class Loglinear(Schedule):
    """Masked share linear in time, lambda(t) = (1 - eps) t (Lou et al. 2023, 2310.16834): the default of RADD.

    Args:
        eps: share of tokens still visible at t = 1, in (0, 1).
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = _check_eps(eps)

    def integral(self, t: Time) -> Tensor:
        """-ln(1 - (1 - eps) t)."""
        return -torch.log1p(-(1.0 - self.eps) * as_time(t))

    def rate(self, t: Time) -> Tensor:
        """(1 - eps) / (1 - (1 - eps) t)."""
        return (1.0 - self.eps) / (1.0 - (1.0 - self.eps) * as_time(t))


class Geometric(Schedule):
    """S(t) = a^(1-t) b^t (Lou et al. 2023, 2310.16834). S(0) = a, so a share 1 - exp(-a) is masked even at t = 0.

    Args:
        a: S at t = 0, above 0.
        b: S at t = 1, above a. (1e-3, 1) are the reference's class defaults, (1e-4, 20) its configuration.
    """

    def __init__(self, a: float = 1e-3, b: float = 1.0) -> None:
        if not 0 < a < b < math.inf:
            raise ValueError(f"a and b of the geometric schedule must satisfy 0 < a < b, got a = {a}, b = {b}")
        self.a, self.b = a, b

    def integral(self, t: Time) -> Tensor:
        """a^(1-t) b^t."""
        return self.a * torch.exp(as_time(t) * math.log(self.b / self.a))

    def rate(self, t: Time) -> Tensor:
        """S(t) ln(b / a)."""
        return self.integral(t) * math.log(self.b / self.a)


class Cosine(Schedule):
    """Visible share eps + (1 - eps) cos(pi t / 2) (Sahoo et al. 2024, 2406.07524).

    Args:
        eps: share of tokens still visible at t = 1, in (0, 1).
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = _check_eps(eps)

    def integral(self, t: Time) -> Tensor:
        """-ln(eps + (1 - eps) cos(pi t / 2)), through 1 - cos(x) = 2 sin^2(x / 2) so that it is exact near 0."""
        masked = 2.0 * torch.sin(0.25 * math.pi * as_time(t)) ** 2
        return -torch.log1p(-(1.0 - self.eps) * masked)

    def rate(self, t: Time) -> Tensor:
        """(1 - eps) (pi / 2) sin(pi t / 2) / (visible share)."""
        angle = 0.5 * math.pi * as_time(t)
        visible = self.eps + (1.0 - self.eps) * torch.cos(angle)
        return (1.0 - self.eps) * 0.5 * math.pi * torch.sin(angle) / visible


class CosineSquared(Schedule):
    """Visible share eps + (1 - eps) cos^2(pi t / 2) (Sahoo et al. 2024, 2406.07524).

    Args:
        eps: share of tokens still visible at t = 1, in (0, 1).
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = _check_eps(eps)

    def integral(self, t: Time) -> Tensor:
        """-ln(eps + (1 - eps) cos^2(pi t / 2)), through the sine so that it is exact near 0."""
        return -torch.log1p(-(1.0 - self.eps) * torch.sin(0.5 * math.pi * as_time(t)) ** 2)

    def rate(self, t: Time) -> Tensor:
        """(1 - eps) (pi / 2) sin(pi t) / (visible share)."""
        time = as_time(t)
        visible = self.eps + (1.0 - self.eps) * torch.cos(0.5 * math.pi * time) ** 2
        return (1.0 - self.eps) * 0.5 * math.pi * torch.sin(math.pi * time) / visible


class AbsorbingProcess:
    """Tokens that turn into the mask id, position by position, under a :class:`Schedule`.

    Args:
        schedule: S(t) and sigma(t). The network never sees the time, so it may be another one in sampling.
    """

    def __init__(self, schedule: Schedule = Loglinear()) -> None:
        self.schedule = schedule

    def integral(self, t: Time) -> Tensor:
        """S(t), float64."""
        return self.schedule.integral(t)

    def rate(self, t: Time) -> Tensor:
        """sigma(t), float64."""
        return self.schedule.rate(t)

    def mask_probability(self, t: Time) -> Tensor:
        """lambda(t) = 1 - exp(-S(t)): probability that a token is masked at time t; float64."""
        return -torch.expm1(-self.integral(t))

    def reveal_rate(self, t: Time) -> Tensor:
        """sigma / (exp(S) - 1): rate at which a masked token is revealed backwards in time, and the weight of the
        t-DCE loss (Ou et al. 2024, theorem 1); float64, infinite where S = 0.
        """
        return self.rate(t) / torch.expm1(self.integral(t))

    def reveal_probability(self, t: Time, s: Time) -> Tensor:
        """Probability that a token masked at t is not masked at s <= t, (lambda_t - lambda_s) / lambda_t; float64.

        This is psi of Tweedie tau-leaping (Ou et al. 2024, appendix D), written so that it neither cancels nor
        overflows.
        """
        at_s = self.integral(s)
        return torch.exp(-at_s) * torch.expm1(at_s - self.integral(t)) / torch.expm1(-self.integral(t))

    def mask(
        self,
        x0: Tensor,
        mask_id: int,
        draw: Draw,
        probability: Tensor | None = None,
        count: Tensor | None = None,
        fixed: Tensor | None = None,
    ) -> Tensor:
        """Choose the positions to mask; ``x0.masked_fill(mask, mask_id)`` is then the noisy sequence.

        Exactly one of ``probability`` and ``count`` is given. One uniform number per position is drawn, float64.

        Args:
            x0: (B, L) int64 clean tokens. A position that holds ``mask_id`` has no clean token and is never chosen.
            mask_id: the mask, usually the vocabulary size.
            draw: source of randomness.
            probability: (B,) floating; every position of row i is chosen independently with this probability.
            count: (B,) int64; exactly this many positions of row i are chosen, all subsets alike; all free positions
                where there are fewer.
            fixed: (B, L) bool, positions never to choose (prompts, padding).

        Returns:
            (B, L) bool on the device of ``x0``.

        Raises:
            ValueError: on wrong shapes or types, or if not exactly one of ``probability`` and ``count`` is given.
        """
        _check_mask_arguments(x0, probability, count, fixed)
        kept = x0 == mask_id if fixed is None else (x0 == mask_id) | fixed
        uniform = draw.uniform(x0.shape, torch.float64).to(x0.device)
        if probability is not None:
            return (uniform < probability.to(x0.device)[:, None]) & ~kept
        assert count is not None
        # The positions in random order, the kept ones last; then the first `count` of each row.
        order = uniform.masked_fill_(kept, 2.0).argsort(dim=1)
        first = torch.arange(x0.shape[1], device=x0.device) < count.to(x0.device)[:, None]
        return torch.zeros_like(kept).scatter_(1, order, first) & ~kept


def _check_mask_arguments(x0: Tensor, probability: Tensor | None, count: Tensor | None, fixed: Tensor | None) -> None:
    if x0.ndim != 2 or x0.is_floating_point():
        raise ValueError(f"mask needs tokens of shape (B, L) and integer type, got {tuple(x0.shape)} {x0.dtype}")
    if (probability is None) == (count is None):
        raise ValueError("mask needs exactly one of probability and count")
    rows = (len(x0),)
    if probability is not None and (probability.shape != rows or not probability.is_floating_point()):
        raise ValueError(f"probability must be floating of shape {rows}, got {tuple(probability.shape)}")
    if count is not None and (count.shape != rows or count.is_floating_point()):
        raise ValueError(f"count must be integers of shape {rows}, got {tuple(count.shape)} {count.dtype}")
    if fixed is not None and (fixed.shape != x0.shape or fixed.dtype != torch.bool):
        raise ValueError(f"fixed must be bool of shape {tuple(x0.shape)}, got {tuple(fixed.shape)} {fixed.dtype}")
