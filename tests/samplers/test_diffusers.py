from itertools import pairwise

import pytest
import torch

from lightning_sgm.denoiser import GaussianMixtureDenoiser
from lightning_sgm.processes.gaussian import EDM, VE, VP, Flow
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    Ancestral,
    DiffusersRule,
    DPMpp2M,
    Euler,
    Karras,
    LogUniform,
    Sampler,
    UniformTime,
)
from lightning_sgm.samplers.evaluation import Evaluation
from tests.samplers.exact import MEAN, PROCESSES, STD, Mixture, gaussian

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
TWINS = {
    "DDIM": (DiffusersRule("DDIMScheduler"), Euler()),
    "Euler": (DiffusersRule("diffusers.EulerDiscreteScheduler"), Euler()),
    "DPM++1": (DiffusersRule(options={"solver_order": 1}), Euler()),
    # Short runs end with a step of first order by their default; so does every run to no noise, by ours and theirs.
    "DPM++2M": (DiffusersRule(), DPMpp2M()),
    "DPM++2M without lower orders": (DiffusersRule(options={"lower_order_final": False}), DPMpp2M()),
}
SOLVERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")


@every_process
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
@pytest.mark.parametrize("grid", [LogUniform(ratio_max=80.0), Karras(ratio_max=80.0)], ids=["log", "karras"])
@pytest.mark.parametrize(("theirs", "ours"), TWINS.values(), ids=TWINS.keys())
def test_theirs_and_ours_agree(process, steps, grid, theirs, ours):
    denoiser = Mixture().denoiser(process)
    found, expected = (Sampler(rule, steps, grid)(denoiser, (64, 2), Draw(1)) for rule in (theirs, ours))
    assert float((found - expected).abs().max()) < 3e-5


@pytest.mark.parametrize("process", [VP(), VE(), Flow()], ids=["VP", "VE", "flow"])
@pytest.mark.parametrize(("theirs", "ours"), list(TWINS.values())[:3], ids=list(TWINS)[:3])
def test_they_agree_up_to_a_noisy_last_level(process, theirs, ours):
    denoiser = Mixture().denoiser(process)
    found, expected = (
        Sampler(rule, 12, LogUniform(0.1, 50.0), finish="state")(denoiser, (64, 2), Draw(1)) for rule in (theirs, ours)
    )
    assert float((found - expected).abs().max()) < 3e-5


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", *SOLVERS])
def test_small_noise_is_what_the_grid_says(scheduler):
    """With data at 0 every x_t is sigma eps, so the ratio of end to start shows the scheduler's own noise levels."""
    denoiser = GaussianMixtureDenoiser(VP(), torch.zeros(1, 1), torch.zeros(1, 1, 1))
    sampler = Sampler(DiffusersRule(scheduler), 20, LogUniform(0.002, 1.0), finish="state")
    levels = sampler.levels(VP())
    x = levels[0].sigma * torch.tensor([[-1.0], [2.0]])
    found = sampler(denoiser, None, Draw(0), start=x) / x
    assert found.flatten().tolist() == pytest.approx([float(levels[-1].sigma / levels[0].sigma)] * 2, rel=1e-4)


def test_euler_discrete_in_its_own_loop():
    """Not through our wrapper: diffusers' documented use on the same noise levels."""
    from diffusers import EulerDiscreteScheduler

    process, denoiser = EDM(), Mixture().denoiser(EDM())
    sampler = Sampler(Euler(), 20)
    sigmas = [float(level.sigma) for level in sampler.levels(process)]
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas)
    x = begin = sampler.prior(process, (64, 2), Draw(1))
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        scheduler.scale_model_input(x, timestep)
        t = process.t_from_ratio(sigma)
        x = scheduler.step(denoiser.noise(x, t), timestep, x).prev_sample
    found = sampler(denoiser, None, Draw(0), start=begin)
    assert float((found - x).abs().max()) < 3e-5


def test_dpm_solver_in_its_own_loop():
    from diffusers import DPMSolverMultistepScheduler

    process, denoiser = VP(), Mixture().denoiser(VP())
    # A chain of 1000 steps within the process's reach, their exponential (log-uniform) grid, and times with that noise.
    scheduler = DPMSolverMultistepScheduler(beta_end=0.018, use_exponential_sigmas=True)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas
    sampler = Sampler(DPMpp2M(), 20, LogUniform(float(sigmas[-2]), float(sigmas[0])))
    assert [float(level.ratio) for level in sampler.levels(process)] == pytest.approx(sigmas.tolist(), rel=1e-5)
    x = begin = sampler.prior(process, (64, 2), Draw(1))
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        x = scheduler.step(denoiser.noise(x, process.t_from_ratio(float(sigma))), timestep, x).prev_sample
    found = sampler(denoiser, None, Draw(0), start=begin)
    assert float((found - x).abs().max()) < 3e-5


@every_process
@pytest.mark.parametrize("scheduler", SOLVERS)
def test_multistep_solvers_draw_the_data(process, scheduler):
    # score_sde.md 8: within 2 % on log-uniform grids of 20 steps.
    sampler = Sampler(DiffusersRule(scheduler), 40, LogUniform())
    x = sampler(gaussian(process, 4, dtype=torch.float32), (5000, 4), Draw(3))
    assert sampler.evaluations == 40
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(x.std()) == pytest.approx(STD, rel=0.035)


