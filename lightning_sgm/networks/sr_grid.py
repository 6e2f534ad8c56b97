"""Degraded images on the grid of the model: what networks for super-resolution see of the condition ``low``."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.base import Spec, entry


class LowGrid(nn.Module):
    """Sides of the model's images over those of degraded ones, as the data's spec has them; sizes are free otherwise.

    Called with (B, c, h, w) and the sides (H, W) = ratio (h, w) of the model's images, it answers on the latter's grid:
    the images themselves; larger ones, bicubic, if ratio is above 1; blocks of 1/ratio x 1/ratio pixels as
    channels below. No weights.

    Args:
        spec: "shape" [C, H, W] of the model's images and "low_shape" [c, h, w] of the degraded ones are used.
        user: name of the network for messages.

    Attributes:
        ratio: H / h, a whole number or one over a whole number.
        shape: (C, H, W) of the spec.
        low_channels: c.
        channels: of the answer.

    Raises:
        ValueError: data without degraded images, or a ratio that is neither.
    """

    def __init__(self, spec: Spec, user: str) -> None:
        super().__init__()
        self.shape, low = _image(spec, "shape", user), _image(spec, "low_shape", user)
        self.user, self.ratio, self.low_channels = user, Fraction(self.shape[1], low[1]), low[0]
        if self.ratio != Fraction(self.shape[2], low[2]) or 1 not in self.ratio.as_integer_ratio():
            raise ValueError(
                f"{user} needs sides of its images that are a whole multiple of the degraded images' sides, or the "
                f"reverse, got {list(self.shape)} and {list(low)}: choose another scale of the data or another codec"
            )
        self.channels = low[0] * self.ratio.denominator**2

    def check(self, low: Tensor, sides: Sequence[int]) -> None:
        """Raise a ValueError if degraded images do not fit the model's images of these sides."""
        if low.shape[1] != self.low_channels or [side * self.ratio for side in low.shape[2:]] != list(sides):
            raise ValueError(
                f"{self.user} needs degraded images 'low' of {self.low_channels} channels and sides {list(sides)} over "
                f"{self.ratio}, as in the data's spec, got shape {list(low.shape[1:])}"
            )

    def forward(self, low: Tensor, sides: Sequence[int]) -> Tensor:
        """(B, c, h, w) to (B, channels, H, W)."""
        self.check(low, sides)
        if self.ratio > 1:
            return F.interpolate(low, size=tuple(sides), mode="bicubic", align_corners=False)
        return F.pixel_unshuffle(low, self.ratio.denominator) if self.ratio < 1 else low


def _image(spec: Spec, key: str, user: str) -> tuple[int, int, int]:
    shape = entry(spec, key, user)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{user} is for images, got {key} {list(shape)}: choose data whose {key} is [C, H, W]")
    return shape[0], shape[1], shape[2]
