"""Discriminators on features: heads that tell real images from made ones by what a network's encoder makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_sgm.networks.embed import SinusoidalEmbedding
from lightning_sgm.networks.score_blocks import norm

_KERNEL = 9


class TimeAwareHeads(nn.Module):
    """One head for each level of features of noisy images, all told the noise level (TAD-SR, 2408.07476).

    A level is normed, scaled and shifted as the noise level wants it, and convolved by weights that are zero at first;
    its pixels then pass as one sequence through three convolutions with spectral norms, as in StyleGAN-T (Sauer et al.
    2023). So an untrained discriminator says the same of all images, and its gradient at the features is 0.

    What it says is 0: the last biases start so. The reference's start at random, which puts a few of a hundred logits
    outside the margin of the hinge loss, where they learn from one side only.

    Args:
        channels: of each level, as a network's ``feature_channels`` has them.
        hidden: logits of each pixel.
        embed: even number of sines and cosines that tell the noise level.

    Raises:
        ValueError: no levels, or sizes below 1.
    """

    def __init__(self, channels: Sequence[int], hidden: int = 64, embed: int = 160) -> None:
        super().__init__()
        if not channels or min(*channels, hidden) < 1:
            raise ValueError(
                f"TimeAwareHeads needs a positive number of channels for each level of features and hidden >= 1, "
                f"got {list(channels)} and {hidden}"
            )
        self.channels = tuple(channels)
        self.embed = nn.Sequential(SinusoidalEmbedding(embed), nn.SiLU())
        self.heads = nn.ModuleList(_Head(count, hidden, embed) for count in channels)

    def forward(self, features: Sequence[Tensor], label: Tensor) -> Tensor:
        """Logits, high for real images.

        Args:
            features: (B, C_i, H_i, W_i) for each level i.
            label: (B,) float, the index of the noise level, or another label that spans as much.

        Returns:
            (B, K), K = hidden times the pixels of all levels: of each level those of its first logit first.

        Raises:
            ValueError: features of other levels than the heads are for.
        """
        if (given := tuple(level.shape[1] for level in features)) != self.channels:
            raise ValueError(
                f"these TimeAwareHeads are for features of {list(self.channels)} channels, got {list(given)}: make "
                f"them from the feature_channels of the network that gives the features"
            )
        embedded = self.embed(label.to(torch.promote_types(features[0].dtype, torch.float32)))
        return torch.cat([head(level, embedded) for head, level in zip(self.heads, features, strict=True)], 1)


class _Head(nn.Module):
    def __init__(self, channels: int, hidden: int, embed: int) -> None:
        super().__init__()
        self.norm, self.film = norm(channels, eps=1e-5), nn.Linear(embed, 2 * channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(cast(Tensor, self.conv.bias))
        groups = math.gcd(channels, 4)
        self.first, self.first_norm = _convolution(channels, channels, 1), nn.GroupNorm(groups, channels)
        self.second, self.second_norm = _convolution(channels, channels, _KERNEL), nn.GroupNorm(groups, channels)
        self.last = _convolution(channels, hidden, 1)
        self._centre()

    def forward(self, level: Tensor, embedded: Tensor) -> Tensor:
        """(B, C, H, W) and (B, E) to (B, hidden H W)."""
        scale, shift = self.film(embedded)[:, :, None, None].chunk(2, 1)
        # Channels in front: the backward pass of torch 2.13 crashes on the CPU where they are the last in memory.
        level = level.contiguous()
        h = self.conv(F.silu(torch.addcmul(shift, self.norm(level), 1 + scale)))
        return self._logits(h.flatten(2)).flatten(1)

    def _logits(self, h: Tensor) -> Tensor:
        """(B, C, L) to (B, hidden, L), the sequence being a ring."""
        length = h.shape[2]
        # Rings shorter than the padding go around more than once, which changes neither convolutions nor norms.
        h = h.repeat(1, 1, -(-(_KERNEL // 2) // length))
        h = F.leaky_relu(self.first_norm(self.first(h)), 0.2)
        h = (h + F.leaky_relu(self.second_norm(self.second(h)), 0.2)) * math.sqrt(0.5)
        return self.last(h)[:, :, :length]

    @torch.no_grad()
    def _centre(self) -> None:
        """Let the last bias take off what the head says of zeros, which is all it sees at first."""
        cast(Tensor, self.last.bias).sub_(self._logits(torch.zeros(1, self.conv.out_channels, _KERNEL))[0, :, 0])


def _convolution(channels: int, out: int, kernel: int) -> nn.Conv1d:
    layer = nn.Conv1d(channels, out, kernel, padding=kernel // 2, padding_mode="circular")
    return cast(nn.Conv1d, spectral_norm(layer))
