"""The joint denoiser: answers of all kinds agree, and each component's is that of a denoiser of its own."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sgm.denoiser import Denoiser, EDMPreconditioning, Preconditioning, Prediction
from lightning_sgm.joint_denoiser import JointDenoiser
from lightning_sgm.processes import VE, VP, GraphProcess, SubVP

PROCESSES = {"VP": VP(0.1, 1.0), "VE": VE(0.2, 1.0), "sub-VP": SubVP()}
PREDICTIONS = get_args(Prediction)
QUANTITIES = ("x0", "noise", "score", "velocity")
kinds = st.sampled_from(sorted(PROCESSES))
predictions = st.sampled_from(PREDICTIONS)
times = st.floats(0.02, 1.0)


class Part(nn.Module):
    """Some function of one component and the label."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, label: Tensor, /, **conditions: Tensor) -> Tensor:
        return torch.tanh(self.factor * x) + 1e-3 * label.reshape(-1, *(1,) * (x.ndim - 1))


class Pair(nn.Module):
    """Two such functions that do not see each other's component; keeps what it was given."""

    conditions = ("node_mask",)

    def __init__(self) -> None:
        super().__init__()
        self.parts: Any = {"x": Part(0.7), "adj": Part(-1.3)}
        self.seen: Any = None

    def forward(self, state: dict[str, Tensor], label: Tensor, /, **conditions: Tensor) -> dict[str, Tensor]:
        self.seen = (state, label, conditions)
        return {name: part(state[name], label) for name, part in self.parts.items()}


def state(batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (batch, 4, 2), "adj": (batch, 4, 4)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def joint(kinds: tuple[str, str], predictions: tuple[Any, Any]) -> JointDenoiser:
    process = GraphProcess(*(PROCESSES[kind] for kind in kinds))
    parts = {name: Preconditioning(kind) for name, kind in zip(("x", "adj"), predictions, strict=True)}
    return JointDenoiser(Pair(), process, parts)


def parts_of(model: JointDenoiser) -> Any:
    return model.network.parts


@settings(max_examples=60)
@given(kinds, kinds, predictions, predictions, times)
def test_the_four_answers_agree_with_each_other(first, second, one, two, t):
    model, x = joint((first, second), (one, two)), state()
    x0, noise, score, velocity = (getattr(model, quantity)(x, t) for quantity in QUANTITIES)
    for name, process in model.process.items():
        level = process.level(t)
        d_alpha, d_sigma = process.derivatives(level.t)
        torch.testing.assert_close(level.alpha * x0[name] + level.sigma * noise[name], x[name], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(score[name], -noise[name] / level.sigma, rtol=1e-8, atol=1e-8)
        expected = d_alpha * x0[name] + d_sigma * noise[name]
        torch.testing.assert_close(velocity[name], expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(kinds, predictions, predictions, times, st.sampled_from(QUANTITIES))
def test_a_component_is_answered_like_a_state_of_its_own(kind, one, two, t, quantity):
    model, x = joint((kind, kind), (one, two)), state()
    found = getattr(model, quantity)(x, t)
    for name, preconditioning in model.preconditioning.items():
        alone = Denoiser(parts_of(model)[name], PROCESSES[kind], preconditioning)
        torch.testing.assert_close(found[name], getattr(alone, quantity)(x[name], t), rtol=1e-12, atol=1e-12)


def test_noise_of_a_network_that_gives_the_score_under_ve():
    """GDSS's networks under VE: the noise is -sigma o (gdss.md section 2)."""
    model, x, t = joint(("VP", "VE"), ("noise", "score")), state(), torch.tensor([0.1, 0.5, 1.0]).double()
    found = model.noise(x, t)
    label = 999.0 * t
    sigma = (0.2 * 5.0**t).reshape(3, 1, 1)
    torch.testing.assert_close(found["adj"], -sigma * parts_of(model)["adj"](x["adj"], label))
    torch.testing.assert_close(found["x"], parts_of(model)["x"](x["x"], label))


def test_the_network_sees_scaled_states_and_the_conditions():
    process = GraphProcess(VP(0.1, 1.0), VE(0.2, 1.0))
    parts = {"x": EDMPreconditioning(0.5), "adj": EDMPreconditioning(0.3)}
    pair = Pair()
    model, x = JointDenoiser(pair, process, parts), state()
    mask = torch.ones(3, 4, dtype=torch.bool)
    model.x0(x, 0.4, node_mask=mask)
    scaled, label, conditions = pair.seen
    for name, part in parts.items():
        level = process[name].level(0.4)
        torch.testing.assert_close(
            scaled[name], x[name] / torch.sqrt(level.sigma**2 + (level.alpha * part.sigma_data) ** 2)
        )
    level = process["x"].level(0.4)
    torch.testing.assert_close(label, (0.25 * torch.log(level.sigma / level.alpha)).expand(3))
    assert conditions["node_mask"] is mask
    assert model.conditions == ("node_mask",)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_times_may_be_one_or_one_for_each_example(quantity):
    model, x = joint(("VP", "VE"), ("noise", "score")), state()
    one = getattr(model, quantity)(x, 0.3)
    each = getattr(model, quantity)(x, torch.full((3,), 0.3, dtype=torch.float64))
    for name in x:
        torch.testing.assert_close(one[name], each[name])
