import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sgm.denoiser import BaseDenoiser, Denoiser, Preconditioning
from lightning_sgm.processes.gaussian import CLEAN, EDM, VE, VP, Cosine, Flow, SubVP, match
from lightning_sgm.random import Draw
from lightning_sgm.samplers import ODESampler, slerp
from lightning_sgm.samplers.integrators import Solver
from tests.samplers.exact import LAST_TIME, MEAN, PROCESSES, SDES, STD, Mixture, gaussian, ode_map, start
from tests.samplers.test_loop import Counting, Pair, energy_distance

SOLVERS = get_args(Solver)
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_solver = pytest.mark.parametrize("solver", SOLVERS)


@every_process
def test_samples_and_codes_are_the_exact_maps(process):
    sampler = ODESampler(finish="state")
    noisy, clean = sampler.levels(process)
    assert float(noisy.t) == 1.0
    assert float(clean.t) == process.t_min
    x = start(noisy, (64, 1))
    found = sampler(gaussian(process), None, Draw(0), start=x)
    torch.testing.assert_close(found, ode_map(x, noisy, clean), rtol=0, atol=1e-4)
    assert sampler.evaluations < 120
    data = MEAN + STD * Draw(2).normal((64, 1), torch.float64)
    scale = float(noisy.sigma)
    code = sampler.encode(gaussian(process), data)
    torch.testing.assert_close(code / scale, ode_map(data, clean, noisy) / scale, rtol=0, atol=1e-4)


@every_solver
@pytest.mark.parametrize("process", [SubVP(), VE(0.01, 50.0), Flow()], ids=["sub-VP", "VE", "flow"])
def test_every_solver_gives_the_exact_map(process, solver):
    sampler = ODESampler(solver, t_min=1e-3, finish="state")
    noisy, clean = sampler.levels(process)
    x = start(noisy, (16, 1))
    found = sampler(gaussian(process), None, Draw(0), start=x)
    torch.testing.assert_close(found, ode_map(x, noisy, clean), rtol=0, atol=3e-4)
    code = sampler.encode(gaussian(process), found)
    torch.testing.assert_close(code / noisy.sigma, x / noisy.sigma, rtol=0, atol=6e-4)


@every_process
def test_tolerance_is_that_of_the_result(process):
    noisy, clean = ODESampler().levels(process)
    x = start(noisy, (64, 1))
    for tolerance in (1e-3, 1e-8):
        sampler = ODESampler("dopri5", tolerance, tolerance, finish="state")
        error = sampler(gaussian(process), None, Draw(0), start=x) - ode_map(x, noisy, clean)
        assert float(error.abs().max()) < 5 * tolerance


@every_process
def test_decode_returns_what_encode_was_given(process):
    data = Mixture().draw(200)
    denoiser = Mixture().denoiser(process)
    for sampler in (ODESampler(), ODESampler("scipy_RK45", temperature=0.5)):
        code = sampler.encode(denoiser, data)
        back = sampler.decode(denoiser, code)
        assert back.dtype == code.dtype == torch.float32
        # The worst are between the modes, where paths diverge; nearly all are within 1e-5.
        assert float((back - data).abs().median()) < 2e-5
        assert float((back - data).abs().max()) < 1e-3
    tight = ODESampler(rtol=1e-8, atol=1e-8)
    exact = tight.decode(denoiser, tight.encode(denoiser, data.double()))
    assert float((exact - data).abs().max()) < 1e-6


@every_process
def test_codes_of_the_data_are_noise(process):
    code = ODESampler().encode(Mixture().denoiser(process), Mixture().draw(4000)) / float(process.level(1.0).sigma)
    # VE's own latents keep the data in them: 0.006 in 1 at sigma_max = 50. Standard errors are 0.016 and 1.1 %.
    assert code.mean(0).abs().max() < 0.06
    assert code.std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.035)
    assert abs(float(torch.corrcoef(code.T)[0, 1])) < 0.05
    assert float((code.abs() < 0.6745).float().mean()) == pytest.approx(0.5, abs=0.025)


class Network(nn.Module):
    """Predicts noise or v for N(MEAN, STD^2), told 999 t."""

    def __init__(self, process, prediction, mean=MEAN):
        super().__init__()
        self.process, self.prediction, self.mean = process, prediction, mean

    def forward(self, x, label):
        level = self.process.level(label.double() / 999.0)
        alpha, sigma = (match(v, x) for v in (level.alpha, level.sigma))
        noise = sigma * (x - alpha * self.mean) / ((alpha * STD) ** 2 + sigma**2)
        return noise if self.prediction == "noise" else alpha * noise - sigma * (x - sigma * noise) / alpha


