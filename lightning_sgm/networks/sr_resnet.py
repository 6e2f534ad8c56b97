"""A small residual network for super-resolution by diffusion: no downsampling, all on the grid of the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.base import Network, Spec
from lightning_sgm.networks.embed import EmbeddingKind, label_embedding
from lightning_sgm.networks.sr_grid import LowGrid


class SRResNet(Network):
    """Residual blocks at one resolution (EDSR: Lim et al. 2017, 1707.02921) that are told the noise level.

    The degraded image ``low`` is brought onto the grid of ``x`` and concatenated: as it is, enlarged if it is smaller,
    its blocks of pixels as channels if it is larger. There are no norms, which would take from the image its scale; the
    noise label scales and shifts what is between the two convolutions of each block. The last convolution is zero at
    first, so that an untrained network answers 0. Images of any size will do.

    At a codec of 48 x 16 x 16 (blocks of 4 x 4 pixels) the defaults have 1.11 million parameters and, on one core of an
    AMD EPYC, take 0.29 s forward and backward for 16 of them; group norms in the blocks made that 0.33 s.

    Args:
        spec: "shape" [C, H, W] of the model's images and "low_shape" [c, h, w] of the degraded images, whose sides are
            a whole multiple of the former's, or the reverse. Sizes may differ later, not their ratio.
        channels: of all blocks.
        blocks: residual blocks, two convolutions each.
        embedding: of the noise label: "fourier" for labels of a few units, as ln sigma, "positional" for labels that
            span tens and more, as 999 t or an index.
        fourier_scale: spread of the Fourier frequencies, in cycles per unit of the label.

    Attributes:
        multiple: sides of ``x`` must be divisible by it.
        feature_channels: channels of each tensor of :meth:`features`.

    Raises:
        ValueError: data without degraded images, images whose grids do not fit, or sizes below 1.
    """

    conditions = ("low",)
    multiple = 1

    def __init__(
        self,
        spec: Spec,
        channels: int = 72,
        blocks: int = 10,
        embedding: EmbeddingKind = "fourier",
        fourier_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if channels < 2 or channels % 2 or blocks < 1:
            raise ValueError(f"SRResNet needs even channels and blocks >= 1, got {channels} and {blocks}")
        self.low_grid = LowGrid(spec, "SRResNet")
        image_channels = self.low_grid.shape[0]
        self.embed = nn.Sequential(
            label_embedding(embedding, channels, fourier_scale), nn.Linear(channels, channels), nn.SiLU()
        )
        self.first = nn.Conv2d(image_channels + self.low_grid.channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(channels) for _ in range(blocks))
        self.last = nn.Conv2d(channels, image_channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)
        # In the first half of the blocks, which is what an encoder would be; fewer levels where there are few blocks.
        self._levels = sorted({-(-blocks * part // 6) for part in (1, 2, 3)})
        self.feature_channels = (channels,) * len(self._levels)

    def forward(self, x: Tensor, noise: Tensor, /, low: Tensor) -> Tensor:
        """Noisy images and their level beside degraded images to images.

        Args:
            x: (B, C, H, W).
            noise: (B,).
            low: (B, c, h, w), in the ratio of the spec to x.

        Returns:
            (B, C, H, W).
        """
        return self.last(self._blocks(x, noise, low, len(self.blocks))[-1])

    def features(self, x: Tensor, noise: Tensor, /, low: Tensor) -> list[Tensor]:
        """What the first blocks make of the arguments of :meth:`forward`, for discriminators.

        Returns:
            (B, F, H / 2, W / 2), rounded up, after a sixth, a third and half of the blocks: means over 2 x 2, as those
            who use them want an overview, and the U-Nets' features are of half the resolution or less.
        """
        levels = self._blocks(x, noise, low, self._levels[-1])
        return [F.avg_pool2d(levels[count - 1], 2, ceil_mode=True) for count in self._levels]

    def _blocks(self, x: Tensor, noise: Tensor, low: Tensor, count: int) -> list[Tensor]:
        """(B, F, H, W) after each of the first ``count`` blocks."""
        embedded = self.embed(noise.to(self.first.weight.dtype))
        h = torch.cat([x, self.low_grid(low, x.shape[2:]).to(x.dtype)], 1)
        # A sixth faster than the default format on the CPU, and what GPUs want for half precision.
        h = self.first(h.contiguous(memory_format=torch.channels_last))
        found = []
        for block in self.blocks[:count]:
            h = block(h, embedded)
            found.append(h)
        return found


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.film(embedded)[:, :, None, None].chunk(2, 1)
        return x + self.conv2(F.silu(torch.addcmul(shift, self.conv1(x), 1 + scale)))
