import itertools

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgm.metrics import orbits
from lightning_sgm.metrics.orbits import orbit_counts


def adjacency(graph):
    return torch.from_numpy(nx.to_numpy_array(graph))


# Orbit of a node by (nodes, edges, largest degree, its own degree) of a connected induced subgraph; the paw's and the
# cycle's (4 nodes, 4 edges), and the claw's and the path's (4 nodes, 3 edges), differ in the largest degree.
POSITION = {
    (2, 1, 1, 1): 0,
    **{(3, 2, 2, 1): 1, (3, 2, 2, 2): 2, (3, 3, 2, 2): 3},
    **{(4, 3, 2, 1): 4, (4, 3, 2, 2): 5, (4, 3, 3, 1): 6, (4, 3, 3, 3): 7, (4, 4, 2, 2): 8},
    **{(4, 4, 3, 1): 9, (4, 4, 3, 2): 10, (4, 4, 3, 3): 11, (4, 5, 3, 2): 12, (4, 5, 3, 3): 13, (4, 6, 3, 3): 14},
}


def by_enumeration(graph):
    """The definition: every set of 2 to 4 nodes whose induced subgraph is connected."""
    counts = torch.zeros(len(graph), 15, dtype=torch.float64)
    for size in (2, 3, 4):
        for chosen in itertools.combinations(graph, size):
            part = graph.subgraph(chosen)
            if nx.is_connected(part):
                degrees = dict(part.degree)
                for node, degree in degrees.items():
                    kind = (size, part.number_of_edges(), max(degrees.values()), degree)
                    counts[node, POSITION[kind]] += 1
    return counts


def counts_of(row):
    """(15,) from {orbit: count}."""
    return torch.tensor([float(row.get(orbit, 0)) for orbit in range(15)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("graph", "rows"),
    [
        (nx.complete_graph(4), [{0: 3, 3: 3, 14: 1}] * 4),
        (nx.cycle_graph(4), [{0: 2, 1: 2, 2: 1, 8: 1}] * 4),
        (
            nx.path_graph(4),
            [{0: 1, 1: 1, 4: 1}, *[{0: 2, 1: 1, 2: 1, 5: 1}] * 2, {0: 1, 1: 1, 4: 1}],
        ),
        (nx.star_graph(4), [{0: 4, 2: 6, 7: 4}, *[{0: 1, 1: 3, 6: 3}] * 4]),
        (
            nx.Graph([(0, 1), (1, 2), (2, 3), (3, 1)]),  # paw: 0 is the tail, 1 has it
            [{0: 1, 1: 2, 9: 1}, {0: 3, 2: 2, 3: 1, 11: 1}, *[{0: 2, 1: 1, 3: 1, 10: 1}] * 2],
        ),
        (
            nx.Graph([(0, 1), (1, 2), (2, 3), (3, 0), (1, 3)]),  # diamond: 1 and 3 in the middle
            [{0: 2, 1: 2, 3: 1, 12: 1}, {0: 3, 2: 1, 3: 2, 13: 1}] * 2,
        ),
    ],
    ids=["K4", "C4", "P4", "star", "paw", "diamond"],
)
def test_by_hand(graph, rows):
    nodes = sorted(graph)
    found = orbit_counts(torch.from_numpy(nx.to_numpy_array(graph, nodelist=nodes))[None])[0]
    assert torch.equal(found, torch.stack([counts_of(row) for row in rows]))


@settings(max_examples=25)
@given(st.integers(4, 10), st.floats(0.1, 1.0), st.integers(0, 10**6))
def test_against_enumeration(nodes, density, seed):
    graph = nx.gnp_random_graph(nodes, density, seed=seed)
    assert torch.equal(orbit_counts(adjacency(graph)[None])[0], by_enumeration(graph))


def test_batches_padding_and_small_pieces(monkeypatch):
    graphs = [nx.gnp_random_graph(nodes, 0.6, seed=nodes) for nodes in (5, 9, 12)]
    batch = torch.zeros(3, 14, 14)
    for row, graph in zip(batch, graphs, strict=True):
        row[: len(graph), : len(graph)] = adjacency(graph)
    expected = torch.zeros(3, 14, 15, dtype=torch.float64)
    for row, graph in zip(expected, graphs, strict=True):
        row[: len(graph)] = by_enumeration(graph)
    assert torch.equal(orbit_counts(batch), expected)
    assert expected[..., 14].sum() > 0
    monkeypatch.setattr(orbits, "_ROWS", 30)  # two triangles at a time
    assert torch.equal(orbit_counts(batch), expected)


def test_large_complete_graph():
    """All of K40 is known: 39 edges, 39 over 2 triangles and 39 over 3 complete graphs of four around each node."""
    found = orbit_counts(1.0 - torch.eye(40)[None])[0]
    assert torch.equal(found, counts_of({0: 39, 3: 741, 14: 9139}).expand(40, -1))
