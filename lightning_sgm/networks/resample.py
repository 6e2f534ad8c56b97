"""Images of half and of twice the side: means and copies of pixels, or the filter [1, 3, 3, 1]; weights or not.

The filter (StyleGAN2's; Song et al. 2021, app. H) is a depthwise convolution here. Zeros are seen outside the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.score_blocks import convolution


class _Filter(nn.Module):
    """Holds outer([1, 3, 3, 1]) / 64, (1, 1, 4, 4), exact in bfloat16 too; no part of the state dict."""

    kernel: Tensor

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", gain / 64 * torch.outer(taps, taps)[None, None], persistent=False)

    def convolve(self, x: Tensor, stride: int, padding: int) -> Tensor:
        """Each channel with the filter."""
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, -1, -1, -1)
        return F.conv2d(x, kernel, stride=stride, padding=padding, groups=channels)


class FIRDown(_Filter):
    """Filter and keep every second pixel; sides even, any number of channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        return self.convolve(x, stride=2, padding=1)


class FIRUp(_Filter):
    """Put a zero after every pixel, then four times the filter."""

    def __init__(self) -> None:
        super().__init__(gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, -1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)


def down(fir: bool) -> nn.Module:
    """Halves the sides of (B, C, H, W): filtered, or the mean of each 2 x 2 pixels."""
    return FIRDown() if fir else nn.AvgPool2d(2)


def up(fir: bool) -> nn.Module:
    """Doubles the sides of (B, C, H, W): filtered, or each pixel four times."""
    return FIRUp() if fir else nn.Upsample(scale_factor=2, mode="nearest")


class ConvDown(nn.Module):
    """A 3 x 3 convolution that halves the sides, its weights named ``Conv_0``; zeros are added below and to the right.

    Args:
        channels: of the input.
        out: channels of the output.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.Conv_0 = convolution(channels, out, padding=0, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, H/2, W/2)."""
        return self.Conv_0(F.pad(x, (0, 1, 0, 1)))


class ConvUp(nn.Module):
    """Each pixel four times, then a 3 x 3 convolution, its weights named ``Conv_0``.

    Args:
        channels: of the input.
        out: channels of the output.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.Conv_0 = convolution(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, 2H, 2W)."""
        return self.Conv_0(F.interpolate(x, scale_factor=2, mode="nearest"))


class FIRConvDown(_Filter):
    """The filter, then a 3 x 3 convolution with stride 2, its weights named ``Conv2d_0``.

    The filter answers H + 1 pixels a side, all of which the convolution reads.

    Args:
        channels: of the input.
        out: channels of the output.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.Conv2d_0 = convolution(channels, out, padding=0, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, H/2, W/2)."""
        return self.Conv2d_0(self.convolve(x, stride=1, padding=2))


class FIRConvUp(_Filter):
    """A zero after every pixel, a 3 x 3 convolution ``Conv2d_0`` and four times the filter; the bias comes last.

    Args:
        channels: of the input.
        out: channels of the output.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(gain=4.0)
        self.Conv2d_0 = convolution(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, 2H, 2W)."""
        weight, bias = self.Conv2d_0.weight, self.Conv2d_0.bias
        assert bias is not None
        # A transposed convolution correlates with the flipped kernel.
        h = F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=2)
        return self.convolve(h, stride=1, padding=1) + bias[:, None, None]


def down_with_weights(channels: int, out: int, fir: bool) -> nn.Module:
    """Halves the sides by a convolution from ``channels`` to ``out`` channels, behind the filter or not."""
    return FIRConvDown(channels, out) if fir else ConvDown(channels, out)


def up_with_weights(channels: int, out: int, fir: bool) -> nn.Module:
    """Doubles the sides by a convolution from ``channels`` to ``out`` channels, with the filter or copies of pixels."""
    return FIRConvUp(channels, out) if fir else ConvUp(channels, out)
