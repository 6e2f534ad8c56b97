"""GDSS on plain graphs: samples one by one, their start and their rounding, samples in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules import GraphDataModule
from lightning_sgm.metrics import GraphMMD
from lightning_sgm.metrics.graphs import describe
from lightning_sgm.processes import VE, VP, GraphProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers import S4, EulerMaruyama, Langevin, Sampler, UniformTime
from tests.methods.graph_models import model

SAMPLERS = {
    "S4": Sampler(S4(Langevin(0.05, noise_scale=0.7)), 5, UniformTime(1e-4)),
    "Euler-Maruyama": Sampler(EulerMaruyama(), 5, UniformTime(1e-4), before=[Langevin(0.05)]),
}


@pytest.fixture(scope="module")
def data() -> GraphDataModule:
    return GraphDataModule(batch_size=16)


class Given:
    """In place of a sampler: gives a known state and keeps the start."""

    steps, evaluations = 1, 0

    def __init__(self, state: dict[str, Tensor] | None = None) -> None:
        self.state = state
        self.start: dict[str, Tensor] = {}

    def __call__(self, denoiser: Any, shape: Any, draw: Draw, *, start: Any, **more: Any) -> Any:
        self.start = start
        return self.state or start


# Samples.


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(data: GraphDataModule, sampler: str):
    gdss = model(data.spec, sampler=SAMPLERS[sampler]).eval()
    with torch.no_grad():
        mask = gdss.draw_node_mask(torch.arange(40))
        whole = gdss.run(torch.arange(40), mask)
        sizes = mask.sum(1)
        small = torch.nonzero(sizes == sizes.min()).squeeze(1)  # their batch is narrower than the whole
        for indices in (torch.arange(8), torch.tensor([33, 5, 20]), small):
            width = int(sizes[indices].max())
            part = gdss.run(indices, gdss.draw_node_mask(indices)[:, :width])
            torch.testing.assert_close(part["x"], whole["x"][indices, :width], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(part["adj"], whole["adj"][indices, :width, :width], rtol=1e-4, atol=1e-4)
        assert int(sizes[small].max()) < mask.shape[1]
        assert whole["adj"].std() > 0.1


def test_samples_keep_the_contract_of_graphs(data: GraphDataModule):
    found = model(data.spec, sampler=SAMPLERS["S4"]).generate(20, batch_size=7)
    nodes = data.spec["nodes"]
    assert found["x"].shape == (20, nodes, data.spec["features"])
    assert found["adj"].shape == (20, nodes, nodes)
    adj, mask = found["adj"], found["node_mask"]
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.arange(nodes) < mask.sum(1, keepdim=True))
    assert set(adj.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(adj, adj.mT)
    assert not adj.diagonal(dim1=1, dim2=2).any()
    assert not adj[~mask].any()
    assert not found["x"][~mask].any()
    assert not torch.equal(adj[0], adj[1])


def test_numbers_of_nodes_are_those_of_training_graphs():
    spec = {"kind": "graph", "nodes": 5, "features": 3, "bonds": 1, "node_counts": [0, 2, 0, 5, 1, 2]}
    drawn = model(spec).draw_node_mask(torch.arange(20000)).sum(1).bincount(minlength=6) / 20000
    expected = torch.tensor(spec["node_counts"]) / 10
    deviation = (expected * (1 - expected) / 20000).sqrt()
    assert ((drawn - expected).abs() <= 5 * deviation).all()
    assert drawn[[0, 2]].tolist() == [0, 0]


def test_numbers_of_nodes_may_be_given(data: GraphDataModule):
    assert model(data.spec, nodes=13).generate(3)["node_mask"].sum(1).tolist() == [13, 13, 13]
    gdss = model(data.spec, sampler=Given()).eval()
    mask = torch.arange(data.spec["nodes"]) < torch.tensor([[4], [9]])
    assert torch.equal(gdss.sample(torch.arange(2), node_mask=mask)["node_mask"], mask)


def mask_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


@pytest.mark.parametrize(
    ("node_mask", "message"),
    [
        (torch.ones(2, 5), r"must be bool of shape \(2, N\), .* got torch.float32 of shape \(2, 5\)"),
        (torch.ones(3, 5, dtype=torch.bool), r"one row for each sample .* of shape \(3, 5\)"),
        (torch.ones(2, 21, dtype=torch.bool), r"N at most 20, .* of shape \(2, 21\)"),
        (torch.ones(2, dtype=torch.bool), r"of shape \(2,\)"),
        (mask_of([1, 1, 0], [1, 0, 1]), r"the nodes first: row 1 is \[1, 0, 1\]"),
        (mask_of([0, 0, 0], [1, 1, 1]), r"one node or more in each row, .* row 0 is \[0, 0, 0\]"),
    ],
)
def test_node_masks_of_another_form_are_refused(data: GraphDataModule, node_mask: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        model(data.spec).sample(torch.arange(2), node_mask=node_mask)


def state_of(edges: list[float], x: Tensor) -> dict[str, Tensor]:
    """One graph of which node 0 is joined to each other one with these values."""
    adj = torch.zeros(1, len(edges) + 1, len(edges) + 1)
    adj[0, 0, 1:] = adj[0, 1:, 0] = torch.tensor(edges)
    return {"x": x, "adj": adj}


def test_edges_are_those_from_one_half():
    spec = {"kind": "graph", "nodes": 6, "features": 2, "bonds": 1, "node_counts": [0, 0, 0, 0, 0, 1, 0]}
    values = [0.4999, 0.5, 1.7, -0.6]
    gdss = model(spec, sampler=Given(state_of(values, torch.full((1, 5, 2), 0.3))))
    found = gdss.generate(1)
    assert found["adj"][0, 0].tolist() == [0, 0, 1, 1, 0, 0]
    assert torch.equal(found["x"][0, :5], torch.full((5, 2), 0.3))  # not used, and not rounded


def test_bonds_and_atoms_are_rounded_too():
    spec = {
        "kind": "molecule",
        "nodes": 8,
        "features": 2,
        "bonds": 3,
        "atoms": ["C", "O"],
        "node_counts": [0] * 7 + [1, 0],
    }
    values = [0.49, 0.5, 1.49, 1.5, 2.5, 9.0]
    x = torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.51, 0.7], [0.6, 0.6], [-1.0, 0.6], [0.2, 0.49], [0.0, 2.0]])
    found = model(spec, sampler=Given(state_of(values, x[None]))).generate(1)
    assert found["adj"][0, 0].tolist() == [0, 0, 1, 1, 2, 3, 3, 0]
    atoms = [[1, 0], [0, 0], [0, 1], [1, 0], [0, 1], [0, 0], [0, 1], [0, 0]]
    assert found["x"][0].tolist() == atoms


# Where samples start.


def inside(state: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values of all pairs (P,) and of all nodes (M, F) inside the mask."""
    both = mask[:, :, None] & mask[:, None, :]
    both = both & torch.ones_like(both[0]).triu(1)
    return state["adj"][both].double(), state["x"][mask].double()


