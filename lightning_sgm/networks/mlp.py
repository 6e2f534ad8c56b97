"""A small residual network on flattened data, for vectors, tests and tutorials."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.base import Network, Spec, entry
from lightning_sgm.networks.embed import EmbeddingKind, label_embedding


class MLP(Network):
    """Residual multilayer perceptron on the flattened example; its answer is 0 at first.

    Args:
        spec: of any data with a ``shape``.
        width: hidden features; even.
        depth: residual blocks, each of a norm, the noise label's shift and two linear layers.
        embedding: of the noise label, see :func:`~lightning_sgm.networks.embed.label_embedding`.
        fourier_scale: spread of the Fourier frequencies, in cycles per unit of the label.
    """

    def __init__(
        self,
        spec: Spec,
        width: int = 128,
        depth: int = 3,
        embedding: EmbeddingKind = "positional",
        fourier_scale: float = 1.0,
    ) -> None:
        super().__init__()
        size = math.prod(entry(spec, "shape", "MLP"))
        self.embed = nn.Sequential(label_embedding(embedding, width, fourier_scale), nn.Linear(width, width), nn.SiLU())
        self.first = nn.Linear(size, width)
        self.blocks = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.last = nn.Linear(width, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, noise: Tensor, /) -> Tensor:
        """Examples (B, *) and noise labels (B,) to a tensor of the shape of ``x``."""
        embedded = self.embed(noise)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedded)
        return self.last(F.silu(h)).view_as(x)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.shift = nn.Linear(width, width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        return h + self.outer(F.silu(self.inner(self.norm(h) + self.shift(embedded))))
