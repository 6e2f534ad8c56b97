"""Residual blocks and attention of the score SDE networks, named as in the reference's checkpoints.

Sums keep the memory format of the image, so that channels-last networks stay so.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VANISHING = 1e-10
"""Variance scale of layers which are to answer nothing at first."""


def initialise(weight: Tensor, scale: float = 1.0) -> None:
    """Uniform with variance ``scale`` over the mean of inputs and outputs, in place (Song et al. 2021, app. H)."""
    nn.init.xavier_uniform_(weight, gain=math.sqrt(scale))


def linear(features: int, out: int) -> nn.Linear:
    """A linear layer, bias 0."""
    layer = nn.Linear(features, out)
    initialise(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def convolution(
    channels: int, out: int, kernel: int = 3, padding: int | None = None, stride: int = 1, scale: float = 1.0
) -> nn.Conv2d:
    """A convolution, bias 0; the sides stay if neither padding nor stride is given."""
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2 if padding is None else padding)
    initialise(layer.weight, scale)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    """Group norm with the largest number of groups up to min(channels / 4, 32) which divides the channels."""
    most = max(min(channels // 4, 32), 1)
    return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels, eps=eps)


def merge(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """Sum of a shortcut and a branch in the memory format of ``x``; over sqrt(2) if ``rescale``."""
    return (x + h) * math.sqrt(0.5) if rescale else x + h


class NIN(nn.Module):
    """A linear map of the last dimension with ``W`` (in, out), the transpose of a Linear's weight, and ``b`` (out)."""

    def __init__(self, features: int, out: int, scale: float = 0.1) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(features, out))
        self.b = nn.Parameter(torch.zeros(out))
        initialise(self.W, scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.W.t(), self.b)


class SelfAttention(nn.Module):
    """Attention with one head among all pixels of an image, and a shortcut.

    Args:
        channels: of input and output.
        rescale: divide the sum by sqrt(2).
    """

    def __init__(self, channels: int, rescale: bool = True) -> None:
        super().__init__()
        self.rescale = rescale
        self.GroupNorm_0 = norm(channels)
        self.NIN_0 = NIN(channels, channels)
        self.NIN_1 = NIN(channels, channels)
        self.NIN_2 = NIN(channels, channels)
        self.NIN_3 = NIN(channels, channels, VANISHING)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        pixels = self.GroupNorm_0(x).flatten(2).transpose(1, 2).contiguous()  # (B, HW, C)
        query, key, value = (layer(pixels)[:, None] for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        h = self.NIN_3(F.scaled_dot_product_attention(query, key, value)[:, 0])
        return merge(x, h.transpose(1, 2).unflatten(2, x.shape[2:]), self.rescale)


class ResidualBlock(nn.Module):
    """Two normed 3 x 3 convolutions with the embedded noise label added in between, and a shortcut.

    Args:
        channels: of the input.
        out: channels of the output.
        embedded: features of the embedded label.
        dropout: before the second convolution, in training.
        rescale: divide the sum by sqrt(2).
        resample: changes the sides, without weights, of the shortcut and of what the first convolution reads.
        nin: where the channels change, the shortcut is a ``NIN_0``, as in DDPM's blocks, not a ``Conv_2``, as in
            BigGAN's.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        embedded: int,
        dropout: float,
        rescale: bool = True,
        resample: nn.Module | None = None,
        nin: bool = False,
    ) -> None:
        super().__init__()
        self.dropout, self.rescale = dropout, rescale
        self.resample = resample
        self.GroupNorm_0 = norm(channels)
        self.Conv_0 = convolution(channels, out)
        self.Dense_0 = linear(embedded, out)
        self.GroupNorm_1 = norm(out)
        self.Conv_1 = convolution(out, out, scale=VANISHING)
        mapped = channels != out or resample is not None
        self.Conv_2 = convolution(channels, out, kernel=1) if mapped and not nin else None
        self.NIN_0 = NIN(channels, out) if mapped and nin else None

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Images (B, C, H, W) and embedded labels (B, F), already behind their nonlinearity, to (B, out, H', W')."""
        h = F.silu(self.GroupNorm_0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.Conv_0(h) + self.Dense_0(embedded)[:, :, None, None]
        h = F.silu(self.GroupNorm_1(h))
        h = self.Conv_1(F.dropout(h, self.dropout, self.training))
        if self.Conv_2 is not None:
            x = self.Conv_2(x)
        elif self.NIN_0 is not None:
            x = self.NIN_0(x.movedim(1, -1)).movedim(-1, 1)
        return merge(h, x, self.rescale)
