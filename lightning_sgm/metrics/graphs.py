"""Distances between sets of plain graphs: degrees, clustering, small subgraphs and spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sgm.metrics.graph_kernels import Feature, KernelName, bootstrap_weights, embed, mmd_with_interval
from lightning_sgm.metrics.orbits import ORBITS, orbit_counts

FEATURES: tuple[Feature, ...] = get_args(Feature)
CLUSTER_BINS, SPECTRAL_BINS = 100, 200
_WIDTHS = {"cluster": CLUSTER_BINS, "orbit": ORBITS, "spectral": SPECTRAL_BINS}
_PIECE = 1 << 20  # entries of the adjacency matrices that are worked on at a time


class GraphMMD(Metric):
    """Squared maximum mean discrepancies between real and generated graphs, by four descriptions of a graph.

    - ``degree``: histogram of the degrees;
    - ``cluster``: histogram of the local clustering coefficients, 100 bins on [0, 1];
    - ``orbit``: counts of the 15 orbits of subgraphs with 2 to 4 nodes, mean over nodes;
    - ``spectral``: histogram of the eigenvalues of the normalized Laplacian, 200 bins on [-1e-5, 2];

    the biased estimate (You et al. 2018, GraphRNN; Jo et al. 2022, GDSS). Values of the two kernels cannot be
    compared: the name in tables says which one it is. Every value comes with an interval, ``NAME_low`` to
    ``NAME_high``: the middle 95 % over draws of as many graphs from the GENERATED ones with replacement; the real
    ones stay as they are. The value falls with the number of graphs on either side: compare equal numbers, and look
    at the floor (training graphs in place of samples). ``spectral`` under "emd" counts distance in bins: most
    graphs are so far apart then that it mostly tells duplicates and numbers of graphs; "tv" is better there.
    ``connected``, the fraction of generated graphs in one piece, shows what no MMD does.

    Self-loops and nodes without an edge are dropped before, and a graph without edges is one node (and connected).
    Bond orders count as edges.

    Args:
        kernel: "emd" for earth mover's distances (GDSS and before), "tv" for total variation (GRAN, DiGress).
        features: which of the four.
        repeats: resamples for the intervals.
        seed: of the resamples.

    Attributes:
        name: "mmd_emd" or "mmd_tv", for tables and logs.
        inputs: the batch entries passed to ``update``.
    """

    higher_is_better = False
    full_state_update = False
    is_differentiable = False
    inputs: tuple[str, ...] = ("x", "adj", "node_mask")
    real_rows: list[Tensor]
    real_degrees: list[Tensor]
    generated_rows: list[Tensor]
    generated_degrees: list[Tensor]

    def __init__(
        self, kernel: KernelName = "emd", features: Sequence[Feature] = FEATURES, repeats: int = 1000, seed: int = 0
    ) -> None:
        super().__init__()
        if kernel not in get_args(KernelName):
            raise ValueError(f'kernel of GraphMMD must be "emd" or "tv", got {kernel!r}')
        if not features or not set(features) <= set(FEATURES):
            raise ValueError(f"features of GraphMMD are some of {', '.join(FEATURES)}, got {list(features)}")
        if repeats < 1:
            raise ValueError(f"repeats of GraphMMD must be at least 1, got {repeats}")
        self.name = f"mmd_{kernel}"
        self.kernel: KernelName = kernel
        self.features = tuple(feature for feature in FEATURES if feature in features)
        self.repeats, self.seed = repeats, seed
        # What a row of the states is made of: the width of the degree histogram, and what ``describe`` gives.
        self._columns = {"width": 1, "nodes": 1, "connected": 1}
        self._columns |= {feature: _WIDTHS[feature] for feature in self.features if feature != "degree"}
        # Whole numbers, which no precision setting rounds. Degree histograms have no common width before all
        # batches of all processes are known, so they lie one after another.
        for side in ("real", "generated"):
            self.add_state(f"{side}_rows", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_degrees", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, x: Tensor, adj: Tensor, node_mask: Tensor, real: bool) -> None:
        """Add graphs.

        Args:
            x: (B, N, F), not used.
            adj: (B, N, N) whole numbers, symmetric; any but 0 is an edge.
            node_mask: (B, N) bool; what adj has outside of it does not count.
            real: whether they are data or samples.

        Raises:
            ValueError: adj is not symmetric or has another shape.
        """
        found = describe(adj, node_mask, self.features)
        degree = found.pop("degree")
        width = torch.full_like(found["nodes"], degree.shape[1])
        side = "real" if real else "generated"
        getattr(self, f"{side}_rows").append(torch.cat([width, *found.values()], 1))
        getattr(self, f"{side}_degrees").append(degree.flatten())

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars: NAME, NAME_low, NAME_high per feature, connected, and graphs, graphs_real (their numbers).

        Raises:
            ValueError: no graph on a side.
        """
        real, generated = self._side("real"), self._side("generated")
        counts = [len(side["nodes"]) for side in (real, generated)]
        if min(counts) < 1:
            raise ValueError(f"{self.name} needs real and generated graphs, got {counts[0]} and {counts[1]}")
        weights = bootstrap_weights(self.repeats, counts[1], self.seed).to(generated["nodes"].device)
        result: dict[str, Tensor] = {}
        for feature in self.features:
            width = max(real[feature].shape[1], generated[feature].shape[1])
            a, p = embed(_widened(real[feature], width), feature, self.kernel)
            b, _ = embed(_widened(generated[feature], width), feature, self.kernel)
            value, low, high = mmd_with_interval(a, b, p, weights)
            result |= {feature: value, f"{feature}_low": low, f"{feature}_high": high}
        result["connected"] = generated["connected"].mean()
        for key, count in zip(("graphs_real", "graphs"), counts, strict=True):
            result[key] = torch.tensor(float(count), dtype=torch.float64, device=weights.device)
        return result

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes (torchmetrics); one without graphs takes part with empty tables.

        torchmetrics would send an empty float vector in its place, which the other processes cannot receive.
        """
        for side in ("real", "generated"):
            for state, shape in ((f"{side}_rows", (0, sum(self._columns.values()))), (f"{side}_degrees", (0,))):
                held = getattr(self, state)
                if isinstance(held, list) and not held:
                    held.append(torch.zeros(shape, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def _side(self, side: str) -> dict[str, Tensor]:
        """Float64 tables (G, .) of one side, in an order that depends on the graphs alone."""
        rows = _joined(getattr(self, f"{side}_rows"), (0, sum(self._columns.values())), self.device)
        flat = _joined(getattr(self, f"{side}_degrees"), (0,), self.device)
        width = rows[:, :1]
        places = torch.arange(int(width.max()) if len(rows) else 1, device=rows.device)
        degree = torch.zeros(len(rows), len(places), dtype=torch.int64, device=rows.device)
        degree[places < width] = flat
        # Sorted, so that neither batches nor processes decide which graphs a resample holds.
        order = np.lexsort(torch.cat([degree, rows[:, 1:]], 1).T.flip(0).cpu().numpy())
        index = torch.from_numpy(order).to(rows.device)
        parts = rows[index].double().split(list(self._columns.values()), dim=1)
        found = dict(zip(self._columns, parts, strict=True)) | {"degree": degree[index].double()}
        if "orbit" in found:
            found["orbit"] = found["orbit"] / found["nodes"]
        return found


def describe(adj: Tensor, node_mask: Tensor, features: Sequence[Feature] = FEATURES) -> dict[str, Tensor]:
    """Statistics of graphs as whole numbers; self-loops and nodes without an edge are dropped before.

    Graphs of like sizes are worked on together and in pieces, so neither padding nor large batches cost much.

    Args:
        adj: (B, N, N), symmetric; any value but 0 is an edge.
        node_mask: (B, N) bool.
        features: which to make; "degree" is always made.

    Returns:
        int64 tables (B, .), in this order: nodes, connected (0 or 1), degree (histogram, as wide as the largest degree
        needs), cluster (histogram, 100), orbit (sums over nodes, 15), spectral (histogram, 200).

    Raises:
        ValueError: adj is not symmetric, or the shapes do not fit.
    """
    if adj.dim() != 3 or adj.shape[1] != adj.shape[2] or node_mask.shape != adj.shape[:2]:
        raise ValueError(
            f"graphs need adj (B, N, N) and node_mask (B, N), got {tuple(adj.shape)} and {tuple(node_mask.shape)}"
        )
    if not torch.equal(adj, adj.mT):
        raise ValueError("graphs need a symmetric adj without NaN: metrics take undirected, quantized graphs")
    edges = (adj != 0) & node_mask[:, :, None] & node_mask[:, None, :]
    edges.diagonal(dim1=1, dim2=2).fill_(False)
    kept = edges.any(-1)
    order = kept.int().argsort(dim=1, descending=True, stable=True)
    nodes = kept.sum(1).clamp(min=1)
    widths = {"nodes": 1, "connected": 1, "degree": int(edges.sum(-1).max()) + 1 if edges.numel() else 1}
    widths |= {feature: _WIDTHS[feature] for feature in FEATURES if feature in features and feature != "degree"}
    found = {name: torch.zeros(len(adj), width, dtype=torch.int64, device=adj.device) for name, width in widths.items()}
    rounded = (nodes + 3) // 4 * 4  # few groups, little padding
    for size in torch.unique(rounded).tolist():
        group = torch.nonzero(rounded == size).squeeze(1)
        for index in group.split(max(1, _PIECE // size**2)):
            place = order[index, :size]
            small = edges[index[:, None, None], place[:, :, None], place[:, None, :]].double()
            for name, table in found.items():
                table[index] = _table(name, small, nodes[index], table.shape[1])
    return found


def _table(name: str, adj: Tensor, nodes: Tensor, width: int) -> Tensor:
    """One table of ``describe`` for (B, N, N) float64 graphs whose first ``nodes`` nodes are real."""
    if name == "nodes":
        return nodes[:, None]
    if name == "connected":
        return (_reached(adj) == nodes)[:, None].long()
    if name == "orbit":
        return orbit_counts(adj).sum(1).long()
    if name == "spectral":
        return _spectral(adj, nodes)
    degree = adj.sum(-1)
    if name == "degree":
        return _histogram(degree.long(), nodes, width)
    closed = ((adj @ adj) * adj).sum(-1)
    coefficient = closed / (degree * (degree - 1)).clamp(min=1)
    # numpy's bin edges to the last bit, as published values have them: 0.7 is below the edge 70 * 0.01.
    edges = torch.from_numpy(np.linspace(0.0, 1.0, CLUSTER_BINS + 1)).to(adj.device)
    bins = torch.bucketize(coefficient, edges, right=True) - 1
    return _histogram(bins.clamp(max=CLUSTER_BINS - 1), nodes, CLUSTER_BINS)


def _histogram(bins: Tensor, nodes: Tensor, width: int) -> Tensor:
    """(B, width) counts of the (B, N) bins of real nodes."""
    real = torch.arange(bins.shape[1], device=bins.device) < nodes[:, None]
    return torch.zeros(len(bins), width, dtype=torch.int64, device=bins.device).scatter_add_(1, bins, real.long())


def _spectral(adj: Tensor, nodes: Tensor) -> Tensor:
    """(B, 200) counts of the eigenvalues of I - D^(-1/2) A D^(-1/2); a node alone has the eigenvalue 0."""
    degree = adj.sum(-1)
    scale = degree.clamp(min=1).rsqrt()
    laplacian = torch.diag_embed((degree > 0).double()) - scale[:, :, None] * adj * scale[:, None, :]
    values = torch.linalg.eigvalsh(laplacian)
    # Bipartite graphs have the eigenvalue 2, the end of the range: it counts even where it is rounded up.
    bins = ((values + 1e-5) * (SPECTRAL_BINS / (2.0 + 1e-5))).long().clamp(max=SPECTRAL_BINS - 1)
    every = torch.full_like(nodes, adj.shape[1])
    counts = _histogram(bins, every, SPECTRAL_BINS)
    counts[:, 0] -= every - nodes  # padding has eigenvalues 0
    return counts


def _reached(adj: Tensor) -> Tensor:
    """(B,) number of nodes that can be reached from the first one, itself included."""
    reached = torch.zeros_like(adj[:, :, :1])
    reached[:, 0] = 1.0
    while True:
        further = ((adj @ reached) + reached).clamp_(max=1.0)
        if torch.equal(further, reached):
            return reached.sum((1, 2)).long()
        reached = further


def _widened(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


def _joined(parts: list[Tensor] | Tensor, empty: tuple[int, ...], device: torch.device) -> Tensor:
    """All parts of a state, however many processes were gathered."""
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.zeros(empty, dtype=torch.int64, device=device)
