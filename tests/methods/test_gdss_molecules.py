"""GDSS on molecules: from arrays of noise to SMILES, and the laws of the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from datamodules import MoleculeDataModule
from datamodules.chemistry import decode
from lightning_sgm.denoiser import Preconditioning
from lightning_sgm.methods import GDSS
from lightning_sgm.metrics import MoleculeQuality
from lightning_sgm.networks.base import Network
from lightning_sgm.processes import VE, VP
from lightning_sgm.processes.graph import GraphProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers import Langevin, ReverseDiffusion, Sampler, UniformTime
from lightning_sgm.samplers.splitting import S4

pytest.importorskip("rdkit")


class Fixed(Network):
    """Knows the answer: always the same molecule."""

    conditions = ("node_mask",)

    def __init__(self, x: torch.Tensor, adj: torch.Tensor) -> None:
        super().__init__()
        self.x, self.adj = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)  # two parts, as GDSS's networks have
        self.answer = {"x": x, "adj": adj}

    def forward(self, state: dict[str, torch.Tensor], label: torch.Tensor, node_mask: torch.Tensor) -> Any:
        return {name: value.expand_as(state[name]) for name, value in self.answer.items()}


@pytest.fixture(scope="module")
def data():
    return MoleculeDataModule(dataset="grown")


@pytest.fixture
def make(data):
    """A model that knows one molecule of five atoms, fluoroacetamide."""
    x = torch.nn.functional.one_hot(torch.tensor([0, 0, 2, 1, 3]), 4).float()
    adj = torch.zeros(5, 5)
    for i, j, order in [(0, 1, 1), (1, 2, 2), (1, 3, 1), (0, 4, 1)]:
        adj[i, j] = adj[j, i] = order

    def model(**options: Any) -> GDSS:
        known = Preconditioning("x0")
        given: dict[str, Any] = {"nodes": 5, "x_preconditioning": known, "adj_preconditioning": known} | options
        return GDSS(Fixed(x, adj), data.spec, **given)

    return model


GRID = UniformTime(1e-4)
SAMPLERS = {
    "Reverse": Sampler(ReverseDiffusion(), 20, GRID, [Langevin(0.2, noise_scale=0.7)]),
    "S4": Sampler(S4(Langevin(0.2, noise_scale=0.7)), 20, GRID),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("process", [VE(0.1, 1.0), VP(0.1, 1.0)], ids=["VE", "VP"])
@pytest.mark.parametrize("start", ["standard", "matched"])
def test_a_model_that_knows_one_molecule_draws_it(make, data, sampler, process, start):
    model = make(process=GraphProcess(process, process), sampler=sampler, start=start)
    batch = model.sample(torch.arange(7))
    assert batch["x"].shape == (7, 9, 4)
    assert batch["adj"].shape == (7, 9, 9)
    found = decode(batch["x"], batch["adj"], batch["node_mask"], data.spec["atoms"])
    assert {(molecule.smiles, molecule.valid, molecule.fragments) for molecule in found} == {("NC(=O)CF", True, 1)}
    quality = MoleculeQuality()
    quality.prepare(data)
    quality.update(batch["x"], batch["adj"], batch["node_mask"], real=False)
    numbers = {name: float(value) for name, value in quality.compute().items()}
    assert numbers["valid"] == 1.0
    assert numbers["unique"] == pytest.approx(1 / 7)


def test_what_a_state_becomes(make, monkeypatch):
    """Bond orders change at 0.5, 1.5, 2.5; an atom needs more than 0.5 and takes its largest channel, the first."""
    model = make()
    low, high = [0.499, 1.499, 2.499, 7.0], [0.5, 1.5, 2.5, -3.0]
    adj = torch.zeros(2, 5, 5)
    for row, values in enumerate((low, high)):
        adj[row, 0, 1:] = adj[row, 1:, 0] = torch.tensor(values)
    x = torch.tensor(
        [[0.6, 0.9, 0.0, 0.0], [0.7, 0.2, 0.7, 0.0], [0.5, 0.5, 0.5, 0.5], [-1.0, 0.0, 0.0, 0.51], [0.0] * 4]
    )
    monkeypatch.setattr(model, "run", lambda *_, **more: {"x": x.expand(2, 5, 4), "adj": adj})
    batch = model.sample(torch.arange(2))
    assert batch["adj"][0, 0, 1:5].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert batch["adj"][1, 0, 1:5].tolist() == [1.0, 2.0, 3.0, 0.0]
    assert batch["x"][0, :5].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch["adj"].shape[1:] == (9, 9)
    assert not batch["adj"][:, 5:].any()
    assert batch["node_mask"].sum(1).tolist() == [5, 5]


@pytest.mark.parametrize("process", [VE(0.2, 1.0), VP(0.1, 1.0)], ids=["VE", "VP"])
def test_a_matched_start_is_where_the_noisy_data_are(data, make, process):
    """Mean and variance of bonds and of each type of atom, against molecules that were noised to t = 1."""
    model = make(process=GraphProcess(process, process), start="matched", nodes=None)
    starts = {}

    class Remembering(Sampler):
        def __call__(self, *arguments: Any, start: Any, **more: Any) -> Any:  # type: ignore[override]
            starts.update(start)
            return start

    model.sampler = Remembering()
    model.sample(torch.arange(20_000))
    batch = data.fetch("train", torch.arange(data.count("train")), None)
    level, draw = process.level(torch.tensor(1.0, dtype=torch.float64)), Draw(5)
    nodes = batch["node_mask"]
    pairs = nodes[:, :, None] & nodes[:, None] & ~torch.eye(nodes.shape[1], dtype=torch.bool)
    drawn = model.draw_node_mask(torch.arange(20_000))
    drawn_pairs = drawn[:, :, None] & drawn[:, None] & ~torch.eye(drawn.shape[1], dtype=torch.bool)
    for name, there, ours in (("x", nodes, drawn), ("adj", pairs, drawn_pairs)):
        noisy = process.perturb(batch[name], level, draw.normal(batch[name].shape, torch.float32))[there].double()
        found = starts[name][ours].double()
        # Some 20,000 x 8 values, of which a molecule's do not depend on each other much.
        torch.testing.assert_close(found.mean(0), noisy.mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(found.std(0), noisy.std(0), rtol=0, atol=0.02)
    assert not starts["adj"].diagonal(dim1=1, dim2=2).any()
    assert not starts["x"][~drawn].any()


def test_norms_of_the_batch_make_a_molecule_depend_on_it(data):
    """The authors' corrector does; ours does not, so that sample 3 is the same in any batch."""

    class Noisy(Network):
        conditions = ("node_mask",)

        def forward(self, state: dict[str, torch.Tensor], label: torch.Tensor, node_mask: torch.Tensor) -> Any:
            return {name: 0.5 * value + 0.1 for name, value in state.items()}

    def drawn(norm: Any, indices: list[int]) -> torch.Tensor:
        sampler = Sampler(ReverseDiffusion(), 4, GRID, [Langevin(0.2, noise_scale=0.7, norm=norm)])
        model = GDSS(Noisy(), data.spec, sampler=sampler)
        mask = torch.arange(9).expand(len(indices), 9) < 6
        return model.run(torch.tensor(indices), mask)["adj"][indices.index(3)]

    torch.testing.assert_close(drawn("sample", [3]), drawn("sample", [0, 3, 8]))
    assert (drawn("batch", [3]) - drawn("batch", [0, 3, 8])).abs().max() > 1e-3


