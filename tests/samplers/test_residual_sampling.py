"""ResShift sampled by our parts, against the reference's updates of whole images (tad_sr.md 2.3 and 10)."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sgm.processes import CLEAN, VP, DDPMChain, ResidualShift
from lightning_sgm.random import Draw
from lightning_sgm.residual_denoiser import ResidualDenoiser
from lightning_sgm.samplers import Ancestral, ChainGrid, DPMpp2M, Euler, EulerMaruyama, Heun, Sampler
from lightning_sgm.samplers.residual import TrailingChain, invert
from lightning_sgm.samplers.rules import euler, euler_scales
from lightning_sgm.testing import check_rule

PROCESS = ResidualShift()
ETA = PROCESS.table**2


class Toy(nn.Module):
    """x_0 of an image, its index and the degraded image; without ``state`` it ignores the image."""

    conditions = ("low",)

    def __init__(self, state=1.0):
        super().__init__()
        self.state = state

    def forward(self, x, label, /, low):
        return torch.sin(2 * low + self.state * x) + 0.02 * label.to(x).reshape(-1, 1)


def estimate(network, x, i, low):
    """The reference's x_0: the network on a scaled image."""
    return network(x / torch.sqrt(4 * ETA[i] + 1), torch.full((len(x),), float(i)), low)


def case(rows=4):
    draw = Draw(9)
    y, low = (draw.normal((rows, 3), torch.float64) for _ in range(2))
    return y, low, draw.normal((rows, 3), torch.float64)


def prior(y, noise):
    return y + 2 * ETA[14].sqrt() * noise


def deterministic(eta, before, x0, x, y):
    """The reference's step from eta to the eta before, as printed."""
    m = (before / eta).sqrt()
    j = before - (before * eta).sqrt()
    k = 1 - before + (before * eta).sqrt() - m
    return k * x0 + m * x + j * y


# Deterministic.