@pytest.mark.parametrize("process", [VP(), VE(0.01, 50.0)], ids=["VP", "VE"])
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DDPMScheduler", {}),
    ],
)
def test_stochastic_schedulers(process, scheduler, options):
    denoiser = gaussian(process, 4, dtype=torch.float32)
    sampler = Sampler(DiffusersRule(scheduler, options), 150, LogUniform())
    x = sampler(denoiser, (4000, 4), Draw(3))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(x.std()) == pytest.approx(STD, rel=0.06)
    assert torch.equal(x, sampler(denoiser, (4000, 4), Draw(3)))
    assert not torch.equal(x, sampler(denoiser, (4000, 4), Draw(4)))


def test_ddpm_is_ours():
    # The generators differ, so the law of a step is compared.
    process, denoiser = VP(), gaussian(VP(), dtype=torch.float32)
    levels = LogUniform(0.01, 50.0)(process, 6)
    x = torch.linspace(-2, 2, 9).repeat(4000)[:, None]
    theirs, ours = DiffusersRule("DDPMScheduler"), Ancestral()
    evaluate = Evaluation(denoiser)
    found = theirs(evaluate, x, levels[0], levels[1], Draw(0), theirs.start(process, levels))[0]
    mean = ours(evaluate, x, levels[0], levels[1], Draw(0), None)[1]
    noise = ((found - mean) / process.posterior(x, x, levels[0], levels[1])[1]).reshape(4000, 9)
    assert noise.mean(0).tolist() == pytest.approx([0.0] * 9, abs=0.06)
    assert noise.std(0).tolist() == pytest.approx([1.0] * 9, abs=0.05)


@pytest.mark.parametrize("scheduler", SOLVERS)
def test_samples_do_not_depend_on_their_batch(scheduler):
    keys = torch.arange(6)
    denoiser, sampler = Mixture().denoiser(VP()), Sampler(DiffusersRule(scheduler), 12, LogUniform())
    together = sampler(denoiser, (6, 2), Draw(1, keys))
    torch.testing.assert_close(sampler(denoiser, (2, 2), Draw(1, keys[4:])), together[4:], rtol=0, atol=1e-5)


def test_exact_sampling_takes_noise_from_draw_or_is_refused():
    keys, denoiser = torch.arange(6), Mixture().denoiser(VP())
    sampler = Sampler(DiffusersRule(options={"algorithm_type": "sde-dpmsolver++"}), 12, LogUniform())
    together = sampler(denoiser, (6, 2), Draw(1, keys))
    torch.testing.assert_close(sampler(denoiser, (2, 2), Draw(1, keys[4:])), together[4:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="Ancestral"):
        Sampler(DiffusersRule("EulerAncestralDiscreteScheduler"), 12)(denoiser, (6, 2), Draw(1, keys))
    # Euler takes a generator too, but draws nothing.
    Sampler(DiffusersRule("EulerDiscreteScheduler"), 12)(denoiser, (6, 2), Draw(1, keys))


@pytest.mark.parametrize("scheduler", [*SOLVERS, "EulerDiscreteScheduler", "DDIMScheduler"])
def test_a_step_can_be_repeated(scheduler):
    process, rule = VP(), DiffusersRule(scheduler)
    denoiser, levels = Mixture().denoiser(VP()), LogUniform()(VP(), 6)
    x, memory = Sampler(rule, 6, LogUniform()).prior(process, (5, 2), Draw(0)), rule.start(process, levels)
    for level, target in pairwise(levels[:4]):
        x, _, memory = rule(Evaluation(denoiser), x, level, target, Draw(0), memory)
    first = rule(Evaluation(denoiser), x, levels[3], levels[4], Draw(0), memory)[0]
    second = rule(Evaluation(denoiser), x, levels[3], levels[4], Draw(0), memory)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lambda: DiffusersRule("NoSuchScheduler"), "there is no scheduler"),
        (lambda: DiffusersRule("no_such_package.Scheduler"), "there is no scheduler"),
        (lambda: DiffusersRule("FlowMatchEulerDiscreteScheduler"), "cannot be given a noise schedule"),
        (lambda: DiffusersRule("HeunDiscreteScheduler"), "rule Heun"),
        (lambda: DiffusersRule("PNDMScheduler"), "one evaluation"),
        (lambda: DiffusersRule(options={"use_karras_sigmas": True}), "grid"),
        (lambda: DiffusersRule(options={"no_such_option": 1}), "no option no_such_option"),
        (lambda: DiffusersRule(options={"prediction_type": "sample"}), "follow from the process"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(rule, text):
    with pytest.raises(ValueError, match=text):
        Sampler(rule(), 6)(Mixture().denoiser(VP()), (2, 2), Draw(0))


def test_pure_noise_and_dicts_are_refused():
    with pytest.raises(ValueError, match="alpha = 0"):
        Sampler(DiffusersRule(), 6, UniformTime(1e-3))(Mixture().denoiser(Flow()), (2, 2), Draw(0))
    with pytest.raises(ValueError, match="single tensors"):
        DiffusersRule().start(VP(), [{"x": VP().level(0.5)}, {"x": VP().level(0.4)}])
