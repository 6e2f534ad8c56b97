"""A wide residual network that classifies images at any noise level (Song et al. 2021, 2011.13456, appendix I.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.base import Network, Spec, entry
from lightning_sgm.networks.embed import FourierEmbedding
from lightning_sgm.networks.score_blocks import norm

_EPS = 1e-5


class WideResNet(Network):
    """Wide ResNet (Zagoruyko and Komodakis 2016) that is told the noise level: logits of K classes.

    Groups of pre-activation residual blocks with group norms of four channels or more; each group after the first
    halves the image, and the last is averaged over the image. Every block adds its own linear map of the embedded
    label. The image is normalised before everything else, so that its scale, which noise sets, does not matter.

    The defaults are the WideResNet-28-10 of the paper, 39.2 million parameters for CIFAR-10. Digits:
    ``widths=[32, 64], blocks_per_group=1`` has 0.5 million.

    Args:
        spec: of image data with classes; ``shape`` and ``classes`` are used.
        widths: channels of each group, multiples of 4 (of 32 from 128 on).
        blocks_per_group: residual blocks in each group.
        stem: channels of the first convolution, a multiple of 4.
        dropout: inside residual blocks, in training.
        frequencies: Fourier features of the label are the sine and the cosine of so many.
        fourier_scale: spread of the frequencies, in cycles per unit of the label; None for the paper's 16. Smaller is
            faster to learn from few examples.
        embedding: width of the two layers behind the Fourier features.
        mean: of the channels of clean images, taken off at the scale that they have beside the noise; None for 0.
        std: standard deviations of the channels; None for 1.

    Raises:
        ValueError: data without classes or no images, or sizes that do not fit each other.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int] = (160, 320, 640),
        blocks_per_group: int = 4,
        stem: int = 16,
        dropout: float = 0.0,
        frequencies: int = 128,
        fourier_scale: float | None = None,
        embedding: int = 512,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        shape = entry(spec, "shape", "WideResNet")
        _check(shape, int(spec.get("classes", 0)), widths, blocks_per_group, stem)
        for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = [default] * shape[0] if values is None else values
            if len(values) != shape[0]:
                raise ValueError(f"{name} of WideResNet needs a value for each of {shape[0]} channels, got {values}")
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.embed = nn.Sequential(
            FourierEmbedding(2 * frequencies, 16.0 if fourier_scale is None else fourier_scale),
            nn.Linear(2 * frequencies, embedding),
            nn.SiLU(),
            nn.Linear(embedding, embedding),
            nn.SiLU(),
        )
        self.first = nn.Conv2d(shape[0], stem, 3, padding=1)
        self.blocks, before = nn.ModuleList(), stem
        for group, width in enumerate(widths):
            for block in range(blocks_per_group):
                stride = 2 if group > 0 and block == 0 else 1
                self.blocks.append(_Block(before, width, stride, embedding, dropout))
                before = width
        self.norm = norm(before, _EPS)
        self.last = nn.Linear(before, spec["classes"])

    def forward(self, x: Tensor, noise: Tensor, /) -> Tensor:
        """Noisy images and their level to logits.

        Args:
            x: (B, C, H, W), (x_0 + r eps) / sqrt(1 + r^2).
            noise: (B,), ln r.

        Returns:
            (B, K).
        """
        embedded = self.embed(noise)
        h = self.first(self._normalise(x, noise))
        for block in self.blocks:
            h = block(h, embedded)
        return self.last(F.silu(self.norm(h)).mean((2, 3)))

    def _normalise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Channels as of clean images, then mean 0 and standard deviation 1 over each image."""
        scale = torch.rsqrt(1.0 + torch.exp(2.0 * noise)).to(x.dtype).view(-1, 1, 1, 1)
        x = (x - scale * self.mean) / self.std
        x = x - x.mean((1, 2, 3), keepdim=True)
        # No image is as flat as this; one of a single colour must not be divided by 0.
        variance = x.square().mean((1, 2, 3), keepdim=True).clamp_min(1.0 / x[0].numel())
        return x * torch.rsqrt(variance)


class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1, self.norm2 = norm(before, _EPS), norm(width, _EPS)
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shift = nn.Linear(embedding, width)
        self.shortcut = nn.Conv2d(before, width, 1, stride) if stride > 1 or before != width else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(embedded)[:, :, None, None]
        h = F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)
        return self.shortcut(x) + self.conv2(h)


def _check(shape: Sequence[int], classes: int, widths: Sequence[int], blocks: int, stem: int) -> None:
    if len(shape) != 3:
        raise ValueError(f"WideResNet classifies images, got data of shape {list(shape)}")
    if classes < 2:
        raise ValueError("WideResNet needs data with classes: set data.labels to true")
    for channels in (stem, *widths):
        if channels < 4 or channels % 4 or channels % min(channels // 4, 32):
            raise ValueError(
                f"{channels} channels of WideResNet cannot be normed in groups: give a multiple of 4, of 32 from 128 on"
            )
    if blocks < 1 or math.prod(shape) < 1 or not widths:
        raise ValueError(f"WideResNet needs widths and blocks_per_group >= 1, got {list(widths)} and {blocks}")
