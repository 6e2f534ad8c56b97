"""ResShift against its equations (tad_sr.md 2.1 and 10) and the tables of the reference's code."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgm.processes import CLEAN, VE, GaussianProcess, ResidualShift
from lightning_sgm.random import Draw
from lightning_sgm.testing import check_process

FIFTEEN = (
    ".02 .117165 .176305 .233629 .291574 .351009 .412356 .475858 .541672 .60991 .680658 .753985 .829951 .908606 .99"
)
PROCESSES = {
    "15 steps": ResidualShift(),
    "4 steps": ResidualShift(4, min_noise=0.2),
    "4 steps, SinSR": ResidualShift(4, min_noise=0.2, lower_end="sinsr"),
    "pixels": ResidualShift(kappa=0.3),
    "geometric": ResidualShift(9, power=1.0),
    "shortest": ResidualShift(2),
    "table to the end": ResidualShift(3, 0.5, sqrt_eta=[0.1, 0.5, 1.0]),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
arguments: st.SearchStrategy[dict] = st.builds(
    dict,
    steps=st.integers(2, 60),
    kappa=st.floats(0.05, 5.0),
    min_noise=st.floats(1e-3, 0.5),
    power=st.floats(0.1, 3.0),
    lower_end=st.sampled_from(["resshift", "sinsr"]),
)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def indices(process):
    return process.level(process.time(torch.arange(process.steps)))


class Markov(ResidualShift):
    """The marginals with the posterior that every process has by itself."""

    posterior = GaussianProcess.posterior


# Schedule.


@pytest.mark.parametrize(
    ("process", "table"),
    [
        (ResidualShift(), FIFTEEN),
        (ResidualShift(lower_end="sinsr"), FIFTEEN),
        (ResidualShift(4, min_noise=0.2), ".1 .520096 .761382 .99"),
        (ResidualShift(4, min_noise=0.2, lower_end="sinsr"), ".031623 .37644 .667323 .99"),
    ],
)
def test_tables_are_the_references(process, table):
    expected = tensor([float(value) for value in table.split()])
    torch.testing.assert_close(process.table, expected, rtol=0, atol=6e-7)
    level = indices(process)
    torch.testing.assert_close(level.sigma, 2.0 * process.table, rtol=1e-14, atol=0)
    torch.testing.assert_close(level.alpha, 1 - process.table**2, rtol=1e-13, atol=0)


@given(arguments)
def test_levels_of_the_indices_are_the_formula(given):
    process, steps = ResidualShift(**given), given["steps"]
    start = min(given["min_noise"] / given["kappa"], given["min_noise"])
    start = min(start, math.sqrt(0.001)) if given["lower_end"] == "sinsr" else start
    base = (0.99 / start) ** (1 / (steps - 1))
    table = [start * base ** ((steps - 1) * (i / (steps - 1)) ** given["power"]) for i in range(steps)]
    torch.testing.assert_close(indices(process).sigma, given["kappa"] * tensor(table), rtol=1e-11, atol=0)
    if given["kappa"] >= 1 and given["lower_end"] == "resshift":
        assert float(indices(process).sigma[0]) == pytest.approx(given["min_noise"])


@given(arguments)
def test_eta_grows_from_nothing_to_its_end(given):
    process = ResidualShift(**given)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    eta = process.sqrt_eta(t) ** 2
    assert eta[0] == 0
    assert float(eta[-1]) == pytest.approx(0.99**2)
    assert (eta.diff() > 0).all()
    torch.testing.assert_close(process.alpha(t), 1 - eta, rtol=1e-12, atol=1e-15)


def test_a_given_table_replaces_the_formula():
    formula = ResidualShift(4, min_noise=0.2)
    process = ResidualShift(4, sqrt_eta=formula.table.tolist())
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(process.sigma(t), formula.sigma(t))
    assert float(PROCESSES["table to the end"].level(1.0).alpha) == 0


# One Gaussian process: what every process is checked for, but the posterior and points between the knots.


@pytest.mark.parametrize(
    "arguments", [{}, {"kappa": 0.3}, {"steps": 9, "power": 1.0}, {"steps": 3, "sqrt_eta": [0.1, 0.5, 1.0]}]
)
def test_all_but_the_posterior_is_that_of_the_markov_process_with_these_marginals(arguments):
    # With an even number of steps t = 0.5 is a knot, where the slope of a schedule has a kink of its own: the finite
    # differences of check_process see it at 1e-5, so those processes have the closed forms below only.
    check_process(Markov(**arguments))
    with pytest.raises(AssertionError, match=r"posterior mean of .* is not Bayes' rule"):
        check_process(ResidualShift(**arguments))


@every_process
@given(t=st.floats(0.01, 0.999))
@settings(deadline=None)
def test_drift_and_diffusion_in_closed_form(process, t):
    near = tensor([t - 1e-6, t + 1e-6])
    eta, slope = float(process.sqrt_eta(tensor(t))) ** 2, float((process.sqrt_eta(near) ** 2).diff()) / 2e-6
    size = 1e-4 * max(slope, 1e-3)
    assert float(process.drift(t)) * (1 - eta) == pytest.approx(-slope, abs=size)
    g2 = process.kappa**2 * slope * (1 + eta)
    assert float(process.diffusion(t)) ** 2 * (1 - eta) == pytest.approx(g2, rel=1e-3, abs=size)


@every_process
def test_time_from_level_and_back(process):
    t = torch.cat([process.time(torch.arange(process.steps)), torch.linspace(0.001, 0.999, 77).double()])
    torch.testing.assert_close(process.t_from_log_snr(process.log_snr(t)), t, rtol=1e-9, atol=1e-12)
    ends = process.t_from_log_snr(tensor([-math.inf, 500.0, math.inf]))
    torch.testing.assert_close(ends, tensor([1.0, 0.0, 0.0]), rtol=0, atol=1e-12)


# The chain, given the data.


def moments(process, x0, levels):
    """Mean and variance of r at the last level, by the one-step kernels from the data on."""
    mean, variance = x0, tensor(0.0)
    for s, t in pairwise(levels):
        # The kernel's mean is r_s plus a constant, so variances add up.
        mean, std = process.shift(x0, mean, s, t)
        variance = variance + std**2
    return mean, variance


@every_process
def test_steps_of_the_chain_compose_to_its_marginals(process):
    x0 = tensor([[0.4, -1.2]])
    levels = [CLEAN, *(process.level(process.time(i)) for i in range(process.steps))]
    for stop in range(2, len(levels) + 1):
        mean, variance = moments(process, x0, levels[:stop])
        torch.testing.assert_close(mean, levels[stop - 1].alpha * x0, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(variance.sqrt(), levels[stop - 1].sigma, rtol=1e-12, atol=0)


def test_one_step_is_the_papers():
    process, x, x0 = ResidualShift(), tensor([[1.0, 2.0]]), tensor([[0.4, -1.2]])
    eta = process.table**2
    mean, std = process.shift(x0, x, process.level(process.time(6)), process.level(process.time(7)))
    torch.testing.assert_close(mean, x - (eta[7] - eta[6]) * x0)
    torch.testing.assert_close(std, 2.0 * torch.sqrt(eta[7] - eta[6]))


@every_process
@given(s=st.floats(0.02, 0.9), share=st.floats(1e-3, 1.0))
@settings(deadline=None)
def test_posterior_is_bayes_rule_for_the_chain(process, s, share):
    at_s, at_t = process.level(s), process.level(s + share * (1 - s))
    x0, x = tensor([[-0.7, 0.2]]), tensor([[1.1, -0.4]])
    # Likelihood of r_s: N(x; r_s + offset, std^2); prior N(alpha_s x_0, sigma_s^2).
    offset, std = process.shift(x0, torch.zeros_like(x0), at_s, at_t)
    precision = at_s.sigma**-2 + std**-2
    mean, found = process.posterior(x0, x, at_t, at_s)
    expected = (at_s.alpha * x0 / at_s.sigma**2 + (x - offset) / std**2) / precision
    torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found, precision**-0.5, rtol=1e-7, atol=0)


def test_posterior_is_the_references():
    process, x, x0 = ResidualShift(), tensor([[1.0, 2.0]]), tensor([[0.4, -1.2]])
    eta = process.table**2
    for i in range(1, 15):
        mean, std = process.posterior(x0, x, process.level(process.time(i)), process.level(process.time(i - 1)))
        torch.testing.assert_close(mean, eta[i - 1] / eta[i] * x + (eta[i] - eta[i - 1]) / eta[i] * x0)
        torch.testing.assert_close(std, 2.0 * torch.sqrt(eta[i - 1] / eta[i] * (eta[i] - eta[i - 1])))
    mean, std = process.posterior(x0, x, process.level(process.time(0)), CLEAN)
    assert torch.equal(mean, x0)
    assert std == 0


@every_process
@given(s=st.floats(0.0, 0.99), t=st.floats(0.01, 1.0))
@settings(deadline=None)
def test_posterior_takes_means_to_means_and_marginals_to_marginals(process, s, t):
    if s >= t:
        return
    at_s, at_t, x0 = process.level(s), process.level(t), tensor([[0.9, -0.1]])
    mean, std = process.posterior(x0, at_t.alpha * x0, at_t, at_s)
    torch.testing.assert_close(mean, at_s.alpha * x0, rtol=1e-9, atol=1e-12)
    variance = (at_s.sigma / at_t.sigma) ** 4 * at_t.sigma**2 + std**2
    torch.testing.assert_close(variance, at_s.sigma**2, rtol=1e-9, atol=0)


def test_an_image_that_is_not_degraded_only_gets_noise():
    # y = x_0: r_0 = 0, a variance-exploding process around x_0.
    process, nothing, x = ResidualShift(), tensor([[0.0]]), tensor([[0.8]])
    s, t = process.level(0.4), process.level(0.7)
    explode = VE(0.01, 10.0)
    at_s, at_t = (explode.level(explode.t_from_ratio(level.sigma)) for level in (s, t))
    for found, expected in zip(
        process.posterior(nothing, x, t, s), explode.posterior(nothing, x, at_t, at_s), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    mean, std = process.shift(nothing, x, s, t)
    assert torch.equal(mean, x)
    torch.testing.assert_close(std, explode.transition(at_s, at_t)[1], rtol=1e-7, atol=0)


def test_prior_is_noise_around_the_degraded_image():
    noise = ResidualShift(kappa=0.3).prior((4000, 3), Draw(0))
    assert float(noise.std()) == pytest.approx(0.3 * 0.99, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualShift(1), "ResidualShift needs at least 2 steps"),
        (lambda: ResidualShift(kappa=0.0), "kappa of ResidualShift must be positive, got 0"),
        (lambda: ResidualShift(min_noise=0.0), "power > 0 and 0 < min_noise"),
        (lambda: ResidualShift(min_noise=3.0), "< sqrt_eta_end <= 1"),
        (lambda: ResidualShift(power=0.0), "got power 0.0"),
        (lambda: ResidualShift(sqrt_eta_end=1.1), "sqrt_eta_end 1.1"),
        (lambda: ResidualShift(lower_end="new"), "resshift or sinsr, got 'new'"),  # type: ignore[arg-type]
        (lambda: ResidualShift(15, sqrt_eta=[0.1, 0.5]), "2 values for 15 steps"),
        (lambda: ResidualShift(2, sqrt_eta=[0.5, 0.5]), "increase strictly"),
        (lambda: ResidualShift(2, sqrt_eta=[0.0, 0.5]), "increase strictly"),
        (lambda: ResidualShift(2, sqrt_eta=[0.5, 1.5]), r"within \(0, 1\], got \[0.5, 1.5\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
