import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgm.denoiser import GaussianMixtureDenoiser
from lightning_sgm.processes.gaussian import CLEAN, EDM, VE, VP, Cosine, Flow
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    Ancestral,
    DPMpp2M,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    LogUniform,
    ReverseDiffusion,
    Sampler,
    Stay,
    UniformTime,
)
from lightning_sgm.samplers.evaluation import Evaluation
from tests.samplers.exact import LAST_TIME, MEAN, PROCESSES, SDES, STD, gaussian, ode_map, start

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_sde = pytest.mark.parametrize("name", SDES)
DETERMINISTIC = {"Euler": (Euler(), 1), "Heun": (Heun(), 2), "DPM++2M": (DPMpp2M(), 2)}
ONE_CALL = {
    "Euler": Euler(),
    "DPM++2M": DPMpp2M(),
    "ancestral": Ancestral(),
    "Euler-Maruyama": EulerMaruyama(),
    "reverse diffusion": ReverseDiffusion(),
    "probability flow": ReverseDiffusion(deterministic=True),
}
RULES = {**ONE_CALL, "Heun": Heun(), "Heun with churn": Heun(0.2)}
times = st.floats(1e-3, 1.0)


def ode_error(process, rule, steps, grid):
    sampler = Sampler(rule, steps, grid, finish="state")
    levels = sampler.levels(process)
    x = start(levels[0], (64, 1))
    found = sampler(gaussian(process), None, Draw(0), start=x)
    return float((found - ode_map(x, levels[0], levels[-1])).abs().max())


@pytest.mark.parametrize(("rule", "order"), DETERMINISTIC.values(), ids=DETERMINISTIC.keys())
@every_process
def test_order_of_convergence_to_the_ode(process, rule, order):
    errors = [ode_error(process, rule, steps, LogUniform(0.01, 40.0)) for steps in (40, 80, 160)]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.12)
    assert errors[-1] < (0.025 if order == 1 else 7e-4)


@pytest.mark.parametrize(("rule", "order"), DETERMINISTIC.values(), ids=DETERMINISTIC.keys())
@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=["cosine", "flow"])
def test_order_from_pure_noise(process, rule, order):
    # alpha = 0 at the first level: sigma / alpha is infinite there.
    assert process.level(1.0).alpha == 0
    coarse, fine = (ode_error(process, rule, steps, UniformTime(1e-3)) for steps in (80, 320))
    assert math.log2(coarse / fine) / 2 == pytest.approx(order, abs=0.2)
    assert fine < (0.02 if order == 1 else 1e-3)


@every_process
@pytest.mark.parametrize("rule", [Euler(), Heun(), DPMpp2M()], ids=["Euler", "Heun", "DPM++2M"])
@settings(max_examples=25, deadline=None)
@given(s=times, t=times)
def test_one_step_is_exact_for_one_point(process, rule, s, t):
    """With data at a single point, x_t keeps its noise: x_s = alpha_s m + sigma_s eps."""
    s, t = min(s, t), max(s, t)
    if t - s < 1e-3:
        return
    evaluate = Evaluation(gaussian(process, std=0.0))
    level, target = process.level(t), process.level(s)
    noise = torch.tensor([[-1.3], [0.4]], dtype=torch.float64)
    x = level.alpha * MEAN + level.sigma * noise
    for goal in (target, CLEAN):
        found, mean, _ = rule(evaluate, x, level, goal, Draw(0), None)
        expected = goal.alpha * MEAN + goal.sigma * noise
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(level.sigma + 1))
        assert mean is found


@every_process
@settings(max_examples=25, deadline=None)
@given(s=times, t=times)
def test_euler_goes_to_noisier_levels_too_and_back(process, s, t):
    """DDIM inversion: with a constant x_0, noise is kept there, and the way back is the inverse."""
    s, t = min(s, t), max(s, t)
    if t - s < 1e-3:
        return
    evaluate = Evaluation(gaussian(process, std=0.0))
    level, noisier = process.level(s), process.level(t)
    noise = torch.tensor([[-1.3], [0.4]], dtype=torch.float64)
    x = level.alpha * MEAN + level.sigma * noise
    there, mean, _ = Euler()(evaluate, x, level, noisier, Draw(0), None)
    assert there.isfinite().all()
    assert mean is there  # no noise is drawn
    # Rounding of x counts as noise, which is scaled up by the ratio of the levels.
    ratio = float(noisier.sigma / level.sigma)
    slack = 1e-14 * max(1.0, ratio) * float(1 + level.alpha + noisier.alpha + noisier.sigma)
    torch.testing.assert_close(there, noisier.alpha * MEAN + noisier.sigma * noise, rtol=1e-9, atol=slack)
    back, _, _ = Euler()(evaluate, there, noisier, level, Draw(0), None)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9 * float(level.sigma))


