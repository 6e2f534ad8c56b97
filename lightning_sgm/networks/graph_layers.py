"""Layers of GDSS's score networks (Jo et al. 2022, 2202.02514) on blocks of graphs, all channels at once.

In a block of b graphs of n nodes, of p = n (n - 1) / 2 pairs each, node features are (b, n, F); edge channels are
(C, b p), one number per pair i < j, as everything about edges is symmetric; normalised adjacency is (C, b, n, n).

What depends on weights only (products of linear maps that follow each other, constant factors) is made once per
evaluation by ``prepare`` and used in all blocks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.graph_groups import Block, fold, spread

Convolution = Literal["gcn", "mlp"]
Affine = tuple[Tensor, Tensor]
_SMALL = 8192  # numbers from which a few fast passes beat one slow one


class AttentionWeights(NamedTuple):
    """Prepared weights of an :class:`AttentionLayer` of C channels.

    Attributes:
        scores: of queries and keys, (C, in, out) and (C, 1, out) each; empty where no edges are wanted.
        edges: of the edges' MLP, (out, in) and (out, 1) each.
        values: (C, in, hidden), values and first linear map of the nodes' MLP in one, and (hidden,); None where no
            nodes are wanted.
    """

    scores: list[Affine]
    edges: list[Affine]
    values: Affine | None


class Linears(nn.Module):
    """``count`` linear maps with ELU between them, of widths first, hidden, ..., hidden, last."""

    def __init__(self, first: int, hidden: int, last: int, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"an MLP needs at least one linear layer, got {count}")
        widths = [first, *[hidden] * (count - 1), last]
        self.linears = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])

    @property
    def maps(self) -> list[nn.Linear]:
        """The linear maps."""
        return cast("list[nn.Linear]", list(self.linears))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """(..., first) to (..., last); ``shift``, if any, is added to what the first map returns."""
        for i, linear in enumerate(self.maps):
            x = linear(elu(x) if i else x)
            x = x if i or shift is None else x + shift
        return x

    def prepare(self, factor: float = 1.0) -> list[Affine]:
        """Weights (out, in) and biases (out, 1) for :func:`edgewise`, whose answers are multiplied by ``factor``."""
        found = [(linear.weight, linear.bias[:, None]) for linear in self.maps]
        weight, bias = found[-1]
        return [*found[:-1], (factor * weight, factor * bias)]


def edgewise(linears: list[Affine], x: Tensor, shift: Tensor | None = None) -> Tensor:
    """:class:`Linears` of edge channels, (first, b p) to (last, b p); ``shift`` is (b, out of the first map)."""
    for i, (weight, bias) in enumerate(linears):
        x = torch.addmm(bias, weight, elu(x) if i else x)
        if i == 0 and shift is not None:
            x = x + shift.T.repeat_interleave(x.shape[1] // len(shift), 1)
    return x


class GraphConvolution(nn.Module):
    """The graph convolution of Kipf & Welling (1609.02907): weight (in, out), Glorot's uniform, and a zero bias."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(first, last))
        self.bias = nn.Parameter(torch.zeros(last))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, normalised: Tensor) -> Tensor:
        """(b, n, in) and (b, n, n) to (b, n, out)."""
        return torch.baddbmm(self.bias, normalised, x @ self.weight)


