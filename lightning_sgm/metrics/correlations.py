"""Correlations of the dimensions of windows, the statistic behind FDDS and the population term of PaD-TS."""

from __future__ import annotations

import torch
from torch import Tensor

# Deviations of this many units in the last place of the largest value are rounding, not variation.
_ROUNDING = 4.0


def correlations(x: Tensor) -> Tensor:
    """Pearson correlations of all pairs of dimensions, window by window, at lag 0 (Li et al. 2025, section 3).

    Any positive affine change of a dimension leaves them. A dimension that is constant in a window (to rounding) has
    correlation 0 there and passes no gradient, where ``torch.corrcoef`` gives NaN. At least in float32, also under
    autocast.

    Args:
        x: (B, L, D) floats, L time steps of D dimensions.

    Returns:
        (B, D (D - 1) / 2) in [-1, 1], the pairs in the order of ``pairs``.

    Raises:
        ValueError: x has not three axes.
    """
    if x.dim() != 3:
        raise ValueError(f"correlations are those of windows (B, L, D), got the shape {tuple(x.shape)}")
    dimensions = x.shape[2]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Constants become exact zeros, and narrow dimensions far from 0 keep their digits.
    start = x[:, :1].detach()
    centred = x - start
    centred = centred - centred.mean(1, keepdim=True)
    power = centred.square().sum(1, keepdim=True)
    rounding = _ROUNDING * torch.finfo(x.dtype).eps * x.detach().abs().amax(1, keepdim=True)
    varies = power > x.shape[1] * rounding.square()
    # Guarded before the division: a mask behind it would leave 0 times infinity in the gradient.
    unit = centred * torch.where(varies, power, 1.0).rsqrt() * varies
    with torch.autocast(x.device.type, enabled=False):
        products = unit.transpose(1, 2) @ unit
    row, column = pairs(dimensions, x.device)
    return products.flatten(1).index_select(1, row * dimensions + column).clamp(-1.0, 1.0)


def pairs(dimensions: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The larger and the smaller index, (P,) int64 each, of all pairs: (1, 0), (2, 0), (2, 1), (3, 0), ..."""
    row, column = torch.tril_indices(dimensions, dimensions, -1, device=device)
    return row, column
