"""What a codec is, and the one that changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn


class Codec(nn.Module):
    """Base of all codecs.

    Attributes:
        factor: pixels of the data along a side of one of model space.
        of_pixels: whether values of model space are pixels, so that their range is known.
        stored: whether checkpoints must hold its weights; otherwise it finds them itself.
    """

    factor: int = 1
    of_pixels: bool = True
    stored: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def shape(self, data: Sequence[int]) -> tuple[int, ...]:
        """Shape in model space of one example of shape ``data``.

        Raises:
            ValueError: data of this shape cannot be encoded.
        """
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Data (B, *) to model space (B, *shape)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Model space to data, not clipped to their range."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)


class Identity(Codec):
    """The model works on the data themselves."""

    def shape(self, data: Sequence[int]) -> tuple[int, ...]:
        """The same."""
        return tuple(data)

    def encode(self, x: Tensor) -> Tensor:
        """The same."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """The same."""
        return z