@pytest.mark.parametrize("name", SDES)
def test_codes_belong_to_data_and_process_not_to_the_network(name):
    """Song et al. 2021, section 4.3: uniquely identifiable encoding."""
    process = SDES[name]
    data = MEAN + STD * Draw(2).normal((32, 3), torch.float64)

    def code(prediction, mean=MEAN):
        network = Network(process, prediction, mean)
        return ODESampler().encode(Denoiser(network, process, Preconditioning(prediction)), data)

    scale = float(process.level(1.0).sigma)
    reference = ODESampler().encode(gaussian(process, 3), data) / scale
    assert float((code("noise") / scale - reference).abs().max()) < 2e-4
    if name != "VE":
        assert float((code("v") / scale - reference).abs().max()) < 2e-4
    assert float((code("noise", 0.5) / scale - reference).abs().max()) > 1e-3


@every_process
def test_samples_of_the_mixture(process):
    mixture = Mixture()
    samples = ODESampler(t_min=max(1e-3, process.t_min))(mixture.denoiser(process), (2000, 2), Draw(1))
    assert samples.dtype == torch.float32
    assert energy_distance(samples, mixture.draw(4000)) < 0.005


@every_solver
@pytest.mark.parametrize("back", [False, True], ids=["to data", "to noise"])
def test_the_model_is_never_asked_outside_of_its_times(solver, back):
    for process, t_min in ((VP(), 1e-3), (VE(0.01, 50.0), None), (Cosine(), None)):
        denoiser, sampler = Counting(process), ODESampler(solver, 1e-3, 1e-3, t_min)
        x = torch.ones(3, 2)
        if back:
            sampler.encode(denoiser, x)
        else:
            sampler(denoiser, None, Draw(0), start=x)
        times = [t for _, t in denoiser.calls]
        assert min(times) >= (process.t_min if t_min is None else t_min)
        assert max(times) <= 1.0
        assert sampler.evaluations == len(times)
        assert denoiser.calls[0][0] == (3, 2)


def test_evaluations_count_what_an_answer_costs():
    class Twice(Counting):
        cost = 2

    cheap, dear = ODESampler(), ODESampler()
    cheap(Counting(VP()), (2, 1), Draw(0))
    dear(Twice(VP()), (2, 1), Draw(0))
    assert dear.evaluations == 2 * cheap.evaluations > 0
    decoded = ODESampler()
    decoded.decode(Counting(VP()), torch.ones(2, 1))
    assert decoded.evaluations > 0


def test_finish():
    denoiser = Mixture().denoiser(VP())
    noise = ODESampler().prior(VP(), (8, 2), Draw(3))
    state, clean = ODESampler(finish="state", t_min=0.01), ODESampler(finish="clean", t_min=0.01)
    x = state(denoiser, None, Draw(0), start=noise)
    torch.testing.assert_close(clean(denoiser, None, Draw(0), start=noise), denoiser.x0(x, 0.01))
    assert clean.evaluations == state.evaluations + 1
    # Codes and their decoding have no finish: they are each other's inverse.
    assert torch.equal(clean.decode(denoiser, noise), x)
    # A point of data is found again exactly.
    point = ODESampler()(gaussian(VP(), 2, std=0.0), (4, 2), Draw(0))
    torch.testing.assert_close(point, torch.full_like(point, MEAN), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["dopri5", "scipy_RK45"])
@pytest.mark.parametrize("finish", ["clean", "state"])
def test_every_step_is_shown(solver, finish):
    process, told = VP(), []
    sampler = ODESampler(solver, t_min=1e-3, finish=finish)
    noise = start(process.level(1.0), (4, 1))
    x = sampler(
        gaussian(process), None, Draw(0), start=noise, on_step=lambda step, level, x: told.append((step, level, x))
    )
    assert [step for step, _, _ in told] == list(range(len(told)))
    times = [float(level.t) for _, level, _ in told]
    assert 1.0 > times[0] > times[-1]
    assert times == sorted(times, reverse=True)
    assert torch.equal(told[-1][2], x)
    if finish == "clean":
        assert told[-1][1] == CLEAN
        told.pop()
    assert float(told[-1][1].t) == pytest.approx(1e-3)
    for _, level, state in told:
        torch.testing.assert_close(state, ode_map(noise, process.level(1.0), level), rtol=0, atol=1e-3)