class ChannelMaps(nn.Module):
    """One affine map per channel: weight (C, in, out), bias (C, out).

    Args:
        channels: C.
        first: in.
        last: out.
        parts: how many maps lie beside each other in ``out``.
        glorot: Glorot's uniform distribution of each part and a zero bias; else as in ``nn.Linear``.
    """

    def __init__(self, channels: int, first: int, last: int, parts: int = 1, glorot: bool = True) -> None:
        super().__init__()
        bound = math.sqrt(6 / (first + last // parts)) if glorot else first**-0.5
        self.weight = nn.Parameter(torch.empty(channels, first, last).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels, last))
        if not glorot:
            nn.init.uniform_(self.bias, -bound, bound)


class AttentionLayer(nn.Module):
    """Graph multi-head attention on C channels of edges (Baek et al. 2021, 2102.11533), as GDSS uses it.

    Attention maps are means over heads of tanh(q k / sqrt(nodes_out)) and, with the channels, become the new channels;
    they weight no values. Values are plain graph convolutions and become the new node features.

    Args:
        nodes_in: node features.
        attention: width of queries and keys, divisible by ``heads``.
        nodes_out: node features afterwards.
        channels_in: C.
        channels_out: edge channels afterwards.
        linears: of the edges' MLP.
        heads: of the attention.
        conv: how queries and keys are made: by graph convolutions, or by MLPs that see no edges.
        nodes: whether new nodes are wanted; without, no parameters for them exist.
        edges: whether new edges are wanted; likewise.
        time_width: features of an embedded time that shifts the nodes before their tanh; 0 for none.
    """

    def __init__(
        self,
        nodes_in: int,
        attention: int,
        nodes_out: int,
        channels_in: int,
        channels_out: int,
        linears: int,
        heads: int,
        conv: Convolution,
        nodes: bool = True,
        edges: bool = True,
        time_width: int = 0,
    ) -> None:
        super().__init__()
        if attention % heads:
            raise ValueError(f"an attention of width {attention} cannot be split into {heads} heads")
        if conv not in ("gcn", "mlp"):
            raise ValueError(f"attention_conv is 'gcn' or 'mlp', got {conv!r}")
        self.channels, self.heads, self.conv, self.scale = channels_in, heads, conv, nodes_out**-0.5
        hidden = 2 * max(channels_in, channels_out)
        self.scores = nn.ModuleList()
        if edges and conv == "gcn":
            self.scores.append(ChannelMaps(channels_in, nodes_in, 2 * attention, parts=2))
        elif edges:
            # Queries of all channels, then keys.
            self.scores.append(ChannelMaps(2 * channels_in, nodes_in, 2 * attention, glorot=False))
            self.scores.append(ChannelMaps(2 * channels_in, 2 * attention, attention, glorot=False))
        self.edges = Linears(2 * channels_in, hidden, channels_out, linears) if edges else None
        self.values = ChannelMaps(channels_in, nodes_in, nodes_out) if nodes else None
        self.nodes = Linears(channels_in * nodes_out, hidden, nodes_out, 2) if nodes else None
        self.time = zero_linear(time_width, nodes_out) if nodes and time_width else None

    def prepare(self) -> AttentionWeights:
        """The layer's weights as :meth:`forward` wants them."""
        found = cast("list[ChannelMaps]", list(self.scores))
        scores: list[Affine] = [(maps.weight, maps.bias[:, None]) for maps in found]
        edges: list[Affine] = []
        if self.edges is not None:
            weight, bias = scores[-1]
            scores[-1] = self.scale**0.5 * weight, self.scale**0.5 * bias  # queries and keys alike
            # The sum with the transpose is twice one of the two; maps come as sums over heads and both directions.
            edges = self.edges.prepare(2.0)
            maps, channels = edges[0][0].chunk(2, 1)
            edges[0] = torch.cat([0.5 / self.heads * maps, channels], 1), edges[0][1]
        return AttentionWeights(scores, edges, self._values())

    def _values(self) -> Affine | None:
        if self.values is None or self.nodes is None:
            return None
        first = self.nodes.maps[0]
        per_channel = first.weight.unflatten(1, (self.channels, -1)).permute(1, 2, 0)  # (C, out, hidden)
        bias = first.bias + first.weight @ self.values.bias.flatten()
        return self.values.weight @ per_channel, bias

    def forward(
        self,
        weights: AttentionWeights,
        x: Tensor,
        edges: Tensor,
        normalised: Tensor | None,
        block: Block,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New nodes and edges; those that are not wanted are the old ones.

        Args:
            weights: from :meth:`prepare`.
            x: (b, n, nodes_in).
            edges: (C, b p), zero where the block has no pair.
            normalised: (C, b, n, n), see :func:`normalise`, if it has been made already.
            block: of the graphs.
            embedded: (b, time_width).
        """
        channels, graphs, size = len(edges), block.graphs, block.size
        if normalised is None:
            normalised = normalise(edges, block)
        copies = x.expand(channels, -1, -1, -1).reshape(channels * graphs, size, -1)
        gathered = torch.bmm(normalised.flatten(0, 1), copies).view(channels, graphs * size, -1)
        if weights.edges:
            maps = self._maps(weights.scores, gathered if self.conv == "gcn" else x.flatten(0, 1), block)
            edges = edgewise(weights.edges, torch.cat([maps.view(channels, -1), edges]))
            edges = edges if block.edge_mask is None else edges * block.edge_mask
        if weights.values is not None:
            assert self.nodes is not None
            hidden = torch.addbmm(weights.values[1], gathered, weights.values[0])
            x = self.nodes.maps[1](elu(hidden)).view(graphs, size, -1)
            x = torch.tanh(x if self.time is None else x + self.time(embedded)[:, None])
        return x, edges

    def _maps(self, weights: list[Affine], x: Tensor, block: Block) -> Tensor:
        """Sums over heads and over both directions of the attention maps, (C b, p)."""
        if self.conv == "gcn":
            both = torch.baddbmm(weights[0][1], x, weights[0][0])  # (C, b n, queries and keys)
            parts = both.view(self.channels * block.graphs, block.size, 2 * self.heads, -1).unbind(2)
        else:
            hidden = torch.baddbmm(weights[0][1], x.expand(2 * self.channels, -1, -1), weights[0][0])
            both = torch.baddbmm(weights[1][1], hidden.tanh(), weights[1][0])  # (queries and keys of C, b n, attention)
            both = both.view(2, self.channels * block.graphs, block.size, self.heads, -1)
            parts = (*both[0].unbind(2), *both[1].unbind(2))
        total: Tensor | None = None
        # One head after the other: no copies of queries and keys, and the maps of one stay in the cache.
        for queries, keys in zip(parts[: self.heads], parts[self.heads :], strict=True):
            scores = torch.bmm(queries, keys.mT).tanh_()
            total = scores if total is None else total + scores
        assert total is not None
        return fold(total.flatten(1), block.pairs)


def normalise(edges: Tensor, block: Block) -> Tensor:
    """D^-1/2 A D^-1/2 of channels (C, b p) with self-loops 1 and D = max(row sum, 1), as (C, b, n, n).

    The clamp is for noisy edges, whose sum may be negative.
    """
    channels, size = len(edges), block.size
    square = spread(edges.view(channels * block.graphs, -1), block.pairs, 1.0).view(channels, block.graphs, size, size)
    scale = square.sum(-1, dtype=torch.promote_types(square.dtype, torch.float32)).clamp_min(1).rsqrt()
    return (scale[..., None] * square * scale[..., None, :]).to(edges.dtype)


def powers(edges: Tensor, count: int, block: Block) -> Tensor:
    """Pairs of A, A^2, ..., A^count, (count, b p), from those of A, (1, b p)."""
    found, size = [edges], block.size
    square = power = spread(edges.view(block.graphs, -1), block.pairs).view(-1, size, size)
    for _ in range(count - 1):
        power = torch.bmm(power, square)
        found.append(0.5 * fold(power.flatten(1), block.pairs).view(1, -1))
    return torch.cat(found)


def zero_linear(first: int, last: int) -> nn.Linear:
    """A linear map without bias that returns zeros at first."""
    linear = nn.Linear(first, last, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def elu(x: Tensor) -> Tensor:
    """``F.elu``; for large float32 tensors on CPUs, where torch's is slow, with an absolute error up to 1e-7."""
    slow = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > _SMALL
    if not slow or x.requires_grad or torch.compiler.is_compiling():
        return F.elu(x)
    y = x.exp().clamp_max_(1).sub_(1)
    return torch.maximum(x, y, out=y)  # exp(x) - 1 >= x
