"""GraphMMD against a loop over graphs and pairs, with the same closed-form distances.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_graph_metrics.py`` prints CPU seconds of all four MMDs of 1000
generated against 100 real graphs, the interval included, for small graphs and for graphs as large as proteins have,
and the largest memory of the process. The loop runs on fewer graphs, is scaled by the numbers of graphs (descriptions)
and of pairs (kernels), and gives the same values there. The goal is 5 CPU seconds for the small graphs.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from functools import partial

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from lightning_sgm.metrics import GraphMMD
from lightning_sgm.metrics.orbits import orbit_counts

REAL, GENERATED = 100, 1000
FEW_REAL, FEW_GENERATED = 20, 60
SIGMAS = {"degree": 1.0, "cluster": 0.1, "orbit": 30.0, "spectral": 1.0}

Graphs = tuple[Tensor, Tensor]
Description = dict[str, np.ndarray]


def communities(count: int, smallest: int, largest: int, degree: float, generator: torch.Generator) -> Graphs:
    """adj and node_mask of random graphs of two halves with a bridge; ``degree`` is the mean within a half."""
    nodes = torch.randint(smallest, largest + 1, (count,), generator=generator)
    place = torch.arange(largest)
    mask = place < nodes[:, None]
    half = place < nodes[:, None] // 2
    inside = (half[:, :, None] == half[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    chance = inside * (2 * degree / nodes.clamp(min=int(2 * degree)))[:, None, None]
    adj = (torch.rand(chance.shape, generator=generator) < chance).float().triu(1)
    adj[torch.arange(count), 0, nodes // 2] = 1.0
    return adj + adj.mT, mask


def description(adj: Tensor) -> Description:
    """Of one graph, by networkx and numpy; orbits by our closed form, one graph at a time."""
    graph = nx.from_numpy_array(adj.numpy())
    graph.remove_nodes_from(list(nx.isolates(graph)))
    cluster = np.histogram(list(nx.clustering(graph).values()), bins=100, range=(0.0, 1.0))[0]
    values = np.linalg.eigvalsh(nx.normalized_laplacian_matrix(graph).toarray()).clip(0.0, 2.0)
    spectrum = np.histogram(values, bins=200, range=(-1e-5, 2.0))[0]
    degree = np.array(nx.degree_histogram(graph))
    orbit = orbit_counts(torch.from_numpy(nx.to_numpy_array(graph))[None])[0].mean(0).numpy()
    return {"degree": degree, "cluster": cluster, "orbit": orbit, "spectral": spectrum}


def pair(a: np.ndarray, b: np.ndarray, feature: str) -> float:
    """Kernel of one pair."""
    if feature == "orbit":
        distance = np.linalg.norm(a - b)
    else:
        size = max(len(a), len(b))
        a, b = np.pad(a / a.sum(), (0, size - len(a))), np.pad(b / b.sum(), (0, size - len(b)))
        distance = np.abs((a - b).cumsum()).sum() / (100 if feature == "cluster" else 1)
    return math.exp(-(distance**2) / (2 * SIGMAS[feature] ** 2))


def loops(real: list[Description], generated: list[Description]) -> dict[str, float]:
    """All four MMDs, pair by pair."""

    def mean(first: list[Description], second: list[Description], feature: str) -> float:
        return sum(pair(a[feature], b[feature], feature) for a in first for b in second) / len(first) / len(second)

    return {
        name: mean(real, real, name) + mean(generated, generated, name) - 2 * mean(real, generated, name)
        for name in SIGMAS
    }


def ours(real: Graphs, generated: Graphs) -> dict[str, float]:
    """The metric, fed in batches of 128."""
    metric = GraphMMD()
    for is_real, graphs in ((True, real), (False, generated)):
        for adj, mask in zip(*(part.split(128) for part in graphs), strict=True):
            metric.update(adj[:, :, :1], adj, mask, real=is_real)
    return {name: float(value) for name, value in metric.compute().items()}


def timed(run: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
    """CPU seconds and result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the graphs")
    generator = torch.Generator().manual_seed(parser.parse_args().seed)
    torch.set_num_threads(1)
    pairs = [a * a + b * b + a * b for a, b in ((REAL, GENERATED), (FEW_REAL, FEW_GENERATED))]
    for smallest, largest, degree in ((12, 20, 5.0), (10, 125, 4.0)):
        real, generated = (communities(n, smallest, largest, degree, generator) for n in (REAL, GENERATED))
        few = [(adj[:n], mask[:n]) for (adj, mask), n in ((real, FEW_REAL), (generated, FEW_GENERATED))]
        start = time.process_time()
        described = [[description(adj) for adj in part[0]] for part in few]
        describing = (time.process_time() - start) * (REAL + GENERATED) / (FEW_REAL + FEW_GENERATED)
        comparing, expected = timed(partial(loops, *described))
        loop = describing + comparing * pairs[0] / pairs[1]
        _, found = timed(partial(ours, *few))  # and a first run
        seconds, _ = timed(partial(ours, real, generated))
        print(
            f"{smallest}..{largest} nodes: ours {seconds:.2f} CPU s (goal 5 for small ones), loop {loop:.1f} (scaled, "
            f"descriptions {describing:.1f}), ratio {loop / seconds:.0f}, largest difference "
            f"{max(abs(found[name] - value) for name, value in expected.items()):.0e}"
        )
    print(f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
