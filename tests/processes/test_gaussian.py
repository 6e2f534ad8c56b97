import math

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgm.processes.gaussian import (
    CLEAN,
    EDM,
    VE,
    VP,
    Cosine,
    Flow,
    GaussianProcess,
    Level,
    SubVP,
    as_time,
    match,
)
from lightning_sgm.random import Draw
from lightning_sgm.testing import check_process

mpmath.mp.dps = 50
PROCESSES = {
    "VP": VP(),
    "VP gentle": VP(0.5, 5.0),
    "sub-VP": SubVP(),
    "VE": VE(),
    "VE unit range": VE(0.01, 50.0),
    "EDM": EDM(),
    "EDM rho 3": EDM(0.01, 10.0, 3.0),
    "cosine": Cosine(),
    "cosine without offset": Cosine(0.0),
    "flow": Flow(),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
times = st.floats(1e-5, 1 - 1e-5)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@every_process
def test_parts_fit_together(process):
    check_process(process)


# Closed forms (Song et al. 2021, table 2.1 of the specification).


def integral(t, low=0.1, high=20.0):
    return low * t + (high - low) * t * t / 2


CLOSED_FORMS = {
    # f, g^2, alpha, sigma
    "VP": lambda t: (
        -(0.1 + 19.9 * t) / 2,
        0.1 + 19.9 * t,
        mpmath.exp(-integral(t) / 2),
        mpmath.sqrt(1 - mpmath.exp(-integral(t))),
    ),
    "sub-VP": lambda t: (
        -(0.1 + 19.9 * t) / 2,
        (0.1 + 19.9 * t) * (1 - mpmath.exp(-2 * integral(t))),
        mpmath.exp(-integral(t) / 2),
        1 - mpmath.exp(-integral(t)),
    ),
    "VE unit range": lambda t: (
        mpmath.mpf(0),
        2 * (0.01 * mpmath.power(5000, t)) ** 2 * mpmath.log(5000),
        mpmath.mpf(1),
        0.01 * mpmath.power(5000, t),
    ),
    "flow": lambda t: (-1 / (1 - t), 2 * t / (1 - t), 1 - t, t),
    "cosine": lambda t: (
        -mpmath.pi / 2 / 1.008 * mpmath.tan((t + 0.008) / 1.008 * mpmath.pi / 2),
        mpmath.pi / 1.008 * mpmath.tan((t + 0.008) / 1.008 * mpmath.pi / 2),
        mpmath.cos((t + 0.008) / 1.008 * mpmath.pi / 2) / mpmath.cos(0.008 / 1.008 * mpmath.pi / 2),
        mpmath.sqrt(
            1 - (mpmath.cos((t + 0.008) / 1.008 * mpmath.pi / 2) / mpmath.cos(0.008 / 1.008 * mpmath.pi / 2)) ** 2
        ),
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@given(t=times)
@settings(deadline=None)
def test_closed_forms(name, t):
    process = PROCESSES[name]
    f, g2, alpha, sigma = (float(v) for v in CLOSED_FORMS[name](mpmath.mpf(t)))
    level = process.level(t)
    assert float(level.alpha) == pytest.approx(alpha, rel=1e-9)
    assert float(level.sigma) == pytest.approx(sigma, rel=1e-9)
    assert float(process.drift(t)) == pytest.approx(f, rel=1e-9, abs=1e-12)
    assert float(process.diffusion(t)) ** 2 == pytest.approx(g2, rel=1e-8)


@pytest.mark.parametrize(
    ("process", "ratios"),
    [
        (VE(0.01, 50.0), (0.01, 0.01, 50.0)),
        (VP(), (1.0005e-3, 0.010486, 152.17)),
        (SubVP(), (1.001e-6, 1.0995e-4, 152.16)),
    ],
)
def test_noise_levels_at_the_times_of_the_papers(process, ratios):
    found = process.level(tensor([1e-5, 1e-3, 1.0])).ratio
    torch.testing.assert_close(found, tensor(ratios), rtol=1e-2 if isinstance(process, VE) else 1e-4, atol=0)


@given(t=times)
@settings(deadline=None)
def test_inverses_by_the_integral_of_beta(t):
    ratio = float(VP().level(t).ratio)
    assert math.log1p(ratio**2) == pytest.approx(integral(t), rel=1e-9)
    ratio = float(SubVP().level(t).ratio)
    assert 2 * math.asinh(ratio / 2) == pytest.approx(integral(t), rel=1e-9)
    assert float(VP().integral(as_time(t))) == pytest.approx(integral(t), rel=1e-12)


@given(t=times, low=st.floats(1e-3, 1.0), spread=st.floats(0.1, 50.0))
@settings(deadline=None)
def test_sub_vp_has_less_noise_than_vp(t, low, spread):
    vp, sub = VP(low, low + spread).level(t), SubVP(low, low + spread).level(t)
    assert sub.sigma <= vp.sigma
    assert sub.alpha == vp.alpha
    assert float(vp.alpha**2 + vp.sigma**2) == pytest.approx(1.0, abs=1e-14)


def test_edm_levels_are_those_of_karras():
    steps = torch.arange(18, dtype=torch.float64)
    karras = (80 ** (1 / 7) + steps / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM().sigma(1 - steps / 17), karras, rtol=1e-12, atol=0)
    torch.testing.assert_close(EDM().sigma(tensor([0.0, 1.0])), tensor([0.002, 80.0]), rtol=1e-12, atol=0)


def test_defaults_end_where_they_say():
    torch.testing.assert_close(VE().sigma(tensor([0.0, 1.0])), tensor([0.02, 100.0]))
    assert Cosine().level(1.0).alpha == 0
    assert Cosine().level(0.0)[1:] == (1.0, 0.0)
    assert Flow().level(1.0)[1:] == (0.0, 1.0)


# Precision near t = 0.


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("t", [1e-9, 1e-7, 1e-5, 1e-4, 1e-3])
def test_no_digits_are_lost_near_zero(name, t):
    process = PROCESSES[name]
    _, _, alpha, sigma = CLOSED_FORMS[name](mpmath.mpf(t))
    assert float(process.sigma(tensor(t))) == pytest.approx(float(sigma), rel=1e-13)
    assert float(process.alpha(tensor(t))) == pytest.approx(float(alpha), rel=1e-13)
    single = torch.tensor(t, dtype=torch.float32)
    _, _, alpha, sigma = CLOSED_FORMS[name](mpmath.mpf(float(single)))
    assert float(process.sigma(single)) == pytest.approx(float(sigma), rel=4e-7)
    assert float(process.alpha(single)) == pytest.approx(float(alpha), rel=4e-7)


@given(s=st.floats(1e-5, 0.999), step=st.floats(1e-13, 1e-3))
@settings(deadline=None)
def test_short_steps_lose_no_digits(s, step):
    t = s + step
    beta = mpmath.mpf(0)
    beta += integral(mpmath.mpf(t)) - integral(mpmath.mpf(s))
    _, std = VP().transition(VP().level(s), VP().level(t))
    # For VP the variance of a transition is 1 - exp(-(B_t - B_s)).
    assert float(std) ** 2 == pytest.approx(float(-mpmath.expm1(-beta)), rel=1e-3, abs=1e-14)


# The SDE simulated forwards.


def simulate(process, steps):
    """Mean and standard deviation of Euler-Maruyama from one point x_0 = 1, exactly, for every time of its grid."""
    t = torch.linspace(1e-5, 1.0, steps + 1, dtype=torch.float64)
    dt = float(t[1] - t[0])
    growth, noise = 1 + process.drift(t) * dt, process.diffusion(t) ** 2 * dt
    start = process.level(t[0])
    mean, variance = [float(start.alpha)], [float(start.sigma) ** 2]
    for factor, added in zip(growth[:-1].tolist(), noise[:-1].tolist(), strict=True):
        mean.append(factor * mean[-1])
        variance.append(factor**2 * variance[-1] + added)
    return process.level(t), tensor(mean), tensor(variance).sqrt()


@pytest.mark.parametrize("process", [VP(), SubVP(), VE(0.01, 50.0), VE()], ids=["VP", "sub-VP", "VE", "VE images"])
def test_euler_maruyama_converges_to_the_marginals(process):
    errors = []
    for steps in (2000, 4000):
        level, mean, std = simulate(process, steps)
        size = float(level.sigma.max())
        errors.append((float((mean - level.alpha).abs().max()), float((std - level.sigma).abs().max()) / size))
    assert errors[0][0] < 3e-3
    assert errors[0][1] < 3e-3
    # First order: half the step, half the error.
    for coarse, fine in zip(*errors, strict=True):
        assert coarse < 1e-9 or 1.8 < coarse / fine < 2.2


@pytest.mark.parametrize("process", [VP(), SubVP(), VE(0.01, 50.0)], ids=["VP", "sub-VP", "VE"])
def test_sampled_euler_maruyama_reproduces_the_marginal(process):
    draw, count, steps = Draw(1), 4000, 2000
    t = torch.linspace(1e-5, 1.0, steps + 1, dtype=torch.float64)
    dt = float(t[1] - t[0])
    growth, noise = (1 + process.drift(t) * dt).tolist(), (process.diffusion(t) * math.sqrt(dt)).tolist()
    x0 = torch.full((count,), 0.7)
    x = process.perturb(x0, process.level(1e-5), draw.normal((count,)))
    for i in range(steps):
        x = growth[i] * x + noise[i] * draw.normal((count,))
        if i + 1 in (steps // 4, steps):
            level = process.level(t[i + 1])
            assert float(x.mean()) == pytest.approx(
                0.7 * float(level.alpha), abs=4 * float(level.sigma) / math.sqrt(count)
            )
            assert float(x.std()) == pytest.approx(float(level.sigma), rel=4 / math.sqrt(2 * count) + 3e-3)


# Inverses.


@every_process
@given(t=times)
@settings(deadline=None)
def test_time_from_level_and_back(process, t):
    assert float(process.t_from_log_snr(process.log_snr(t))) == pytest.approx(t, rel=1e-7, abs=1e-10)
    assert float(process.t_from_ratio(process.level(t).ratio)) == pytest.approx(t, rel=1e-7, abs=1e-10)


@every_process
@given(log_snr=st.floats(-8.0, 7.0))
@settings(deadline=None)
def test_level_from_its_snr(process, log_snr):
    low, high = float(process.log_snr(1.0)), float(process.log_snr(0.0))
    found = float(process.log_snr(process.t_from_log_snr(log_snr)))
    assert found == pytest.approx(min(max(log_snr, low), high), abs=1e-8)


@every_process
@given(log_snr=st.floats(-30.0, 30.0))
@settings(deadline=None)
def test_closed_inverses_agree_with_bisection(process, log_snr):
    closed, bisected = process.t_from_log_snr(log_snr), GaussianProcess.t_from_log_snr(process, log_snr)
    assert float(closed) == pytest.approx(float(bisected), rel=1e-7, abs=1e-10)


@every_process
def test_levels_beyond_the_process_become_its_ends(process):
    t = process.t_from_log_snr(tensor([math.inf, 200.0, -200.0, -math.inf]))
    torch.testing.assert_close(t, tensor([0.0, 0.0, 1.0, 1.0]), rtol=0, atol=1e-12)
    assert ((t >= 0) & (t <= 1)).all()


# Shapes, types, ends.


@every_process
@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.5], dtype=torch.float32), tensor([0.2])])
def test_everything_is_float64_of_the_shape_of_t(process, t):
    shape = torch.as_tensor(t).shape
    found = [*process.level(t), process.level(t).ratio, process.log_snr(t), process.drift(t), process.diffusion(t)]
    found += [*process.derivatives(t), process.t_from_log_snr(process.log_snr(t)), process.t_from_ratio(t)]
    for value in found:
        assert value.dtype == torch.float64
        assert value.shape == shape
        assert value.isfinite().all()


