"""Graphlet orbit counts in closed form: matrix products and a list of triangles instead of an enumeration."""

from __future__ import annotations

import torch
from torch import Tensor

ORBITS = 15
_ROWS = 1 << 20  # entries of the table that a piece of the triangle list makes


def orbit_counts(adj: Tensor) -> Tensor:
    """How often every node takes each of the 15 positions in connected induced subgraphs of 2 to 4 nodes.

    The orbits and their numbers are those of Przulj (2007): 0 edge; 1, 2 path of three (end, middle); 3 triangle;
    4, 5 path of four (end, inside); 6, 7 claw (leaf, center); 8 cycle of four; 9, 10, 11 paw (tail, the two others,
    the node with the tail); 12, 13 diamond (degree 2, degree 3); 14 complete graph of four. Counts of subgraphs
    that need not be induced follow from degrees, triangles and common neighbors; linear relations make them induced
    (the idea of Hocevar and Demsar 2014). Exact while counts are below 2^53.

    Args:
        adj: (B, N, N) 0 or 1 of any dtype, symmetric, zero diagonal; rows of zeros (padding) get zeros.

    Returns:
        (B, N, 15) float64, whole numbers.
    """
    a = adj.double()
    degree = a.sum(-1)
    common = a @ a
    common.diagonal(dim1=-2, dim2=-1).zero_()
    shared = a * common  # triangles on each edge
    t = shared.sum(-1) / 2
    cliques = _four_cliques(a, shared)
    pairs, other = degree * (degree - 1) / 2, degree - 1

    def neighbors(values: Tensor) -> Tensor:
        """Sum of (B, N) values over the neighbors of each node."""
        return (a @ values.unsqueeze(-1)).squeeze(-1)

    o = torch.zeros(*degree.shape, ORBITS, dtype=torch.float64, device=adj.device)
    o[..., 0] = degree
    o[..., 1] = neighbors(other) - 2 * t
    o[..., 2] = pairs - t
    o[..., 3] = t
    o[..., 14] = cliques
    o[..., 13] = o13 = _pairs(shared).sum(-1) - 3 * cliques
    o[..., 12] = o12 = ((a @ shared) * a).sum(-1) / 2 - t - 3 * cliques
    o[..., 11] = o11 = t * (degree - 2) - 2 * o13 - 3 * cliques
    o[..., 10] = o10 = (shared * (degree - 2).unsqueeze(-2)).sum(-1) - 2 * o12 - 2 * o13 - 6 * cliques
    o[..., 9] = o9 = neighbors(t) - 2 * t - 2 * o12 - 3 * cliques
    o[..., 8] = o8 = _pairs(common).sum(-1) - o12 - o13 - 3 * cliques
    o[..., 7] = pairs * (degree - 2) / 3 - o11 - o13 - cliques
    o[..., 6] = neighbors(other * (degree - 2) / 2) - o9 - o10 - 2 * o12 - o13 - 3 * cliques
    o[..., 5] = other * neighbors(other) - 2 * t - 2 * o8 - o10 - 2 * o11 - 2 * o12 - 4 * o13 - 6 * cliques
    steps = (common @ other.unsqueeze(-1)).squeeze(-1) - 2 * t
    o[..., 4] = steps - 2 * o8 - 2 * o9 - o10 - 4 * o12 - 2 * o13 - 6 * cliques
    return o


def _pairs(count: Tensor) -> Tensor:
    """Binomial coefficient "count over 2"."""
    return count * (count - 1) / 2


def _four_cliques(a: Tensor, shared: Tensor) -> Tensor:
    """(B, N) float64: complete graphs of four around each node, from the common neighbors of every triangle."""
    batch, nodes, _ = a.shape
    found = torch.zeros(batch * nodes, dtype=torch.float64, device=a.device)
    # An edge of such a graph lies in two triangles at least; a triangle is listed once, as i < j < k.
    graph, first, second = torch.nonzero(shared.triu(1) >= 2, as_tuple=True)
    later = torch.arange(nodes, device=a.device)
    rows = max(1, _ROWS // nodes)
    for b, i, j in zip(graph.split(rows), first.split(rows), second.split(rows), strict=True):
        both = a[b, i] * a[b, j]
        edge, third = torch.nonzero(both * (later > j[:, None]), as_tuple=True)
        for e, k in zip(edge.split(rows), third.split(rows), strict=True):
            fourth = (both[e] * a[b[e], k]).sum(-1)
            for corner in (i[e], j[e], k):
                found.index_add_(0, b[e] * nodes + corner, fourth)
    return found.view(batch, nodes) / 3  # each is met from three triangles around the node