@every_process
def test_euler_encodes_along_the_exact_ode(process):
    """Of Gaussian data: many steps up are the map of the ODE, and those down lead back."""
    denoiser = gaussian(process)
    levels = Sampler(Euler(), 400, LogUniform(0.01, 40.0), finish="state").levels(process)[::-1]
    spread = torch.sqrt((levels[0].alpha * STD) ** 2 + levels[0].sigma ** 2)
    x = levels[0].alpha * MEAN + spread * Draw(1).normal((64, 1), torch.float64)
    evaluate, up = Evaluation(denoiser), x
    for level, noisier in pairwise(levels):
        up, _, _ = Euler()(evaluate, up, level, noisier, Draw(0), None)
    expected = ode_map(x, levels[0], levels[-1])
    assert float((up - expected).abs().max()) < 0.02 * float(expected.std())
    back = up
    for level, cleaner in pairwise(levels[::-1]):
        back, _, _ = Euler()(evaluate, back, level, cleaner, Draw(0), None)
    assert float((back - x).abs().max()) < 0.04 * float(x.std())


def test_heun_is_karras_algorithm_1():
    # Their pseudocode in sigma for alpha = 1, x + (s' - s) (d + d') / 2 with d = (x - D) / s.
    process = EDM()
    denoiser = gaussian(process)
    sampler = Sampler(Heun(), 6)
    levels = sampler.levels(process)
    x = expected = start(levels[0], (16, 1))
    for level, target in pairwise(levels):
        s, s_next = level.sigma, target.sigma
        slope = (expected - denoiser.x0(expected, level.t)) / s
        guess = expected + (s_next - s) * slope
        if s_next > 0:
            slope = 0.5 * (slope + (guess - denoiser.x0(guess, target.t)) / s_next)
        expected = expected + (s_next - s) * slope
    found = sampler(denoiser, None, Draw(0), start=x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_churn_adds_the_noise_of_the_higher_level():
    process = EDM()
    level, target = process.level(0.5), process.level(0.4)
    x = torch.zeros(20000, 1, dtype=torch.float64)
    raised, noisier = Heun(0.3)._raise(Evaluation(gaussian(process)), x, level, Draw(1))
    assert float(noisier.sigma) == pytest.approx(1.3 * float(level.sigma))
    assert float(raised.std()) == pytest.approx(float(level.sigma) * math.sqrt(1.3**2 - 1), rel=0.02)
    # At the noisiest level there is nothing to raise to.
    top = process.level(1.0)
    assert Heun(0.3)._raise(Evaluation(gaussian(process)), x, top, Draw(1)) == (x, top)
    for pure in (Flow(), Cosine()):
        found, _, _ = Heun(0.3)(Evaluation(gaussian(pure)), x, pure.level(1.0), pure.level(0.9), Draw(1), None)
        assert found.isfinite().all()
    assert Heun(0.3)(Evaluation(gaussian(process)), x, level, target, Draw(1), None)[0].isfinite().all()


@every_sde
@pytest.mark.parametrize(
    ("rule", "finish", "tolerance"),
    [
        (EulerMaruyama(), "mean", 0.01),
        (EulerMaruyama(), "clean", 0.01),
        (ReverseDiffusion(), "mean", 0.015),
        (ReverseDiffusion(), "clean", 0.015),
        (Ancestral(), "clean", 0.025),
        (Heun(0.02), "clean", 0.01),
    ],
    ids=["EM mean", "EM clean", "RD mean", "RD clean", "ancestral", "Heun with churn"],
)
def test_stochastic_rules_draw_the_data(name, rule, finish, tolerance):
    # 20,000 numbers: standard errors 0.003 of the mean and 0.5 % of the standard deviation; the rest is the bias of
    # 300 steps (score_sde.md 8: below 0.7 % at 1000 steps for the authors' samplers).
    sampler = Sampler(rule, 300, UniformTime(LAST_TIME[name]), finish=finish)
    x = sampler(gaussian(SDES[name], 4, dtype=torch.float32), (5000, 4), Draw(3))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.009)
    assert float(x.std()) == pytest.approx(STD, rel=0.015 + tolerance)
    assert float(torch.corrcoef(x.T).fill_diagonal_(0).abs().max()) < 0.06


