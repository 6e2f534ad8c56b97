"""The joint process of nodes and edges: symmetric noise of unit variance, whatever the width of the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgm.processes import VE, GraphProcess
from lightning_sgm.processes.graph import masked, symmetric
from lightning_sgm.random import Draw


def empty(batch, nodes, features=3):
    return {"x": torch.zeros(batch, nodes, features), "adj": torch.zeros(batch, nodes, nodes)}


def first(counts, nodes):
    return torch.arange(nodes) < torch.tensor(counts)[:, None]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 3))
def test_noise_is_symmetric_with_zero_diagonal_and_masked(counts, spare):
    nodes = max(counts) + spare
    mask = first(counts, nodes)
    noise = GraphProcess().noise_like(empty(len(counts), nodes), Draw(1), {"node_mask": mask})
    both = mask[:, :, None] & mask[:, None, :] & ~torch.eye(nodes, dtype=torch.bool)
    assert torch.equal(noise["adj"], noise["adj"].mT)
    assert torch.equal(noise["adj"] != 0, both)
    assert torch.equal(noise["x"] != 0, mask[:, :, None].expand_as(noise["x"]))


def test_an_undirected_edge_has_one_number_of_unit_variance():
    mask = torch.ones(20000, 4, dtype=torch.bool)
    noise = GraphProcess().noise_like(empty(20000, 4), Draw(0), {"node_mask": mask})
    row, column = torch.triu_indices(4, 4, 1)
    pairs = noise["adj"][:, row, column].double()
    torch.testing.assert_close(pairs.T @ pairs / 20000, torch.eye(6).double(), rtol=0, atol=0.04)
    torch.testing.assert_close(noise["x"].double().var(), torch.tensor(1.0).double(), rtol=0.02, atol=0)


def test_keyed_noise_of_a_graph_does_not_depend_on_the_width_of_its_batch():
    counts, keys = [3, 5], torch.tensor([7, 9])
    process = GraphProcess()
    wide = process.noise_like(empty(2, 8), Draw(3, keys), {"node_mask": first(counts, 8)})
    narrow = process.noise_like(empty(2, 5), Draw(3, keys), {"node_mask": first(counts, 5)})
    assert torch.equal(wide["adj"][:, :5, :5], narrow["adj"])
    assert torch.equal(wide["x"][:, :5], narrow["x"])
    alone = process.noise_like(empty(1, 3), Draw(3, keys[:1]), {"node_mask": first([3], 3)})
    assert torch.equal(alone["adj"][0], narrow["adj"][0, :3, :3])


def test_sizes_count_what_is_inside_the_mask():
    sizes = GraphProcess().sizes(empty(3, 4), {"node_mask": first([1, 2, 4], 4)})
    assert sizes["x"].tolist() == [3, 6, 12]
    assert sizes["adj"].tolist() == [0, 2, 12]


def test_symmetric_by_hand():
    full = symmetric(torch.tensor([[1.0, 2.0, 3.0]]), 3)
    assert full.tolist() == [[[0, 1, 2], [1, 0, 3], [2, 3, 0]]]
    kept = masked({"x": torch.ones(1, 3, 1), "adj": full}, torch.tensor([[True, True, False]]))
    assert kept["adj"].tolist() == [[[0, 1, 0], [1, 0, 0], [0, 0, 0]]]
    assert kept["x"].flatten().tolist() == [1, 1, 0]


def test_components_have_their_own_processes():
    process = GraphProcess(adj=VE(0.2, 1.0))
    assert float(process["adj"].level(1.0).sigma) == pytest.approx(1.0)
    assert float(process["x"].level(1.0).alpha) == pytest.approx(0.7596, abs=1e-4)