class Molecules:
    """In place of a sampler: given molecules (n, 5), the rest of the atoms outside."""

    evaluations = 1

    def __init__(self, x: torch.Tensor, adj: torch.Tensor) -> None:
        self.state = {"x": x, "adj": adj}
        self.calls = 0

    def __call__(self, denoiser: Any, shape: Any, draw: Draw, *, start: Any, **more: Any) -> Any:
        self.calls += 1
        return {name: value[: len(start["x"])] for name, value in self.state.items()}


@pytest.mark.parametrize(
    ("atoms", "bonds", "whole"),
    [
        ([0, 2, 1], [(0, 1), (1, 2)], True),
        ([0], [], True),
        ([0, 2, 1, 0], [(0, 1), (2, 3)], False),
        ([0, 2, 1], [(0, 1)], False),  # an atom alone is a piece
        ([0, 2], [], False),
        ([0, None, 1], [(0, 1), (1, 2)], False),  # what held the two is no atom
        ([0, 2, None], [(0, 1), (1, 2)], True),
        ([None, None], [(0, 1)], False),  # nothing is no molecule
    ],
)
def test_connected_molecules_are_in_one_piece(make, atoms: list[int | None], bonds: list[tuple[int, int]], whole: bool):
    """As ``decode`` counts pieces, by rdkit."""
    x, adj = torch.zeros(1, 5, 4), torch.zeros(1, 5, 5)
    for i, atom in enumerate(atoms):
        if atom is not None:
            x[0, i, atom] = 1.0
    for i, j in bonds:
        adj[0, i, j] = adj[0, j, i] = 1.0
    model = make(connected=True)
    model.sampler = sampler = Molecules(x, adj)
    found = model.sample(torch.arange(1))
    assert (sampler.calls == 1) is whole
    (molecule,) = decode(found["x"], found["adj"], found["node_mask"], model.spec["atoms"])
    assert (molecule.fragments == 1) is whole
