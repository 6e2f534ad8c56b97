from itertools import chain

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.base import SPLITS
from datamodules.graphs import GraphDataModule
from tests.conftest import SHARED

SETS = ("community", "ego", "grid", "small_grid")
FILES = {"community_small": (20, 10), "ego_small": (17, 17), "enzymes": (125, 10), "grid": (361, 5)}


def everything(data, split):
    return data.fetch(split, torch.arange(data.count(split)), None)


def networks(data, split="train"):
    batch = everything(data, split)
    sizes = batch["node_mask"].sum(dim=1)
    return [nx.from_numpy_array(adj[:n, :n].numpy()) for adj, n in zip(batch["adj"], sizes, strict=True)]


def write(path, graphs, **more):
    """networkx graphs with nodes 0..n-1 as a packed file."""
    edges = [edge for graph in graphs for edge in graph.edges]
    np.savez(
        path,
        num_nodes=np.array([len(graph) for graph in graphs], np.int32),
        num_edges=np.array([graph.number_of_edges() for graph in graphs], np.int32),
        edge_index=np.array(edges, np.int32).reshape(-1, 2).T,
        **more,
    )
    return str(path)


def cycles(count):
    return [nx.cycle_graph(n) for n in range(3, 3 + count)]


@pytest.mark.parametrize("name", FILES)
def test_graphs_are_those_of_the_file(name):
    path = SHARED / "data" / "graphs" / f"{name}.npz"
    if not path.exists():
        pytest.skip("the shared data are not here")
    file = np.load(path)
    data = GraphDataModule(path=str(path))
    assert (data.spec["nodes"], data.spec["features"]) == FILES[name]
    stops = file["num_edges"].cumsum()
    for split in ("train", "test"):
        rows = np.flatnonzero(file["is_test"] == (split == "test"))
        assert data.count(split) == len(rows)
        for i in range(0, len(rows), 17):
            batch = data.fetch(split, torch.tensor([i]), None)
            u, v = file["edge_index"][:, stops[rows[i]] - file["num_edges"][rows[i]] : stops[rows[i]]]
            expected = np.zeros((1, *[file["num_nodes"][rows[i]]] * 2))
            expected[0, u, v] = expected[0, v, u] = 1
            np.testing.assert_array_equal(batch["adj"], expected)
            np.testing.assert_array_equal(batch["x"].argmax(dim=2), expected.sum(axis=1))
    assert torch.equal(everything(data, "val")["adj"], everything(data, "test")["adj"])


