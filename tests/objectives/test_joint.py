"""The partial-score objective: closed forms, padding that counts for nothing, gradients that do not mix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datamodules import GraphDataModule
from lightning_sgm.denoiser import Denoiser, Preconditioning
from lightning_sgm.joint_denoiser import JointDenoiser
from lightning_sgm.networks import GraphScore
from lightning_sgm.objectives import DenoisingObjective, JointObjective, UniformTime
from lightning_sgm.processes import VE, VP, GraphProcess
from lightning_sgm.random import Draw

NOISE = {"x": Preconditioning(), "adj": Preconditioning()}


class Zero(nn.Module):
    def forward(self, state: dict[str, Tensor], label: Tensor, /, **conditions: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(part) for name, part in state.items()}


def batch(count: int = 6) -> dict[str, Tensor]:
    return GraphDataModule("community").examples("train", count)


def wider(graphs: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    pad = torch.nn.functional.pad
    return {
        "x": pad(graphs["x"], (0, 0, 0, more)),
        "adj": pad(graphs["adj"], (0, more, 0, more)),
        "node_mask": pad(graphs["node_mask"], (0, more)),
        "index": graphs["index"],
    }


def losses(objective: JointObjective, model: JointDenoiser, graphs: dict[str, Tensor], draw: Draw) -> dict[str, Tensor]:
    state = {name: graphs[name] for name in ("x", "adj")}
    return objective(model, state, draw, node_mask=graphs["node_mask"])


def score_network(features: int) -> GraphScore:
    torch.manual_seed(0)
    return GraphScore({"features": features}, depth=2, width=8, layers=2, attention_width=8, channels=(2, 3, 2))


def test_a_network_of_zeros_costs_one_a_value():
    graphs = {name: value.repeat_interleave(400, 0) for name, value in batch().items()}
    model = JointDenoiser(Zero(), GraphProcess(), NOISE)
    nodes, features = graphs["node_mask"].sum(1).double(), graphs["x"].shape[2]
    sizes = {"x": nodes * features, "adj": nodes * (nodes - 1)}
    half = losses(JointObjective(reduction="half_sum"), model, graphs, Draw(0))
    mean = losses(JointObjective(reduction="mean"), model, graphs, Draw(0))
    for name, size in sizes.items():
        part = half[f"loss_{name}"].double() / (0.5 * size)
        # The mean of chi-square variables; an edge is counted twice, so it has half as many.
        deviation = (2 / (size / (1 if name == "x" else 2))).mean().sqrt() / len(part) ** 0.5
        assert abs(float(part.mean()) - 1) < 5 * float(deviation)
        torch.testing.assert_close(mean[f"loss_{name}"].double(), part, rtol=1e-5, atol=0)
    for found in (half, mean):
        assert torch.equal(found["loss"], found["loss_x"] + found["loss_adj"])


@pytest.mark.parametrize(("loss", "own", "other"), [("loss_x", "x", "adj"), ("loss_adj", "adj", "x")])
def test_a_loss_teaches_its_own_network_only(loss: str, own: str, other: str):
    graphs = batch()
    network = score_network(graphs["x"].shape[2])
    model = JointDenoiser(network, GraphProcess(), NOISE)
    losses(JointObjective(), model, graphs, Draw(0))[loss].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in getattr(network, other).parameters())
    assert all(p.grad is not None and p.grad.any() for p in getattr(network, own).parameters())


@settings(max_examples=15)
@given(st.integers(1, 6), st.sampled_from(["mean", "half_sum"]), st.integers(0, 100))
def test_padding_changes_no_loss(more: int, reduction, seed: int):
    graphs = batch(4)
    model = JointDenoiser(score_network(graphs["x"].shape[2]), GraphProcess(adj=VE(0.2, 1.0)), NOISE)
    objective = JointObjective(UniformTime(), reduction=reduction)
    narrow = losses(objective, model, graphs, Draw(seed, graphs["index"]))
    wide = losses(objective, model, wider(graphs, more), Draw(seed, graphs["index"]))
    for name, value in narrow.items():
        torch.testing.assert_close(wide[name], value, rtol=1e-4, atol=1e-5)


def test_both_components_have_one_time():
    """The network is told one label for each graph, and the noisy state has the level of that time in both parts."""
    process = GraphProcess(VP(0.1, 1.0), VE(0.2, 1.0))
    seen = []

    class Watch(Zero):
        def forward(self, state, label, /, **conditions):
            seen.append((state, label))
            return super().forward(state, label)

    mask = torch.ones(2, 40, dtype=torch.bool)
    empty = {"x": torch.zeros(2, 40, 40), "adj": torch.zeros(2, 40, 40), "node_mask": mask}
    losses(JointObjective(), JointDenoiser(Watch(), process, NOISE), empty, Draw(0))
    ((state, label),) = seen
    for row, t in enumerate((label / 999.0).tolist()):
        pairs = state["adj"][row][torch.ones(40, 40).triu(1).bool()]
        assert float(state["x"][row].std()) == pytest.approx(float(process["x"].level(t).sigma), rel=0.1)
        assert float(pairs.std()) == pytest.approx(float(process["adj"].level(t).sigma), rel=0.15)


def test_losses_of_a_component_are_those_of_the_plain_objective():
    """Graphs of one node: no noise is drawn for pairs, so that of the features is the same."""
    x, times = torch.randn(5, 1, 7), torch.linspace(0.1, 1, 5).double()
    state = {"x": x, "adj": torch.zeros(5, 1, 1)}
    mask = torch.ones(5, 1, dtype=torch.bool)

    class Half(nn.Module):
        def forward(self, state, label, /, **conditions):
            return {name: 0.5 * part for name, part in state.items()} if isinstance(state, dict) else 0.5 * state

    model = JointDenoiser(Half(), GraphProcess(), NOISE)
    found = JointObjective().parts_at(times, model, state, Draw(4), node_mask=mask)
    alone = Denoiser(Half(), VP(0.1, 1.0), Preconditioning())
    torch.testing.assert_close(found["x"], DenoisingObjective().at(times, alone, x, Draw(4)))
    assert not found["adj"].any()  # no pair, no error, and no division by nothing
    torch.testing.assert_close(JointObjective().at(times, model, state, Draw(4), node_mask=mask), found["x"])