@pytest.mark.parametrize("adj", [VP(0.1, 1.0), VE(0.2, 1.0)], ids=["VP", "VE"])
def test_a_matched_start_is_like_training_data_at_the_end(data: GraphDataModule, adj: Any):
    process = GraphProcess(adj=adj)
    gdss = model(data.spec, process=process, start="matched", sampler=Given())
    sampler: Any = gdss.sampler
    mask = gdss.draw_node_mask(torch.arange(6000))
    gdss.run(torch.arange(6000), mask)
    edges, features = inside(sampler.start, mask)
    assert not sampler.start["adj"].diagonal(dim1=1, dim2=2).any()
    assert torch.equal(sampler.start["adj"], sampler.start["adj"].mT)
    assert not sampler.start["x"][~mask].any()

    graphs = data.examples("train", 70)
    noisy: tuple[list[Tensor], list[Tensor]] = ([], [])
    for seed in range(60):
        noise = process.noise_like(graphs, Draw(seed, graphs["index"]), graphs)
        last = {name: process[name].perturb(graphs[name], process[name].level(1.0), noise[name]) for name in process}
        for held, value in zip(noisy, inside(last, graphs["node_mask"]), strict=True):
            held.append(value)
    for found, expected in zip((edges, features), map(torch.cat, noisy), strict=True):
        torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0, atol=0.015)
        torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.02, atol=0)
    assert edges.mean() > 0.2  # a standard start would have 0


def test_a_standard_start_is_standard(data: GraphDataModule):
    gdss = model(data.spec, sampler=Given())
    sampler: Any = gdss.sampler
    mask = gdss.draw_node_mask(torch.arange(3000))
    gdss.run(torch.arange(3000), mask)
    for values in inside(sampler.start, mask):
        assert float(values.mean()) == pytest.approx(0.0, abs=0.01)
        assert float(values.std()) == pytest.approx(1.0, abs=0.01)


# In one piece.


class Sparse:
    """In place of a sampler: one edge in ten, by the start's noise."""

    steps, evaluations = 1, 7

    def __call__(self, denoiser: Any, shape: Any, draw: Draw, *, start: Any, **more: Any) -> Any:
        return {"x": start["x"], "adj": start["adj"] - 0.8}


def test_connected_samples_are_those_of_the_model_where_they_are_in_one_piece(data: GraphDataModule):
    """Only samples in pieces are drawn again, with noise of their own; the others are what they were."""
    module = model(data.spec)
    module.sampler = Sparse()  # type: ignore[assignment]
    first = module.generate(24)
    assert module.sampler_evaluations == 7
    whole = describe(first["adj"], first["node_mask"], ())["connected"][:, 0] == 1
    assert 0 < whole.sum() < 24
    module.connected = True
    again = module.generate(24)
    assert torch.equal(again["adj"][whole], first["adj"][whole])
    assert torch.equal(again["node_mask"], first["node_mask"])
    assert describe(again["adj"], again["node_mask"], ())["connected"].all()
    assert module.sampler_evaluations > 7
    alone = module.generate(3)
    assert torch.equal(alone["adj"], again["adj"][:3])


@pytest.mark.parametrize("connected", [False, True])
def test_no_samples_have_the_shapes_of_samples(data: GraphDataModule, connected: bool):
    """What a process draws where there are fewer samples than processes; metrics take it, too."""
    found = model(data.spec, connected=connected).sample(torch.arange(0))
    nodes = data.spec["nodes"]
    shapes = {"x": (0, nodes, data.spec["features"]), "adj": (0, nodes, nodes), "node_mask": (0, nodes)}
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    GraphMMD().update(**found, real=False)