@given(
    st.lists(st.tuples(st.integers(2, 9), st.floats(0.1, 1.0)), min_size=4, max_size=8),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_a_batch_holds_its_graphs_and_nothing_else(tmp_path_factory, laws, seed, drawn):
    graphs = [nx.gnp_random_graph(n, p, seed=seed + i) for i, (n, p) in enumerate(laws)]
    for graph in graphs:
        nx.add_path(graph, range(len(graph)))  # no isolated nodes
    data = GraphDataModule(path=write(tmp_path_factory.mktemp("g") / "a.npz", graphs, is_test=np.arange(len(laws)) < 1))
    index = torch.tensor(drawn.draw(st.lists(st.integers(0, len(graphs) - 2), min_size=1, max_size=6)))
    batch = data.fetch("train", index, 0)
    chosen = [graphs[1 + i] for i in index.tolist()]
    size = max(map(len, chosen))
    assert batch["adj"].shape == (len(index), size, size)
    assert batch["x"].shape == (len(index), size, data.spec["features"])
    assert (batch["x"].dtype, batch["adj"].dtype, batch["node_mask"].dtype) == (
        torch.float32,
        torch.float32,
        torch.bool,
    )
    assert torch.equal(batch["adj"], batch["adj"].mT)
    for row, graph in enumerate(chosen):
        n = len(graph)
        assert batch["node_mask"][row].tolist() == [True] * n + [False] * (size - n)
        np.testing.assert_array_equal(batch["adj"][row, :n, :n], nx.to_numpy_array(graph, nodelist=range(n)))
        assert batch["adj"][row].sum() == 2 * graph.number_of_edges()
        assert batch["x"][row].sum() == n
        assert batch["x"][row, :n].argmax(dim=1).tolist() == [graph.degree[node] for node in range(n)]


def test_spec_by_hand(tmp_path):
    # Tests: a triangle. Training: two triangles and a path of four nodes.
    graphs = [nx.complete_graph(3), nx.complete_graph(3), nx.path_graph(4), nx.complete_graph(3)]
    data = GraphDataModule(path=write(tmp_path / "a.npz", graphs, is_test=np.array([1, 0, 0, 0])))
    entries = np.array([1] * 12 + [1] * 6 + [0] * 6)
    assert data.spec == {
        "kind": "graph",
        "nodes": 4,
        "features": 3,
        "bonds": 1,
        "node_counts": [0, 0, 0, 2, 1],
        "edge_mean": pytest.approx(entries.mean()),
        "edge_std": pytest.approx(entries.std()),
        "feature_mean": [0.0, 0.2, 0.8],
        "feature_std": pytest.approx([0.0, 0.4, 0.4]),
    }
    assert GraphDataModule(path=str(tmp_path / "a.npz"), features=7).spec["features"] == 7


@pytest.mark.parametrize("name", SETS)
def test_sets_follow_spec_and_repeat(name):
    data, same = GraphDataModule(name), GraphDataModule(name, seed=5)
    assert data.spec == same.spec
    assert [data.count(split) for split in SPLITS] == [70, 10, 20]
    for split in SPLITS:
        batch = everything(data, split)
        assert torch.equal(batch["adj"], everything(same, split)["adj"])
        assert not batch["adj"].diagonal(dim1=1, dim2=2).any()
        assert all(nx.is_connected(graph) for graph in networks(data, split))
    batch = everything(data, "train")
    sizes = batch["node_mask"].sum(dim=1)
    assert data.spec["node_counts"] == sizes.bincount(minlength=data.spec["nodes"] + 1).tolist()
    pairs = batch["node_mask"][:, :, None] & batch["node_mask"][:, None] & ~torch.eye(batch["adj"].shape[1]).bool()
    inside = batch["adj"][pairs].double()
    assert data.spec["edge_mean"] == pytest.approx(inside.mean().item())
    assert data.spec["edge_std"] == pytest.approx(inside.std(correction=0).item())


def test_communities_have_their_law():
    data = GraphDataModule("community", graphs=2000)
    batch = everything(data, "train")
    half = batch["node_mask"].sum(dim=1) // 2
    assert set(half.tolist()) == {6, 7, 8, 9, 10}
    bridges, inside, pairs = [], 0.0, 0.0
    for adj, h in zip(batch["adj"], half.tolist(), strict=True):
        bridges.append(adj[:h, h:].sum().item())
        inside += adj[:h, :h].sum().item() + adj[h:, h:].sum().item()
        pairs += 2 * h * (h - 1)
    assert min(bridges) == 1
    # Connected graphs are slightly denser than G(n, 0.7).
    assert inside / pairs == pytest.approx(0.7, abs=0.01)
    # Binomial(h^2, 0.1 / h) bridges, 1 instead of 0; averaged over the five sizes.
    expected = np.mean([0.1 * h + (1 - 0.1 / h) ** (h * h) for h in range(6, 11)])
    assert np.mean(bridges) == pytest.approx(expected, abs=0.06)


def test_communities_are_all_different():
    graphs = networks(GraphDataModule("community"))
    halves = [graph.subgraph(range(k, k + len(graph) // 2)) for graph in graphs for k in (0, len(graph) // 2)]
    large = [half for half in halves if len(half) >= 9]
    kinds = {tuple(sorted(nx.triangles(half).values())) for half in large}
    assert len(large) > 40
    assert len(kinds) > 0.9 * len(large)


@pytest.mark.parametrize(("name", "low", "high"), [("grid", 10, 19), ("small_grid", 4, 9)])
def test_grids_are_the_lattices(name, low, high):
    span = range(low, high + 1)
    data = GraphDataModule(name, graphs=len(span) ** 2)
    sides = []
    for split in SPLITS:
        for graph in networks(data, split):
            n, m = len(graph), graph.number_of_edges()
            # a b = n and 2 a b - a - b = m
            (pair,) = [(a, n // a) for a in span if n % a == 0 and a <= n // a and a + n // a == 2 * n - m]
            sides.append(pair)
            if len(sides) % 9 == 0:
                assert nx.is_isomorphic(graph, nx.grid_2d_graph(*pair))
    assert sorted(sides) == sorted(tuple(sorted((a, b))) for a in span for b in span)


def test_egos_have_a_center():
    graphs = networks(GraphDataModule("ego", graphs=300))
    assert all(max(dict(graph.degree).values()) == len(graph) - 1 for graph in graphs)
    assert {4, 5, 6} < {len(graph) for graph in graphs} <= set(range(4, 19))
    assert np.mean([len(graph) for graph in graphs]) == pytest.approx(6.4, abs=1.0)  # ego_small: 6.4


@pytest.mark.parametrize(("fraction", "counts"), [(None, [8, 2, 2]), (0.0, [8, 2, 2]), (0.25, [6, 2, 2])])
def test_a_file_with_a_test_split_keeps_it(tmp_path, fraction, counts):
    is_test = np.arange(10) % 5 == 3
    data = GraphDataModule(path=write(tmp_path / "a.npz", cycles(10), is_test=is_test), val_fraction=fraction)
    assert [data.count(split) for split in SPLITS] == counts
    sizes = {split: everything(data, split)["node_mask"].sum(dim=1).tolist() for split in SPLITS}
    assert sizes["test"] == [6, 11]
    if fraction:
        assert sorted(chain(*sizes.values())) == list(range(3, 13))
    else:
        assert sizes["val"] == sizes["test"]
        assert sizes["train"] == [3, 4, 5, 7, 8, 9, 10, 12]


def test_other_files_are_cut_once_for_all_seeds(tmp_path):
    path = write(tmp_path / "a.npz", cycles(20))
    found = []
    for seed in (0, 1):
        data = GraphDataModule(path=path, val_fraction=0.1, test_fraction=0.3, seed=seed)
        found.append([everything(data, split)["node_mask"].sum(dim=1).tolist() for split in SPLITS])
    assert found[0] == found[1]
    assert [len(part) for part in found[0]] == [12, 2, 6]
    assert sorted(chain(*found[0])) == list(range(3, 23))
    data = GraphDataModule(path=path, val_fraction=0)
    assert torch.equal(everything(data, "val")["adj"], everything(data, "test")["adj"])


def test_loaders_and_examples():
    data = GraphDataModule(graphs=20, batch_size=4)
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(batch["x"]) for batch in batches] == [4, 4, 4]
    seen = torch.cat([batch["index"] for batch in batches])
    assert len(seen.unique()) == 12
    for batch in batches:
        assert batch["adj"].shape[1] == batch["node_mask"].sum(dim=1).max()
    some = data.examples("train", 5)
    assert torch.equal(some["index"], GraphDataModule(graphs=20).examples("train", 5)["index"])
    assert torch.equal(some["adj"], data.fetch("train", some["index"], None)["adj"])
    assert not torch.equal(some["index"], GraphDataModule(graphs=20, seed=1).examples("train", 5)["index"])
    assert [len(batch["x"]) for batch in data.eval_loader("test")] == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "planar"}, "no dataset 'planar': choose one of community, ego, grid, small_grid, or give a path"),
        ({"graphs": 0}, "graphs must be at least 1"),
        ({"graphs": 2}, "community has 2 graphs, and train would have none: give more"),
        ({"graphs": 1}, "community has 1 graph, and train and val would have none: give more"),
        ({"features": 0}, "features must be at least 1"),
        (
            {"max_nodes": 12},
            r"graphs have more than max_nodes = 12 nodes; the largest is graph \d+ of community with 20",
        ),
        ({"val_fraction": -0.1}, "val_fraction must be at least 0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "both sum to less than 1"),
        ({"test_fraction": 0.0}, "test_fraction above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GraphDataModule(**arguments)


def test_a_degree_beyond_the_features_is_named(tmp_path):
    path = write(tmp_path / "a.npz", [*cycles(4), nx.star_graph(6), *cycles(2)])
    with pytest.raises(
        ValueError, match=r"graph 4 of a.npz has a node of degree 6, too high for features = 6: .* to 7"
    ):
        GraphDataModule(path=path, features=6)
    assert GraphDataModule(path=path, features=7).spec == GraphDataModule(path=path).spec


@pytest.mark.parametrize(
    ("is_test", "val_fraction", "message"),
    [
        ([1, 1, 1], None, "is_test marks all of 3 graphs, and train would have none: mark some"),
        ([0, 0, 0], None, "is_test marks none of 3 graphs, and val and test would have none: mark some"),
        ([0, 0, 0], 0.3, "is_test marks none of 3 graphs, and test would have none: mark some"),
        ([0, 1, 1], 0.3, "a.npz has 3 graphs, and train would have none: give more"),
        ([1], None, "a.npz has 1 graph, and train would have none: give more"),
    ],
)
def test_a_test_split_of_all_or_nothing(tmp_path, is_test, val_fraction, message):
    path = write(tmp_path / "a.npz", cycles(len(is_test)), is_test=np.array(is_test))
    with pytest.raises(ValueError, match=message):
        GraphDataModule(path=path, val_fraction=val_fraction)
