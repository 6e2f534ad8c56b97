"""PaD-TS's samplers by our parts, against pad_ts.md section 2 written out and against diffusers."""

from itertools import pairwise

import pytest
import torch

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.guidance import InRange
from lightning_sgm.processes import VP, CosineChain
from lightning_sgm.random import Draw
from lightning_sgm.samplers import Ancestral, ChainGrid, Euler, Sampler, StridedChain
from lightning_sgm.samplers.evaluation import Evaluation
from tests.samplers.exact import gaussian

STEPS = 250
CHAIN = CosineChain(STEPS)
KEPT = torch.cumprod(1 - CHAIN.betas, 0)


class Answer(BaseDenoiser):
    """Some function of the state that leaves [-1, 1]."""

    def x0(self, x, t, **conditions):
        return 1.5 * torch.sin(3 * x) + 0.2


class Constant(BaseDenoiser):
    def x0(self, x, t, **conditions):
        return torch.full_like(x, -0.7)


class Given:
    """A draw of given noise."""

    def __init__(self, noise):
        self.noise = noise

    def normal(self, shape, dtype=torch.float32):
        return self.noise.to(dtype)


def state(seed):
    return torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps_of(sampler):
    """(index, x, noise, found) of every step of a run, each from a state of its own."""
    evaluate = Evaluation(InRange(Answer(CHAIN)))
    for level, target in pairwise(sampler.levels(CHAIN)):
        t = round(float(CHAIN.index(level.t)))
        x, noise = state(t), state(1000 + t)
        yield t, x, noise, sampler.rule(evaluate, x, level, target, Given(noise), None)[0]


PAPER = Sampler(Ancestral("transition"), STEPS, ChainGrid())


def test_every_ancestral_step_is_the_papers():
    visited = []
    for t, x, z, found in steps_of(PAPER):
        visited.append(t)
        x0 = Answer(CHAIN).x0(x, t).clamp(-1, 1)
        if t == 0:
            assert torch.equal(found, x0)
            continue
        beta, before = CHAIN.betas[t], KEPT[t - 1]
        mean = beta * before.sqrt() / (1 - KEPT[t]) * x0 + (1 - before) * (1 - beta).sqrt() / (1 - KEPT[t]) * x
        torch.testing.assert_close(found, mean + (0.5 * beta.log()).exp() * z, rtol=1e-9, atol=1e-11)
    assert visited == list(range(STEPS - 1, -1, -1))


def scheduler_of(name, **options):
    """A scheduler of diffusers as pad_ts.md section 3 names it, with our table in place of their float32 one.

    Theirs cancels near the data: their steps differ from ours by up to 1e-4 there.
    """
    scheduler = getattr(pytest.importorskip("diffusers"), name)(
        num_train_timesteps=STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=True,
        **options,
    )
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), KEPT, rtol=2e-4, atol=1e-6)
    scheduler.alphas_cumprod, scheduler.one = KEPT, torch.ones((), dtype=torch.float64)
    return scheduler


def test_every_ancestral_step_is_diffusers():
    scheduler = scheduler_of("DDPMScheduler", variance_type="fixed_large")
    for t, x, z, found in steps_of(PAPER):
        theirs = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        generator = torch.Generator().manual_seed(t)
        expected = scheduler.step(Answer(CHAIN).x0(x, t), t, x, generator=generator).prev_sample
        if t > 0:  # their noise for ours
            found = found + CHAIN.betas[t].sqrt() * (theirs - z)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("count", "eta"), [(25, 0.0), (50, 0.0), (50, 0.6), (50, 1.0), (125, 0.3)])
def test_every_strided_step_is_diffusers_ddim(count, eta):
    scheduler = scheduler_of("DDIMScheduler", set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(count)
    visited = []
    for t, x, noise, found in steps_of(Sampler(Euler(eta), count, StridedChain())):
        visited.append(t)
        answer = Answer(CHAIN).x0(x, t)
        options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise}
        expected = scheduler.step(answer, t, x, **options).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert visited == scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_fresh_noise_written_out(eta):
    """pad_ts.md section 2, with the noise that the clipped estimate implies."""
    stride = STEPS // 50
    for t, x, z, found in steps_of(Sampler(Euler(eta), 50, StridedChain())):
        x0, kept = Answer(CHAIN).x0(x, t).clamp(-1, 1), KEPT[t]
        before = KEPT[t - stride] if t else torch.ones(())
        noise = (x / kept.sqrt() - x0) / (1 / kept - 1).sqrt()
        std = eta * ((1 - before) / (1 - kept)).sqrt() * (1 - kept / before).sqrt()
        expected = before.sqrt() * x0 + (1 - before - std**2).sqrt() * noise + (t > 0) * std * z
        torch.testing.assert_close(found, expected.to(found), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("grid", [ChainGrid(), StridedChain()])
def test_ddim_with_all_noise_fresh_is_ancestral(grid):
    denoiser, begin = Answer(CHAIN), state(3)
    found, expected = (
        Sampler(rule, 25, grid)(denoiser, None, Draw(5), start=begin) for rule in (Euler(1.0), Ancestral("posterior"))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


SAMPLERS = {
    "paper": PAPER,
    "ddim50": Sampler(Euler(), 50, StridedChain()),
    "ddim25, eta 0.5": Sampler(Euler(0.5), 25, StridedChain()),
    "ancestral 50": Sampler(Ancestral("transition"), 50, ChainGrid()),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_constant_estimate_is_what_comes_out(sampler):
    found = sampler(InRange(Constant(CHAIN)), (3, 5, 2), Draw(1))
    torch.testing.assert_close(found, torch.full((3, 5, 2), -0.7))


def test_ddim_of_a_gaussian_tends_to_its_variance():
    """With exact answers for N(0, s^2), s small against the range, a run multiplies its start by one number."""
    errors = []
    for steps in (125, 500, 2000):
        chain = CosineChain(steps)
        denoiser = gaussian(chain, 1, 0.1)
        denoiser.means = torch.zeros_like(denoiser.means)
        start = torch.ones(1, 1, dtype=torch.float64)
        found = Sampler(Euler(), steps, StridedChain())(InRange(denoiser), None, Draw(0), start=start)
        errors.append(1.0 - float(found) / 0.1)
    assert 0 < errors[2] < errors[1] / 2 < errors[0] / 4
    assert errors[2] < 0.01


def ddim_steps(steps, count):
    """pad_ts.md section 2: the first integer stride with ``count`` indices, None if there is none."""
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    return None


@pytest.mark.parametrize("steps", [2, 15, 250])
def test_strided_grid_is_ddim_n_or_refuses(steps):
    chain, grid = CosineChain(steps), StridedChain()
    for count in range(1, steps + 3):
        expected = ddim_steps(steps, count)
        if expected is None:
            with pytest.raises(ValueError, match=f"no stride visits {count} levels of a chain of {steps}; take"):
                grid(chain, count - 1)
        else:
            found = [float(chain.index(level.t)) for level in grid(chain, count - 1)]
            assert found == expected[::-1]


def test_bad_values():
    with pytest.raises(ValueError, match="visits 100 levels of a chain of 250; take 84 or 125"):
        Sampler(Euler(), 100, StridedChain()).levels(CHAIN)
    with pytest.raises(ValueError, match="StridedChain needs a discrete chain, and VP is none"):
        StridedChain()(VP(), 4)
    with pytest.raises(ValueError, match=r"eta of Euler must lie in \[0, 1\], got 1.5"):
        Euler(1.5)