@given(st.floats(1e-4, 1.0), st.floats(0.0, 1.0))
def test_the_deterministic_step_is_eulers_on_residuals(eta, share):
    at, before = torch.tensor(eta).double(), torch.tensor(eta * share).double()
    y, x0, x = case(1)
    level = CLEAN._replace(alpha=1 - at, sigma=0.7 * at.sqrt())
    target = CLEAN._replace(alpha=1 - before, sigma=0.7 * before.sqrt())
    found = y + euler(x - y, x0 - y, level, target)
    torch.testing.assert_close(found, deterministic(at, before, x0, x, y), rtol=1e-10, atol=1e-10)
    m, k = euler_scales(level, target)
    torch.testing.assert_close(m, (before / at).sqrt(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(k, 1 - before + (before * at).sqrt() - m, rtol=1e-9, atol=1e-12)


def test_a_deterministic_run_is_the_references():
    (y, low, noise), network = case(), Toy()
    sampler = Sampler(Euler(), 15, ChainGrid())
    start = prior(y, noise)
    found = y + sampler(ResidualDenoiser(network, PROCESS), None, Draw(0), start=start - y, low=low, origin=y)
    assert sampler.evaluations == 15
    x = start
    for i in range(14, -1, -1):
        x0 = estimate(network, x, i, low)
        x = deterministic(ETA[i], ETA[i - 1], x0, x, y) if i else x0
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


def test_with_the_true_image_it_keeps_the_noise():
    x0, y, noise = case()
    levels = [PROCESS.level(PROCESS.time(i)) for i in range(14, -1, -1)]
    r = PROCESS.perturb(x0 - y, levels[0], noise)
    for level, target in pairwise(levels):
        r = euler(r, x0 - y, level, target)
        eta = (target.sigma / 2) ** 2
        torch.testing.assert_close(y + r, x0 + eta * (y - x0) + 2 * eta.sqrt() * noise, rtol=1e-10, atol=1e-10)


def test_one_step_is_the_students():
    (y, low, noise), network = case(), Toy()
    for rule, grid in ((Euler(), TrailingChain()), (Ancestral(), ChainGrid())):
        sampler = Sampler(rule, 1, grid)
        start = 2 * ETA[14].sqrt() * noise
        found = y + sampler(ResidualDenoiser(network, PROCESS), None, Draw(0), start=start, low=low, origin=y)
        torch.testing.assert_close(found, estimate(network, prior(y, noise), 14, low))
        assert sampler.evaluations == 1


# Ancestral.


def test_an_ancestral_run_is_the_references():
    (y, low, noise), network = case(), Toy()
    start = prior(y, noise)
    sampler = Sampler(Ancestral(), 15, ChainGrid())
    found = y + sampler(ResidualDenoiser(network, PROCESS), None, Draw(3), start=start - y, low=low, origin=y)
    assert sampler.evaluations == 15
    x, draw = start, Draw(3)
    for i in range(14, -1, -1):
        x0 = estimate(network, x, i, low)
        before = ETA[i - 1] if i else torch.tensor(0.0).double()
        gap = ETA[i] - before
        x = before / ETA[i] * x + gap / ETA[i] * x0
        if i:
            x = x + 2 * (before / ETA[i] * gap).sqrt() * draw.normal((4, 3), torch.float64)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_start_noise_is_the_prior_of_the_last_index():
    for grid, steps in ((ChainGrid(), 15), (TrailingChain(), 4), (TrailingChain(), 1)):
        found = Sampler(Ancestral(), steps, grid).prior(PROCESS, (3, 2), Draw(1))
        torch.testing.assert_close(found, Draw(1).normal((3, 2)) * 1.98)


@pytest.mark.parametrize("process", [ResidualShift(), ResidualShift(kappa=0.3)], ids=["kappa 2", "kappa 0.3"])
@pytest.mark.parametrize(
    "rule", [Ancestral(), Euler(), Heun(), DPMpp2M(), EulerMaruyama()], ids=lambda rule: type(rule).__name__
)
def test_shared_rules_sample_residuals(rule, process):
    check_rule(rule, process)


# Inverse.


def test_a_run_and_its_inverse_are_the_identity_for_a_network_that_ignores_the_state():
    y, low, noise = case()
    denoiser, start = ResidualDenoiser(Toy(state=0.0), PROCESS), 1.98 * noise
    for steps, grid in ((14, ChainGrid()), (3, TrailingChain())):
        sampler = Sampler(Euler(), steps, grid, finish="state")
        r = sampler(denoiser, None, Draw(0), start=start, low=low, origin=y)
        assert not torch.allclose(r, start)
        back = invert(denoiser, r, sampler.levels(PROCESS), low=low, origin=y)
        torch.testing.assert_close(back, start, rtol=1e-9, atol=1e-9)


def test_each_inverse_step_is_the_references():
    (y, low, x), network = case(), Toy()
    levels = [PROCESS.level(PROCESS.time(i)) for i in (8, 5)]
    found = y + invert(ResidualDenoiser(network, PROCESS), x - y, [*levels, CLEAN], low=low, origin=y)
    m = (ETA[5] / ETA[8]).sqrt()
    j = ETA[5] - (ETA[5] * ETA[8]).sqrt()
    k = 1 - ETA[5] + (ETA[5] * ETA[8]).sqrt() - m
    torch.testing.assert_close(found, (x - k * estimate(network, x, 8, low) - j * y) / m, rtol=1e-9, atol=1e-9)


# Grids.


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [14]), (2, [14, 7]), (4, [14, 11, 7, 3]), (15, list(range(14, -1, -1)))]
)
def test_trailing_indices_are_tad_srs(steps, expected):
    levels = Sampler(Euler(), steps, TrailingChain()).levels(PROCESS)
    assert [float(PROCESS.index(level.t)) for level in levels[:-1]] == expected
    assert levels[-1] == CLEAN


@given(st.integers(2, 200), st.data())
def test_any_number_of_steps_begins_at_the_last_index(total, data):
    chain, steps = ResidualShift(total), data.draw(st.integers(1, total))
    times = TrailingChain().times(chain, steps - 1)
    index = chain.index(times)
    assert len(index) == steps
    assert (index[0], times[0]) == (total - 1, 1)
    # Every gap is T / N, rounded, and so is the one to no noise.
    gaps = torch.cat([-index.diff(), index[-1:] + 1])
    assert gaps.min() >= total // steps
    assert gaps.max() <= -(-total // steps)
    assert torch.equal(ChainGrid().times(chain, total - 1), TrailingChain().times(chain, total - 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrailingChain()(VP(), 3), "TrailingChain needs a discrete chain, and VP is none"),
        (lambda: Sampler(Euler(), 16, TrailingChain()).levels(PROCESS), "16 levels of a chain of 15: .* 15 steps"),
        (lambda: TrailingChain()(DDPMChain(30), 30), "cannot visit 31 levels"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
