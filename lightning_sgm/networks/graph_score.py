"""GDSS's pair of score networks for graphs (Jo et al. 2022, 2202.02514)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_sgm.networks.base import Network, Spec, entry
from lightning_sgm.networks.embed import EmbeddingKind, label_embedding
from lightning_sgm.networks.graph_groups import Block, Planner
from lightning_sgm.networks.graph_layers import (
    AttentionLayer,
    AttentionWeights,
    Convolution,
    GraphConvolution,
    Linears,
    edgewise,
    normalise,
    powers,
    zero_linear,
)


class GraphScore(Network):
    """Two networks without shared parameters, ``x`` for node features and ``adj`` for edges; each sees both.

    Permuting nodes permutes the answer, and padding changes nothing. With ``time`` false the noise label is ignored, as
    in the paper's networks: the noise level must be guessed from the noisy graph.

    On CPUs graphs are computed in blocks of similar sizes, so that padding costs little; elsewhere as one padded batch.

    Args:
        spec: of graphs or molecules; ``features`` is used.
        depth: layers of the network of nodes.
        width: node features of all layers.
        nodes: "gcn" for graph convolutions on A, "attention" for the layers of the network of edges.
        layers: of the network of edges, at least 2.
        linears: linear maps in the MLPs of edges in the attention layers.
        attention_width: of queries and keys, from the second layer on; in the first it is ``width``.
        heads: of the attention; they divide both widths.
        channels: of edges: powers of A at first, after the layers, after the last layer.
        attention_conv: queries and keys from graph convolutions or from MLPs.
        time: whether the noise label shifts the nodes of every attention layer and convolution, and the first hidden
            layer of both answers. All shifts are zero at first.
        embedding: of the noise label, see :func:`~lightning_sgm.networks.embed.label_embedding`.
        fourier_scale: spread of the Fourier frequencies, in cycles per unit of the label.
    """

    conditions = ("node_mask",)

    def __init__(
        self,
        spec: Spec,
        depth: int = 3,
        width: int = 32,
        nodes: Literal["gcn", "attention"] = "gcn",
        layers: int = 5,
        linears: int = 2,
        attention_width: int = 32,
        heads: int = 4,
        channels: Sequence[int] = (2, 8, 4),
        attention_conv: Convolution = "gcn",
        time: bool = False,
        embedding: EmbeddingKind = "positional",
        fourier_scale: float = 1.0,
    ) -> None:
        super().__init__()
        features = int(entry(spec, "features", "GraphScore"))
        if nodes not in ("gcn", "attention"):
            raise ValueError(f"nodes is 'gcn' or 'attention', got {nodes!r}")
        if depth < 1 or layers < 2:
            raise ValueError(f"GraphScore needs depth >= 1 and layers >= 2, got {depth} and {layers}")
        if len(channels) != 3:
            raise ValueError(f"channels are three numbers, got {list(channels)}")
        time_width = 2 * width if time else 0
        self.powers = channels[0]
        self.embed = None
        if time:
            label = label_embedding(embedding, time_width, fourier_scale)
            self.embed = nn.Sequential(label, nn.Linear(time_width, time_width), nn.SiLU())
        sizes = [width] * depth
        self.x: NodeScore | AttentionNodeScore
        stack = partial(
            attention_stack, features, width, linears, attention_width, heads, channels, attention_conv, time_width
        )
        if nodes == "gcn":
            self.x = NodeScore(features, sizes, time_width)
        else:
            self.x = AttentionNodeScore(features, sizes, stack("nodes", depth), time_width)
        total = channels[0] + (layers - 1) * channels[1] + channels[2]
        self.adj = EdgeScore(stack("edges", layers), total, time_width)
        self._plan = Planner()

    def forward(self, state: dict[str, Tensor], label: Tensor, /, *, node_mask: Tensor) -> dict[str, Tensor]:
        """The answers for ``x`` (B, N, F) and ``adj`` (B, N, N), of the same shapes.

        Args:
            state: ``x`` and ``adj``, which is symmetric; its diagonal and what is outside the mask have no effect.
            label: (B,), the noise label; only used with ``time``.
            node_mask: (B, N) bool, which nodes there are.

        Returns:
            ``x``, and a symmetric ``adj`` with zero diagonal; both zero outside the mask.
        """
        x, adj = state["x"], state["adj"]
        plan = self._plan(node_mask)
        if not plan.blocks:
            return {"x": torch.zeros_like(x), "adj": torch.zeros_like(adj)}
        embedded = None if self.embed is None else self.embed[1:](self.embed[0](label).to(x.dtype))
        weights_x, weights_adj = self.x.prepare(), self.adj.prepare()
        nodes: list[Tensor] = []
        pairs: list[Tensor] = []
        for block, part, edges in zip(plan.blocks, *plan.split(x, adj), strict=True):
            time = embedded if embedded is None or block.rows is None else embedded.index_select(0, block.rows)
            edges = edges if block.edge_mask is None else edges * block.edge_mask
            edges = powers(edges, self.powers, block)
            normalised = normalise(edges, block)
            nodes.append(self.x(weights_x, part, edges, normalised, block, time).flatten(0, 1))
            pairs.append(self.adj(weights_adj, part, edges, normalised, block, time))
        found_x, found_adj = plan.join(nodes, pairs)
        return {"x": found_x.to(x.dtype), "adj": found_adj.to(adj.dtype)}


def attention_stack(
    features: int,
    width: int,
    linears: int,
    attention_width: int,
    heads: int,
    channels: Sequence[int],
    conv: Convolution,
    time_width: int,
    wanted: Literal["nodes", "edges"],
    count: int,
) -> nn.ModuleList:
    """``count`` attention layers, the last of which makes only what is ``wanted``."""
    first, hidden, final = channels
    layers = nn.ModuleList()
    for i in range(count):
        last = i == count - 1
        layers.append(
            AttentionLayer(
                width if i else features,
                attention_width if i else width,
                width,
                hidden if i else first,
                final if i and last else hidden,
                linears,
                heads,
                conv,
                nodes=not last or wanted == "nodes",
                edges=not last or wanted == "edges",
                time_width=time_width,
            )
        )
    return layers


def prepared(layers: nn.ModuleList) -> list[AttentionWeights]:
    """Prepared weights of all attention layers."""
    return [layer.prepare() for layer in cast("list[AttentionLayer]", list(layers))]


class NodeScore(nn.Module):
    """Graph convolutions with tanh, and an MLP on the features of all layers."""

    def __init__(self, features: int, widths: Sequence[int], time_width: int = 0) -> None:
        super().__init__()
        ins = [features, *widths]
        self.layers = nn.ModuleList([GraphConvolution(a, b) for a, b in zip(ins, widths, strict=False)])
        self.final = _final(sum(ins), features)
        self.times = nn.ModuleList([zero_linear(time_width, b) for b in widths if time_width])
        self.time = zero_linear(time_width, 2 * sum(ins)) if time_width else None

    def prepare(self) -> list[AttentionWeights]:
        """Nothing."""
        return []

    def forward(
        self,
        weights: list[AttentionWeights],
        x: Tensor,
        edges: Tensor,
        normalised: Tensor,
        block: Block,
        embedded: Tensor | None,
    ) -> Tensor:
        """(b, n, F) to the same; of ``normalised`` (C, b, n, n) the first channel is used."""
        found = [x]
        for i, layer in enumerate(self.layers):
            x = layer(x, normalised[0])
            x = torch.tanh(x if embedded is None else x + self.times[i](embedded)[:, None])
            found.append(x)
        shift = None if self.time is None else self.time(embedded)[:, None]
        return self.final(torch.cat(found, -1), shift)


class AttentionNodeScore(nn.Module):
    """Attention layers with one more tanh, and an MLP on the node features of all layers (GDSS's ZINC250k, v2)."""

    def __init__(self, features: int, widths: Sequence[int], layers: nn.ModuleList, time_width: int = 0) -> None:
        super().__init__()
        self.layers = layers
        total = features + sum(widths)
        self.final = _final(total, features)
        self.time = zero_linear(time_width, 2 * total) if time_width else None

    def prepare(self) -> list[AttentionWeights]:
        """Of all layers."""
        return prepared(self.layers)

    def forward(
        self,
        weights: list[AttentionWeights],
        x: Tensor,
        edges: Tensor,
        normalised: Tensor | None,
        block: Block,
        embedded: Tensor | None,
    ) -> Tensor:
        """(b, n, F) to the same; ``edges`` (C, b p) are powers of A, ``normalised`` (C, b, n, n) theirs."""
        found = [x]
        for layer, own in zip(self.layers, weights, strict=True):
            x, edges = layer(own, x, edges, normalised, block, embedded)
            x, normalised = torch.tanh(x), None
            found.append(x)
        shift = None if self.time is None else self.time(embedded)[:, None]
        return self.final(torch.cat(found, -1), shift)


class EdgeScore(nn.Module):
    """Attention layers, and an MLP on the edge channels of all layers; ``total`` is their number."""

    def __init__(self, layers: nn.ModuleList, total: int, time_width: int = 0) -> None:
        super().__init__()
        self.layers = layers
        self.final = _final(total, 1)
        self.time = zero_linear(time_width, 2 * total) if time_width else None

    def prepare(self) -> tuple[list[AttentionWeights], list[tuple[Tensor, Tensor]]]:
        """Of all layers, and of the last MLP."""
        return prepared(self.layers), self.final.prepare()

    def forward(
        self,
        weights: tuple[list[AttentionWeights], list[tuple[Tensor, Tensor]]],
        x: Tensor,
        edges: Tensor,
        normalised: Tensor | None,
        block: Block,
        embedded: Tensor | None,
    ) -> Tensor:
        """(1, b p), from ``edges`` (C, b p), powers of A, and ``normalised`` (C, b, n, n), made of them."""
        found = [edges]
        for layer, own in zip(self.layers, weights[0], strict=True):
            x, edges = layer(own, x, edges, normalised, block, embedded)
            normalised = None
            found.append(edges)
        shift = None if self.time is None else self.time(embedded)
        return edgewise(weights[1], torch.cat(found), shift)


def _final(total: int, last: int) -> Linears:
    return Linears(total, 2 * total, last, 3)
