"""Sets of undirected graphs: random communities, neighbourhoods, lattices, and the user's own files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.base import SPLITS, DataModule, Split, require_positive
from datamodules.graph_files import PackedGraphs, pack, read_graphs, starts
from datamodules.loaders import Batch, permutation

_SPLIT = 6  # purpose of a hash, see loaders.py


class GraphDataModule(DataModule):
    """Simple undirected graphs: dense batches padded to their largest graph.

    A batch has ``x`` (B, N, F) float32, each node's degree as one-hot; ``adj`` (B, N, N) float32, 0 or 1, symmetric
    with zero diagonal; ``node_mask`` (B, N) bool, true for the first nodes of each row; ``index`` (B,) int64. What lies
    outside the mask is 0. Nodes keep the order of the file. Memory and time grow with N squared.

    The splits of a file with ``is_test`` are its own, others are cut at random, the same way for every ``seed``.

    ``spec``: kind "graph", nodes (of the largest graph), features F, bonds 1, node_counts (number of training graphs
    with 0, 1, ..., nodes nodes), edge_mean and edge_std (mean and standard deviation of adj over the pairs i != j of
    all training graphs), feature_mean and feature_std (F of each, of x over all their nodes).

    Args:
        dataset: made here, without a download, always the same graphs: "community", two random graphs of the same 6 to
            10 nodes and edge probability 0.7, joined by 0.05 n edges on average and at least one, n nodes in all, drawn
            again until connected (community_small of Niu et al. 2020 and GDSS, but each graph has its own communities,
            which repeat in GDSS's file); "ego", a node and its 3 to 17 neighbours in one graph grown by preferential
            attachment with triangles (in size like GDSS's ego_small from Citeseer, but no citations); "grid", lattices
            with sides of 10 to 19 nodes, all 100 of them before one is repeated; "small_grid", with sides of 4 to 9
            nodes, 36 in all (repetitions are in every split, so only the shape of the graphs is to be learnt).
        path: a file or folder that takes the place of ``dataset``: .npz of num_nodes, num_edges, edge_index and perhaps
            is_test; a folder of .graphml, .gml or edge list files (.edges, .edgelist, .txt) with one graph each. See
            ``read_graphs``. Isolated nodes are dropped, with a note.
        graphs: number of graphs of a ``dataset``.
        features: width F of the one-hot degree, above the largest degree; None takes the largest of all splits + 1.
        max_nodes: larger graphs are refused, since batches are dense.
        symmetrize: make the edges of a file undirected and drop self-loops, instead of refusing them.
        val_fraction: part of the graphs for validation, of those that are not for testing where the file has
            ``is_test``. At 0 the test graphs serve for validation too, as in GDSS; None is 0 for files with ``is_test``
            and 0.1 otherwise.
        test_fraction: part of the graphs for testing; not used where the file has ``is_test``.
        batch_size: graphs per batch and process.
        seed: of the order of training.

    Raises:
        ValueError: an argument out of range, a graph too large or of too high a degree, and all of ``read_graphs``.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        dataset: Literal["community", "ego", "grid", "small_grid"] = "community",
        path: str | None = None,
        graphs: int = 100,
        features: int | None = None,
        max_nodes: int = 1000,
        symmetrize: bool = False,
        val_fraction: float | None = None,
        test_fraction: float = 0.2,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        require_positive(graphs=graphs, max_nodes=max_nodes, features=1 if features is None else features)
        if dataset not in _SETS:
            raise ValueError(f"there is no dataset {dataset!r}: choose one of {', '.join(_SETS)}, or give a path")
        self._name = path or dataset
        made = read_graphs(Path(path), symmetrize) if path else _SETS[dataset](np.random.default_rng(0), graphs)
        self._graphs = made
        self._rows = self._cut(val_fraction, test_fraction)
        self._edge_starts = starts(made.num_edges)
        self._require_size(max_nodes)
        degree = self._degrees()
        features = self._width(degree, features)
        train = self._rows["train"].numpy()
        nodes, pairs = made.num_nodes[train], made.num_nodes[train] * (made.num_nodes[train] - 1)
        mean = float(2 * made.num_edges[train].sum() / pairs.sum())
        trained = np.repeat(np.isin(np.arange(len(made.num_nodes)), train), made.num_nodes)
        share = np.bincount(degree[trained], minlength=features) / trained.sum()
        self.spec = {
            "kind": "graph",
            "nodes": int(made.num_nodes.max()),
            "features": features,
            "bonds": 1,
            "node_counts": np.bincount(nodes, minlength=made.num_nodes.max() + 1).tolist(),
            "edge_mean": mean,
            "edge_std": float(np.sqrt(mean * (1 - mean))),
            "feature_mean": share.tolist(),
            "feature_std": np.sqrt(share * (1 - share)).tolist(),
        }

    def load(self) -> None:
        """Nothing: the graphs are there since construction, for the sake of ``spec``."""

    def count(self, split: Split) -> int:
        """Number of graphs of a split."""
        return len(self._rows[split])

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Graphs ``index`` (B,) of a split: x (B, N, F), adj (B, N, N), node_mask (B, N); N is that of the largest."""
        rows = self._rows[split][index].numpy()
        nodes, edges = (torch.from_numpy(counts[rows]) for counts in (self._graphs.num_nodes, self._graphs.num_edges))
        batch, size = len(rows), int(nodes.max())
        owner = torch.arange(batch).repeat_interleave(edges)
        # Where each edge lies in edge_index: its graph's first place, and its number within the graph.
        first = torch.from_numpy(self._edge_starts[rows]) - (edges.cumsum(0) - edges)
        u, v = torch.from_numpy(self._graphs.edge_index[:, (first[owner] + torch.arange(len(owner))).numpy()])
        adj = torch.zeros(batch, size, size)
        adj[owner, u, v] = 1.0
        adj[owner, v, u] = 1.0
        node_mask = torch.arange(size) < nodes[:, None]
        degree = adj.sum(dim=2, keepdim=True)
        x = (degree == torch.arange(self.spec["features"])) & node_mask[:, :, None]
        return {"x": x.float(), "adj": adj, "node_mask": node_mask}

    def _cut(self, val_fraction: float | None, test_fraction: float) -> dict[str, Tensor]:
        """Rows of each split, in ascending order."""
        total = len(self._graphs.num_nodes)
        is_test = self._graphs.is_test
        val_fraction = (0.1 if is_test is None else 0.0) if val_fraction is None else val_fraction
        if not (val_fraction >= 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                "val_fraction must be at least 0, test_fraction above 0, and both sum to less than 1, got "
                f"{val_fraction} and {test_fraction}"
            )
        order = permutation(total, _SPLIT)
        if is_test is None:
            test, rest = order.tensor_split([max(1, round(total * test_fraction))])
            count = round(total * val_fraction)
        else:
            chosen = torch.from_numpy(is_test)[order]
            test, rest = order[chosen], order[~chosen]
            count = round(len(rest) * val_fraction)
        val, train = rest.tensor_split([max(1, count)]) if val_fraction > 0 else (test, rest)
        pieces = dict(zip(SPLITS, (train, val, test), strict=True))
        if empty := " and ".join(split for split, rows in pieces.items() if not len(rows)):
            if is_test is not None and total > 1 and is_test.all() == is_test.any():
                raise ValueError(
                    f"{self._name}: is_test marks {'all' if is_test.all() else 'none'} of {total} graphs, and {empty} "
                    "would have none: mark some of them, or leave is_test out and they are cut at random"
                )
            graphs = "1 graph" if total == 1 else f"{total} graphs"
            raise ValueError(f"{self._name} has {graphs}, and {empty} would have none: give more")
        return {split: rows.sort().values for split, rows in pieces.items()}

    def _require_size(self, max_nodes: int) -> None:
        nodes = self._graphs.num_nodes
        if nodes.max() > max_nodes:
            raise ValueError(
                f"{self._name}: {(nodes > max_nodes).sum()} graphs have more than max_nodes = {max_nodes} nodes; the "
                f"largest is {self._graphs.names[int(nodes.argmax())]} with {nodes.max()}. Batches are dense, N x N: "
                "raise max_nodes, or leave the large graphs out"
            )

    def _degrees(self) -> NDArray[np.int64]:
        """Of all nodes, graph after graph."""
        graphs = self._graphs
        owner = np.repeat(np.arange(len(graphs.num_nodes)), graphs.num_edges)
        ends = (graphs.edge_index + starts(graphs.num_nodes)[owner]).ravel()
        return np.bincount(ends, minlength=graphs.num_nodes.sum())

    def _width(self, degree: NDArray[np.int64], features: int | None) -> int:
        """``features``, or what the largest degree needs; a ValueError where it does not fit."""
        node = int(degree.argmax())
        largest = int(degree[node])
        if features is not None and largest >= features:
            graphs = self._graphs
            name = graphs.names[int(np.searchsorted(np.cumsum(graphs.num_nodes), node, side="right"))]
            raise ValueError(
                f"{name} has a node of degree {largest}, too high for features = {features}: set features to "
                f"{largest + 1} or more, or leave it out"
            )
        return features or largest + 1


def _packed(num_nodes: NDArray[np.int64], adj: NDArray[np.bool_], name: str) -> PackedGraphs:
    """From the upper triangles of adjacency matrices (G, N, N)."""
    graph, *edges = np.nonzero(np.triu(adj))
    return pack(num_nodes, graph, np.stack(edges), [f"graph {number} of {name}" for number in range(len(adj))])


def _communities(generator: np.random.Generator, graphs: int) -> PackedGraphs:
    half = generator.integers(6, 11, size=graphs)
    adj = _joined_pairs(generator, half)
    while not (connected := _connected(adj, 2 * half)).all():  # some 1 % are not at first
        adj[~connected] = _joined_pairs(generator, half[~connected])
    return _packed(2 * half, adj, "community")


def _joined_pairs(generator: np.random.Generator, half: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(G, 20, 20) upper triangles: nodes 0..half-1 are one community, half..2 half - 1 the other."""
    side = half[:, None]
    community = (np.arange(20) >= side).astype(int) + (np.arange(20) >= 2 * side)
    here, there = community[:, :, None], community[:, None, :]
    uniform = generator.random((len(half), 20, 20))
    inside = (here == there) & (here < 2)
    bridge = (here == 0) & (there == 1)
    # 0.05 n bridges on average over half * half pairs, and always the pair with the lowest number.
    threshold = (0.1 / side)[:, :, None]
    lowest = uniform == np.where(bridge, uniform, 1.0).min(axis=(1, 2), keepdims=True)
    return np.triu((inside & (uniform < 0.7)) | (bridge & ((uniform < threshold) | lowest)), 1)


def _connected(adj: NDArray[np.bool_], num_nodes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(G,) whether the first ``num_nodes`` of each graph hang together; ``adj`` (G, N, N) upper triangles."""
    reach = (adj | adj.transpose(0, 2, 1) | np.eye(adj.shape[1], dtype=bool)).astype(np.float32)
    for _ in range(adj.shape[1].bit_length()):
        reach = np.minimum(reach @ reach, 1.0)
    answer: NDArray[np.bool_] = reach[:, 0].sum(axis=1) == num_nodes
    return answer


def _egos(generator: np.random.Generator, graphs: int) -> PackedGraphs:
    """Holme and Kim 2002: each new node links to a random end of a random edge, then to a neighbour of that node."""
    neighbors: list[set[int]] = [{1, 2}, {0, 2}, {0, 1}]
    ends = [0, 1, 1, 2, 0, 2]
    for new in range(3, 10 * graphs + 10):
        first = ends[int(generator.integers(len(ends)))]
        near = sorted(neighbors[first])
        second = near[int(generator.integers(len(near)))]
        neighbors.append({first, second})
        neighbors[first].add(new)
        neighbors[second].add(new)
        ends += [new, first, new, second]
    centers = [node for node, near in enumerate(neighbors) if 3 <= len(near) <= 17]
    adj = np.zeros((graphs, 18, 18), dtype=bool)
    num_nodes = np.empty(graphs, dtype=np.int64)
    for row, center in enumerate(generator.choice(centers, size=graphs, replace=False)):
        nodes = [center, *sorted(neighbors[center])]
        num_nodes[row] = len(nodes)
        adj[row, : len(nodes), : len(nodes)] = [[v in neighbors[u] for v in nodes] for u in nodes]
    return _packed(num_nodes, adj, "ego")


def _grids(generator: np.random.Generator, graphs: int, low: int = 10, high: int = 19) -> PackedGraphs:
    """Lattices with sides of ``low`` to ``high`` nodes."""
    span = high - low + 1
    kinds = np.concatenate([generator.permutation(span**2) for _ in range(-(-graphs // span**2))])[:graphs]
    sides = np.stack([kinds // span + low, kinds % span + low], axis=1)
    edges = []
    for height, width in sides:
        node = np.arange(height * width).reshape(height, width)
        edges.append(np.hstack([np.stack([a.ravel(), b.ravel()]) for a, b in _steps(node)]))
    graph = np.repeat(np.arange(graphs), [piece.shape[1] for piece in edges])
    names = [f"graph {number} of grid" for number in range(graphs)]
    return pack(sides.prod(axis=1), graph, np.hstack(edges), names)


def _steps(node: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    return [(node[:, :-1], node[:, 1:]), (node[:-1], node[1:])]


_SETS: dict[str, Callable[[np.random.Generator, int], PackedGraphs]] = {
    "community": _communities,
    "ego": _egos,
    "grid": _grids,
    "small_grid": partial(_grids, low=4, high=9),
}
