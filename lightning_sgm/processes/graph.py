"""The joint process of a graph's nodes and edges: a Gaussian process each, one time (Jo et al. 2022, 2202.02514).

A state is ``{"x": (B, N, F), "adj": (B, N, N)}``. The adjacency is symmetric with zero diagonal and so is its noise: an
undirected edge has one number of unit variance. Nothing happens outside the ``node_mask``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sgm.processes.gaussian import VP, GaussianProcess
from lightning_sgm.random import Draw

Graph = dict[str, Tensor]


class GraphProcess(dict[str, GaussianProcess]):
    """Processes of the components ``x`` and ``adj``, and the noise of both.

    Args:
        x: of the node features.
        adj: of the adjacency.
    """

    def __init__(self, x: GaussianProcess = VP(0.1, 1.0), adj: GaussianProcess = VP(0.1, 1.0)) -> None:
        super().__init__(x=x, adj=adj)

    def noise_like(self, state: Graph, draw: Draw, conditions: Mapping[str, Tensor]) -> Graph:
        """Standard normal noise of the state's shapes and dtype, symmetric and masked by ``node_mask`` (B, N).

        A draw with keys gives a graph the same numbers in a batch of any width N.
        """
        x, adj, mask = state["x"], state["adj"], conditions["node_mask"]
        batch, nodes = mask.shape
        # Row by row of the lower triangle: the pairs of the first n nodes come first, whatever N is.
        pairs = draw.normal((batch, nodes * (nodes - 1) // 2), adj.dtype).to(adj.device)
        noise = {"x": draw.normal(x.shape, x.dtype).to(x.device), "adj": symmetric(pairs, nodes)}
        return masked(noise, mask)

    def sizes(self, state: Graph, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How many entries inside the mask each component of each graph has, (B,); an edge has two."""
        nodes = conditions["node_mask"].sum(1)
        return {"x": nodes * state["x"].shape[2], "adj": nodes * (nodes - 1)}


def symmetric(pairs: Tensor, nodes: int) -> Tensor:
    """(B, N, N) with zero diagonal from (B, N (N - 1) / 2), the rows of the lower triangle one after another."""
    row, column = torch.tril_indices(nodes, nodes, -1, device=pairs.device)
    full = pairs.new_zeros(len(pairs), nodes, nodes)
    full[:, row, column] = pairs
    full[:, column, row] = pairs
    return full


def masked(state: Graph, node_mask: Tensor) -> Graph:
    """The state with zeros outside ``node_mask`` (B, N)."""
    mask = node_mask.to(state["x"].dtype)
    return {"x": state["x"] * mask[:, :, None], "adj": state["adj"] * mask[:, :, None] * mask[:, None, :]}