def test_temperature_scales_the_start_noise():
    noise = ODESampler().prior(VE(0.01, 50.0), (5000, 2), Draw(3))
    assert noise.dtype == torch.float32
    assert float(noise.std()) == pytest.approx(50.0, rel=0.02)
    cold = ODESampler(temperature=0.5)
    torch.testing.assert_close(cold.prior(VE(0.01, 50.0), (5000, 2), Draw(3)), 0.5 * noise)
    # The map of a Gaussian is linear: so are the samples. A start that is given stays as it is.
    denoiser = gaussian(VP(), 2, dtype=torch.float32)
    samples = cold(denoiser, (2000, 2), Draw(1))
    assert float(samples.std()) == pytest.approx(0.5 * STD, rel=0.04)
    begin = torch.ones(1, 2)
    torch.testing.assert_close(
        cold(denoiser, None, Draw(0), start=begin), ODESampler()(denoiser, None, Draw(0), start=begin)
    )
    assert torch.equal(ODESampler(temperature=0.0).prior(VP(), (3, 2), Draw(0)), torch.zeros(3, 2))


@pytest.mark.parametrize("solver", ["dopri5", "scipy_RK45"])
@pytest.mark.parametrize("finish", ["clean", "state"])
def test_components_run_jointly_as_they_would_alone(solver, finish):
    parts = {"x": gaussian(VP(), 3), "adj": gaussian(VE(0.01, 50.0), 4, 0.8)}
    pair, sampler = Pair(parts), ODESampler(solver, t_min=1e-3, finish=finish)
    levels = sampler.levels(pair.process)
    begin = {"x": start(levels[0]["x"], (5, 3)), "adj": start(levels[0]["adj"], (5, 4), 2).view(5, 2, 2)}
    together = sampler(pair, None, Draw(0), start=begin)  # type: ignore[arg-type]
    assert sampler.evaluations == pair.calls
    for name, std in (("x", STD), ("adj", 0.8)):
        exact = ode_map(begin[name], levels[0][name], levels[1][name], std)
        if finish == "clean":
            exact = parts[name].x0(exact, 1e-3)
        torch.testing.assert_close(together[name], exact, rtol=0, atol=3e-4)
    code = sampler.encode(pair, sampler.decode(pair, begin))  # type: ignore[arg-type]
    for name, level in levels[0].items():
        torch.testing.assert_close(code[name] / level.sigma, begin[name] / level.sigma, rtol=0, atol=3e-4)
    drawn = sampler(pair, {"x": (2, 3), "adj": (2, 2, 2)}, Draw(4))  # type: ignore[arg-type]
    assert {name: tuple(part.shape) for name, part in drawn.items()} == {"x": (2, 3), "adj": (2, 2, 2)}


@pytest.mark.parametrize("solver", ["dopri5", "scipy_RK45"])
def test_a_sample_depends_on_its_batch_within_the_tolerance(solver):
    denoiser, keys = Mixture().denoiser(VP()), torch.tensor([3, 14, 15, 92, 65, 35])
    sampler = ODESampler(solver)
    together = sampler(denoiser, (6, 2), Draw(8, keys))
    for part in ([0, 1, 2], [5]):
        alone = sampler(denoiser, (len(part), 2), Draw(8, keys[part]))
        torch.testing.assert_close(alone, together[part], rtol=0, atol=2e-4)


@pytest.mark.parametrize("solver", ["dopri5", "scipy_LSODA"])
def test_conditions_reach_the_denoiser(solver):
    sampler, shift = ODESampler(solver, 1e-6, 1e-6), torch.tensor([0.0, 10.0])
    x = sampler(Counting(VP()), (2, 1), Draw(0), shift=shift)
    y = sampler(Counting(VP()), (2, 1), Draw(0))
    assert float(x[0]) == pytest.approx(float(y[0]), abs=1e-4)
    assert float(x[1] - y[1]) > 5.0
    code = sampler.encode(Counting(VP()), torch.ones(2, 1), shift=shift)
    assert abs(float(code[1] - code[0])) > 1.0
    back = sampler.decode(Counting(VP()), code, shift=shift)
    torch.testing.assert_close(back, torch.ones(2, 1), rtol=0, atol=1e-3)


def test_gradients_stay_as_the_caller_has_them():
    process = VP()
    noisy, clean = ODESampler().levels(process)
    x = start(noisy, (3, 1)).requires_grad_()
    ODESampler(finish="state")(gaussian(process), None, Draw(0), start=x).sum().backward()
    slope = ode_map(torch.ones(()), noisy, clean) - ode_map(torch.zeros(()), noisy, clean)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, float(slope)), rtol=1e-4, atol=0)
    for solver in SOLVERS:
        with torch.inference_mode():
            found = ODESampler(solver, 1e-3, 1e-3)(gaussian(process, dtype=torch.float32), (2, 1), Draw(0))
        assert found.isfinite().all()
        assert not found.requires_grad