@every_process
def test_ends_hold_no_nan(process):
    level = process.level(tensor([0.0, 1.0]))
    assert level.alpha.isfinite().all()
    assert level.sigma.isfinite().all()
    assert not level.ratio.isnan().any()
    assert not process.log_snr(tensor([0.0, 1.0])).isnan().any()
    assert not process.drift(1.0).isnan()
    assert not process.diffusion(1.0).isnan()
    for value in (*process.derivatives(process.t_min), *process.derivatives(1.0), process.diffusion(process.t_min)):
        assert value.isfinite() or float(process.level(1.0).alpha) == 0


@every_process
def test_steps_from_the_end_and_to_the_clean_level(process):
    start, middle = process.level(1.0), process.level(0.5)
    x0, x = torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, 1.0]])
    for target in (middle, CLEAN):
        mean, std = process.posterior(x0, x, start, target)
        assert mean.isfinite().all()
        assert std.isfinite()
    torch.testing.assert_close(process.posterior(x0, x, start, CLEAN)[0], x0)
    scale, std = process.transition(CLEAN, start)
    assert (scale, std) == (start.alpha, start.sigma)
    if start.alpha == 0:
        # Nothing of the data is left in x_1: the posterior is the marginal at the target.
        mean, std = process.posterior(x0, x, start, middle)
        torch.testing.assert_close(mean, float(middle.alpha) * x0)
        torch.testing.assert_close(std, middle.sigma)