@every_sde
def test_predictor_corrector_draws_the_data(name):
    sampler = Sampler(
        ReverseDiffusion(), 200, UniformTime(LAST_TIME[name]), before=[Langevin(0.1, norm="batch")], finish="mean"
    )
    x = sampler(gaussian(SDES[name], 16, dtype=torch.float32), (2500, 16), Draw(5))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.007)
    # Langevin's own excess is snr^2 / 2 of the standard deviation.
    assert float(x.std()) == pytest.approx(STD * (1 + 0.1**2 / 2), rel=0.02)


@every_process
def test_ancestral_keeps_the_law_of_one_point_in_any_step(process):
    """Exact for data at one point: from any level to any cleaner one, mean alpha_s m and standard deviation sigma_s."""
    evaluate = Evaluation(gaussian(process, std=0.0))
    level, target = process.level(1.0), process.level(0.3)
    x = level.alpha * MEAN + start(level, (40000, 1))
    x, _, _ = Ancestral()(evaluate, x, level, target, Draw(2), None)
    scale = float(target.sigma)
    assert float(x.mean() - target.alpha * MEAN) == pytest.approx(0.0, abs=4 * scale / 200)
    assert float(x.std()) == pytest.approx(scale, rel=4 / math.sqrt(2 * 40000))


def test_ancestral_is_the_ddpm_step():
    # score_sde.md 2.4: (x + beta_i s) / sqrt(1 - beta_i), with noise variance beta_i (1 - abar_{i-1}) / (1 - abar_i).
    process = PROCESSES["VP"]
    level, target = process.level(0.5), process.level(0.45)
    evaluate = Evaluation(gaussian(process))
    x = start(level, (8, 1))
    beta = 1 - (level.alpha / target.alpha) ** 2
    mean = (x + beta * gaussian(process).score(x, level.t)) / torch.sqrt(1 - beta)
    found, found_mean, _ = Ancestral()(evaluate, x, level, target, Draw(7), None)
    torch.testing.assert_close(found_mean, mean, rtol=1e-9, atol=1e-9)
    std = torch.sqrt(beta) * target.sigma / level.sigma
    noise = Draw(7).normal((8, 1), torch.float64)
    torch.testing.assert_close(found, mean + std * noise, rtol=1e-9, atol=1e-9)


@every_sde
def test_euler_maruyama_is_its_formula(name):
    process = SDES[name]
    level, target = process.level(0.6), process.level(0.58)
    x, noise = start(level, (8, 1)), Draw(7).normal((8, 1), torch.float64)
    f, g, score = process.drift(0.6), process.diffusion(0.6), gaussian(process).score(x, 0.6)
    mean = x - (f * x - g**2 * score) * 0.02
    rule = EulerMaruyama()
    memory = rule.start(process, [level, target])
    found, found_mean, _ = rule(Evaluation(gaussian(process)), x, level, target, Draw(7), memory)
    torch.testing.assert_close(found_mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found, mean + g * math.sqrt(0.02) * noise, rtol=1e-8, atol=1e-8)


@every_sde
def test_reverse_diffusion_is_its_formula_and_probability_flow_half_of_it(name):
    process = SDES[name]
    level, target = process.level(0.6), process.level(0.58)
    x = start(level, (8, 1))
    score = gaussian(process).score(x, level.t)
    scale, std = process.transition(target, level)
    evaluate = Evaluation(gaussian(process))
    found, mean, _ = ReverseDiffusion()(evaluate, x, level, target, Draw(7), None)
    torch.testing.assert_close(mean, (2 - scale) * x + std**2 * score, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found - mean, std * Draw(7).normal((8, 1), torch.float64), rtol=1e-8, atol=1e-8)
    flow, flow_mean, _ = ReverseDiffusion(deterministic=True)(evaluate, x, level, target, Draw(7), None)
    torch.testing.assert_close(flow, (2 - scale) * x + 0.5 * std**2 * score, rtol=1e-8, atol=1e-8)
    assert flow is flow_mean