class Broken(BaseDenoiser):
    """Answers no number in its last row below t = 0.5."""

    def x0(self, x, t, **conditions):
        x0 = 0.5 * x
        if float(t) < 0.5:
            x0[-1] = math.nan
        return x0


@every_solver
def test_a_model_whose_answers_are_not_finite_is_named(solver):
    with pytest.raises(FloatingPointError, match="the model's answers are not finite or change too fast"):
        ODESampler(solver, 1e-3, 1e-3)(Broken(VP()), (3, 2), Draw(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ODESampler(t_min=1.0), "t_min of an ODESampler"),
        (lambda: ODESampler(t_min=-0.1), "t_min of an ODESampler"),
        (lambda: ODESampler(finish="mean"), "finish of an ODESampler must be clean or state"),  # type: ignore[arg-type]
        (lambda: ODESampler(temperature=-1.0), "temperature"),
        (lambda: ODESampler("rk4"), "solver must be one of"),  # type: ignore[arg-type]
        (lambda: ODESampler(rtol=0.0), "rtol and atol"),
        (lambda: ODESampler()(Counting(VP()), None, Draw(0)), "shape of its samples"),
        (lambda: ODESampler(t_min=0.0)(Counting(VP()), (1, 1), Draw(0)), "choose t_min above 0"),
        (lambda: slerp(torch.ones(2, 3), torch.ones(1, 3), [0.5]), r"one shape, got \(2, 3\) and \(1, 3\)"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert ODESampler(t_min=0.0)(Counting(EDM()), (1, 1), Draw(0)).isfinite().all()


@settings(max_examples=50, deadline=None)
@given(
    angle=st.floats(1e-5, math.pi - 1e-5),
    weight=st.floats(0.0, 1.0),
    radius=st.floats(0.1, 100.0),
    turn=st.floats(0.0, 6.0),
)
def test_slerp_walks_the_arc_at_constant_speed(angle, weight, radius, turn):
    def point(at):
        return radius * torch.tensor([[math.cos(turn + at), math.sin(turn + at)]], dtype=torch.float64)

    found = slerp(point(0.0), point(angle), [weight])
    torch.testing.assert_close(found, point(weight * angle)[None], rtol=0, atol=1e-8 * radius)


def test_slerp_of_latents():
    a, b = Draw(1).normal((3, 4, 8, 8)), Draw(2).normal((3, 4, 8, 8))
    found = slerp(a, b, torch.linspace(0.0, 1.0, 5))
    assert found.shape == (5, 3, 4, 8, 8)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], a, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[-1], b, rtol=0, atol=1e-6)
    # On the arc: no shorter than its ends, where the straight line loses a quarter in the middle.
    norms, ends = found.flatten(2).norm(dim=2), torch.stack([a, b]).flatten(2).norm(dim=2)
    assert (norms > 0.96 * ends.amin(0)).all()
    assert (norms < 1.04 * ends.amax(0)).all()
    assert (0.5 * (a + b)).flatten(1).norm(dim=1).max() < 0.9 * ends.min()
    for same in (a, 3.0 * a, -2.0 * a):  # one direction, or opposite ones: straight, and finite
        torch.testing.assert_close(slerp(a, same, [0.25])[0], 0.75 * a + 0.25 * same, rtol=0, atol=1e-6)
    zero = torch.zeros_like(a)
    torch.testing.assert_close(slerp(a, zero, [0.5])[0], 0.5 * a, rtol=0, atol=0.25 * float(a.abs().max()))


def test_paths_between_codes_stay_among_the_data():
    """Interpolated codes of one Gaussian decode to points as typical as the data (score_sde.md 2.4)."""
    process = VP()
    denoiser, sampler = gaussian(process, 64, dtype=torch.float32), ODESampler(t_min=LAST_TIME["VP"], finish="state")
    data = MEAN + STD * Draw(2).normal((2, 64))
    code = sampler.encode(denoiser, data)
    between = sampler.decode(denoiser, slerp(code[:1], code[1:], [0.0, 0.5, 1.0])[:, 0])
    torch.testing.assert_close(between[[0, 2]], data, rtol=0, atol=1e-3)
    spread = (between - MEAN).norm(dim=1) / (STD * 8.0)
    assert float(spread[1]) == pytest.approx(float(0.5 * (spread[0] + spread[2])), rel=0.05)


def test_autocast_does_not_slow_the_solver():
    """A network in half precision would never meet the tolerance."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))

    class Untrained(BaseDenoiser):
        def x0(self, x, t, **conditions):
            return network(x)

    sampler, found, counts = ODESampler(), [], []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(sampler(Untrained(VP()), (4, 3), Draw(0)))
        counts.append(sampler.evaluations)
    assert counts[0] == counts[1]
    assert torch.equal(*found)
