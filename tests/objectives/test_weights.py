"""OutputWeight: the plain squared error of what a network says, held against the weights that name it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sgm.denoiser import (
    BaseDenoiser,
    Denoiser,
    EDMPreconditioning,
    GaussianMixtureDenoiser,
    Preconditioning,
)
from lightning_sgm.linear_denoiser import LinearDenoiser, LinearPreconditioning
from lightning_sgm.objectives import (
    DataWeight,
    DenoisingObjective,
    EDMWeight,
    NoiseWeight,
    OutputWeight,
    Population,
    PopulationObjective,
    Times,
    VelocityWeight,
    VWeight,
)
from lightning_sgm.processes import EDM, VP, Cosine, Flow
from lightning_sgm.random import Draw
from tests.methods.series_models import moments

PROCESSES = {"EDM": EDM(), "VP": VP(), "cosine": Cosine(), "flow": Flow()}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
SHAPE = (4, 3)


class Wavy(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x, label, /):
        return torch.sin(3 * self.scale * x) + 0.1


class Zero(nn.Module):
    def forward(self, x, label, /):
        return torch.zeros_like(x)


def loss(weight, denoiser, t, rows=6, objective=DenoisingObjective):
    x0 = Draw(1).normal((rows, *SHAPE), torch.float64)
    return objective(weight=weight).at(torch.full((rows,), t, dtype=torch.float64), denoiser, x0, Draw(2))


@every_process
@pytest.mark.parametrize(
    ("preconditioning", "weight"),
    [
        (EDMPreconditioning(0.7), EDMWeight(0.7)),
        (Preconditioning("noise"), NoiseWeight()),
        (Preconditioning("x0"), DataWeight()),
        (Preconditioning("v"), VWeight()),
        (Preconditioning("velocity"), VelocityWeight()),
    ],
    ids=["EDM", "noise", "x0", "v", "velocity"],
)
@settings(max_examples=15)
@given(st.floats(0.01, 0.99))
def test_it_is_the_weight_of_the_prediction(process, preconditioning, weight, t):
    denoiser = Denoiser(Wavy(), process, preconditioning)
    found, expected = loss(OutputWeight(), denoiser, t), loss(weight, denoiser, t)
    assert found.shape == (6,)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_it_is_none_of_another_prediction():
    denoiser = Denoiser(Wavy(), VP(), EDMPreconditioning(0.7))
    assert not torch.allclose(loss(OutputWeight(), denoiser, 0.3), loss(EDMWeight(0.5), denoiser, 0.3), rtol=0.01)


def test_low_precision_is_squared_in_float32():
    denoiser = Denoiser(Wavy(), VP(), EDMPreconditioning(0.7))
    error, level = torch.full((2, *SHAPE), 0.1, dtype=torch.bfloat16), VP().level(torch.full((2,), 0.3))
    found = OutputWeight().squared(error, level, denoiser)
    assert found.shape == (2, 12)
    assert found.dtype == torch.float32
    expected = EDMWeight(0.7)(level, VP())[:, None] * error.flatten(1).double() ** 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "denoiser",
    [GaussianMixtureDenoiser(VP(), torch.zeros(1, 12).double(), torch.eye(12)[None].double()), BaseDenoiser(VP())],
)
def test_denoisers_without_a_network_are_refused(denoiser):
    with pytest.raises(ValueError, match=f"OutputWeight is for training a network, {type(denoiser).__name__} is none"):
        OutputWeight().squared(torch.zeros(1, *SHAPE), VP().level(torch.tensor([0.5])), denoiser)


# Under LinearPreconditioning.


def linear(process, network, dead=0):
    variances = torch.logspace(-5, 0, 12, dtype=torch.float64)
    variances[:dead] = 0.0
    basis = torch.linalg.qr(Draw(4).normal((12, 12), torch.float64)).Q
    mean = Draw(5).normal((12,), torch.float64)
    known = moments(mean, basis, variances, SHAPE)
    x0 = mean + Draw(6).normal((3000, 12), torch.float64) * known.variances.sqrt() @ known.basis.T
    return LinearDenoiser(network, process, LinearPreconditioning(), known), x0.view(-1, *SHAPE)


@every_process
@pytest.mark.parametrize("dead", [0, 4])
@pytest.mark.parametrize("t", [0.02, 0.3, 0.6, 0.95])
def test_where_nothing_is_to_be_corrected_errors_are_of_unit_variance(process, dead, t):
    """At every level, and whatever the variances: the mean over directions of squares of standard normal numbers."""
    denoiser, x0 = linear(process, Zero(), dead)
    at = torch.full((len(x0),), t, dtype=torch.float64)
    found = DenoisingObjective(weight=OutputWeight()).at(at, denoiser, x0, Draw(7))
    assert float(found.mean()) == pytest.approx(1.0, abs=4 * float(found.std()) / len(x0) ** 0.5)
    assert float(found.var()) == pytest.approx(2 / (12 - dead), rel=0.15)


@pytest.mark.parametrize("population", [None, Population(1.0)])
def test_it_weighs_the_objective_of_pad_ts(population):
    network = Wavy()
    denoiser, x0 = linear(EDM(5e-4, 40.0), network, 4)
    objective = PopulationObjective(times=_Spread(), weight=OutputWeight(), population=population)
    found = objective(denoiser, x0[:64], Draw(8))
    assert found["error"].shape == (64,)
    expected = objective.at(_Spread()(denoiser.process, 64, Draw(0)), denoiser, x0[:64], Draw(8))
    torch.testing.assert_close(found["error"], expected)
    more = found["population"] if population else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(found["loss"] - found["error"], more.double().expand(64), rtol=1e-5, atol=1e-6)
    found["loss"].mean().backward()
    assert network.scale.grad is not None
    assert network.scale.grad.isfinite()
    assert network.scale.grad.abs() > 0


class _Spread(Times):
    """Fixed times over all levels."""

    def __call__(self, process, count, draw):
        return torch.linspace(0.05, 0.95, count, dtype=torch.float64)
