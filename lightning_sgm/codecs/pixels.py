"""Images as grids of squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lightning_sgm.codecs.base import Codec


class PixelUnshuffle(Codec):
    """Squares of pixels become channels, without any loss (Shi et al. 2016, 1609.05158).

    With the factor of super-resolution the model works on the grid of the low-resolution image, at a tenth of the cost.

    Args:
        factor: side of the squares.
    """

    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor of PixelUnshuffle must be at least 1, got {factor}")
        self.factor = factor

    def shape(self, data: Sequence[int]) -> tuple[int, ...]:
        """(C, H, W) to (C factor^2, H / factor, W / factor)."""
        channels, height, width = divided(data, self.factor, "PixelUnshuffle")
        return channels * self.factor**2, height, width

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, C factor^2, H / factor, W / factor)."""
        self.shape(x.shape[1:])
        return F.pixel_unshuffle(x, self.factor)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse."""
        return F.pixel_shuffle(z, self.factor)


def divided(data: Sequence[int], factor: int, user: str) -> tuple[int, int, int]:
    """(C, H / factor, W / factor) of images (C, H, W)."""
    if len(data) != 3:
        raise ValueError(f"{user} is for images (C, H, W), got data of shape {list(data)}: choose Identity")
    channels, height, width = data
    if height % factor or width % factor:
        raise ValueError(f"{user} needs image sides divisible by {factor}, got {height} x {width}: pad or crop them")
    return channels, height // factor, width // factor