def test_reverse_diffusion_removes_exactly_sigma_max_squared():
    process = VE(0.01, 50.0)
    levels = Sampler(ReverseDiffusion(), 30, UniformTime(0.0)).levels(process)
    removed = sum(float(process.transition(target, level)[1]) ** 2 for level, target in pairwise(levels))
    assert removed == pytest.approx(50.0**2, rel=1e-12)
    # With a score that does not depend on x the sum of the steps is the same number times the score.
    constant = Evaluation(gaussian(process, std=1e6))
    x = torch.tensor([[3.0e6]], dtype=torch.float64)
    score = float(gaussian(process, std=1e6).score(x, 1.0))
    y = x
    for level, target in pairwise(levels):
        _, y, _ = ReverseDiffusion()(constant, y, level, target, Draw(0), None)
    assert float(y - x) == pytest.approx(50.0**2 * score, rel=1e-5)


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=["cosine", "flow"])
@pytest.mark.parametrize("name", RULES)
def test_pure_noise_is_finite_or_refused(process, name):
    sampler = Sampler(RULES[name], 5, UniformTime(1e-3))
    if name in ("Euler-Maruyama", "reverse diffusion", "probability flow"):
        with pytest.raises(ValueError, match="LogUniform"):
            sampler(gaussian(process), (4, 1), Draw(0))
        sampler = Sampler(RULES[name], 5, LogUniform())
    assert sampler(gaussian(process, dtype=torch.float32), (4, 1), Draw(0)).isfinite().all()


@pytest.mark.parametrize("name", ONE_CALL)
def test_a_step_can_be_repeated(name):
    process = PROCESSES["VP"]
    rule, levels = ONE_CALL[name], LogUniform()(process, 4)
    denoiser = gaussian(process)
    x, memory = start(levels[0], (6, 1)), rule.start(process, levels)
    x, _, memory = rule(Evaluation(denoiser), x, levels[0], levels[1], Draw(1), memory)
    kept = x.clone()
    first = rule(Evaluation(denoiser), x, levels[1], levels[2], Draw(2), memory)
    second = rule(Evaluation(denoiser), x, levels[1], levels[2], Draw(2), memory)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(x, kept)


def test_negative_churn_is_refused():
    with pytest.raises(ValueError, match="churn"):
        Heun(-0.1)


@every_process
def test_ancestral_noise_is_the_posteriors_or_the_transitions(process):
    level, target = process.level(0.7), process.level(0.5)
    x, noise = start(level, (6, 2)), Draw(5).normal((6, 2), torch.float64)
    evaluate = Evaluation(gaussian(process, 2))
    mean, small = process.posterior(evaluate(x, level), x, level, target)
    large = process.transition(target, level)[1]
    assert large > small
    for kind, std in (("posterior", small), ("transition", large)):
        found, found_mean, _ = Ancestral(kind)(evaluate, x, level, target, Draw(5), None)  # type: ignore[arg-type]
        torch.testing.assert_close(found_mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, mean + std * noise, rtol=1e-9, atol=1e-9)
        assert torch.equal(Ancestral(kind)(evaluate, x, level, CLEAN, Draw(5), None)[0], evaluate(x, level))  # type: ignore[arg-type]


@pytest.mark.parametrize("process", [VP(), Cosine()], ids=["VP", "cosine"])
@pytest.mark.parametrize("noise", ["posterior", "transition"])
def test_transition_noise_is_exact_for_standard_normal_data(process, noise):
    """Ho et al. 2020, section 3.2: beta_i is optimal for N(0, I), the posterior's variance for one point."""
    eye = torch.eye(2)[None]
    denoiser = GaussianMixtureDenoiser(process, torch.zeros(1, 2), eye)
    sampler = Sampler(Ancestral(noise), 6, UniformTime(0.05), finish="state")
    begin = start(process.level(1.0), (20000, 2)).float()
    x = sampler(denoiser, None, Draw(2), start=begin)
    variance = float(x.var())
    if noise == "transition":
        assert variance == pytest.approx(1.0, rel=0.02)
    else:
        assert variance < 0.93


def test_stay_moves_nothing():
    process = VE(0.01, 50.0)
    level, target = process.level(0.7), process.level(0.5)
    x, evaluate = start(level, (6, 2)), Evaluation(gaussian(process, 2))
    found, mean, memory = Stay()(evaluate, x, level, target, Draw(0), "kept")
    assert found is mean is x
    assert memory == "kept"
    assert evaluate.count == 0
    found, mean, _ = Stay()(evaluate, x, level, CLEAN, Draw(0), None)
    assert found is mean
    torch.testing.assert_close(found, gaussian(process, 2).x0(x, level.t))
