"""Maximum mean discrepancies of many small one-dimensional samples at once, as a training loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sgm.metrics import binned

VARIANCES = binned.VARIANCES[:-2]
"""Of the Gaussian kernels in training; evaluation has two more."""

# Elements of the table of pairs that are worked on at once: what CPUs keep in their caches, others in their memory.
_AT_ONCE = {"cpu": 2**17}
_AT_ONCE_ELSEWHERE = 2**24
_MOST = 5.5  # larger powers of an exponential would cost digits of float32


def mmd(u: Tensor, v: Tensor, variances: Sequence[float] = VARIANCES) -> tuple[Tensor, Tensor]:
    """Squared maximum mean discrepancies of P pairs of samples, under a sum of Gaussian kernels exp(-d^2 / (2 a)).

    Only the gradient with respect to ``v`` (P, B) is kept between the passes. Each of the B (2 B - 1) distances is
    looked at once, in at least float32.

    Args:
        u: (P, B) data; gets no gradient.
        v: (P, B) estimates.
        variances: of the kernels, the a.

    Returns:
        The V-statistic (P,), at least 0 and below twice the number of kernels (Gretton et al. 2012, eq. 5), and the
        U-statistic (P,) without a gradient, whose mean is 0 for samples of one distribution (eq. 3).

    Raises:
        ValueError: shapes differ, or there are fewer than two numbers in a sample.
    """
    if u.shape != v.shape or u.ndim != 2:
        raise ValueError(f"mmd compares samples of one shape (P, B), got {tuple(u.shape)} and {tuple(v.shape)}")
    if u.shape[1] < 2:
        raise ValueError("populations need at least 2 windows: raise the batch size, and drop a smaller last batch")
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), torch.float32)
    return _Discrepancy.apply(u.to(dtype), v.to(dtype), tuple(variances))


class _Discrepancy(torch.autograd.Function):
    """:func:`mmd` over all unordered pairs of the joined samples z = (u, v), in a circle: z_i with z_{i+s}, s <= B."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, variances: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        count = u.shape[1]
        z = torch.cat([u, v], 1)
        side = torch.ones_like(z[0])
        side[:count] = -1.0
        sign = side * _ahead(side)
        sign[-1] *= 0.5  # at half the circle each pair comes twice
        rows = max(1, _AT_ONCE.get(u.device.type, _AT_ONCE_ELSEWHERE) // sign.numel())
        chunks = [_pair_sums(part, sign, variances) for part in z.split(rows)]
        signed, total, slope = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        own = 2.0 * len(variances) / count  # the diagonals, K(0) each
        biased = signed * (2.0 / count**2) + own
        # From B^2 to B (B - 1) pairs within a sample, of which total + signed are both samples' together.
        unbiased = biased - own + (total + signed) / (count**2 * (count - 1))
        ctx.save_for_backward(slope * (2.0 / count**2))
        ctx.mark_non_differentiable(unbiased)
        return biased, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, biased: Tensor, unbiased: Tensor) -> tuple[None, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return None, biased[:, None] * slope, None


def _ahead(z: Tensor) -> Tensor:
    """z_{i+s} at [..., s - 1, i] of z (..., 2 B) in a circle, for s = 1 .. B: a view, (..., B, 2 B)."""
    count = z.shape[-1] // 2
    return torch.cat([z, z[..., :count]], -1).unfold(-1, 2 * count, 1)[..., 1:, :]


def _pair_sums(z: Tensor, sign: Tensor, variances: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Over the pairs of z (R, 2 B): sums of sign K and of |sign| K (R,), and the slope of the first in v (R, B)."""
    count = z.shape[1] // 2
    distance = z[:, None] - _ahead(z)
    square = distance.square()
    kernel, pull = torch.zeros_like(square), torch.zeros_like(square)  # K(d) and -K'(d) / d
    for variance, part in _gaussians(square, variances):
        kernel += part
        pull.add_(part, alpha=1.0 / variance)
    total = (kernel * sign.abs()).sum((1, 2))
    signed = kernel.mul_(sign).sum((1, 2))
    slope = pull.mul_(distance).mul_(sign)
    # Each pair pushes both ends. Its far end i + s in v lies, in the flattened table, 2 B - 1 behind that for s - 1.
    near = slope[:, :, count:].sum(1)
    far = slope.flatten(1)[:, count - 1 :].unfold(1, count, 2 * count - 1).sum(1)
    return signed, total, far - near


def _gaussians(square: Tensor, variances: tuple[float, ...]) -> Iterator[tuple[float, Tensor]]:
    """(a, exp(-d^2 / (2 a))) of all variances a for squared distances, some as a small power of a wider one."""
    exponentials: list[tuple[float, Tensor]] = []
    for variance in sorted(variances, reverse=True):
        ratios = [(wide / variance, part) for wide, part in exponentials]
        whole = [(n, part) for n, part in ratios if n < _MOST and abs(n - round(n)) < 1e-9]
        if not whole:
            exponentials.append((variance, (square * (-0.5 / variance)).exp_()))
            whole = [(1.0, exponentials[-1][1])]
        n, part = whole[-1]
        yield variance, _power(part, round(n))


def _power(x: Tensor, exponent: int) -> Tensor:
    """x to an integer >= 1: a few products cost less than an exponential."""
    if exponent == 1:
        return x
    half = _power(x, exponent // 2).square()
    return half * x if exponent % 2 else half