@every_process
def test_derivatives_in_every_grad_mode(process):
    t = tensor([0.2, 0.7])
    u = t.clone().requires_grad_()
    expected = [
        torch.autograd.grad(function(u).sum() + 0 * u.sum(), u)[0] for function in (process.alpha, process.sigma)
    ]
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            for found, truth in zip(process.derivatives(t.clone()), expected, strict=True):
                torch.testing.assert_close(found, truth)


@every_process
def test_one_time_expanded_over_a_batch(process):
    shared = tensor(0.3).expand(5)
    for found, truth in zip(process.derivatives(shared), process.derivatives(0.3), strict=True):
        torch.testing.assert_close(found, truth.expand(5))
    assert process.diffusion(shared).shape == (5,)


def test_perturb_keeps_shape_and_type_and_follows_each_row():
    level = VP().level(tensor([0.1, 0.9]))
    x0, noise = Draw(0).normal((2, 3, 4, 5)), Draw(1).normal((2, 3, 4, 5))
    x = VP().perturb(x0, level, noise)
    assert x.dtype == torch.float32
    for row in range(2):
        torch.testing.assert_close(x[row], float(level.alpha[row]) * x0[row] + float(level.sigma[row]) * noise[row])
    shared = VP().perturb(x0, VP().level(0.1), noise)
    torch.testing.assert_close(shared[0], x[0])
    assert VP().perturb(x0.bfloat16(), level, noise.bfloat16()).dtype == torch.bfloat16


def test_prior_of_a_sample_does_not_depend_on_its_batch():
    keys = torch.arange(6)
    whole = VE().prior((6, 2, 3), Draw(5, keys))
    parts = [VE().prior((3, 2, 3), Draw(5, k)) for k in keys.split(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_match():
    x = torch.zeros(2, 3, 4)
    assert match(tensor([1.0, 2.0]), x).shape == (2, 1, 1)
    assert match(tensor(1.0), x).shape == ()
    assert match(tensor([1.0, 2.0]), x).dtype == torch.float32
    assert Level(tensor(0.5), tensor(0.5), tensor(0.25)).ratio == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(20.0, 0.1), "beta_min and beta_max"),
        (lambda: VP(0.0, 1.0), "beta_min and beta_max"),
        (lambda: SubVP(-1.0, 1.0), "beta_min and beta_max"),
        (lambda: VE(0.0, 1.0), "sigma_min and sigma_max"),
        (lambda: VE(2.0, 1.0), "sigma_min and sigma_max"),
        (lambda: EDM(0.0, 80.0), "sigma_min"),
        (lambda: EDM(rho=0.0), "rho"),
        (lambda: Cosine(-0.1), "offset"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
