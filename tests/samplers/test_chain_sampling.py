"""Discrete chains sampled by our parts, against the updates of score_sde.md 2.4 written out."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_sgm.processes import CLEAN, VE, VP, DDPMChain, SMLDChain, SubVP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    Ancestral,
    AnnealedLangevin,
    ChainGrid,
    Langevin,
    ReverseDiffusion,
    Sampler,
    Stay,
    UniformTime,
)
from lightning_sgm.samplers.evaluation import Evaluation
from tests.samplers.exact import MEAN, STD, gaussian, start

CHAINS = {"VP": DDPMChain(40, 0.1, 20.0), "VE": SMLDChain(40, 0.01, 50.0)}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())


def tables(chain):
    """beta_i and sigma_i of the reference, by index; sigma_{-1} = 0 is the entry -1 of the second."""
    if isinstance(chain, DDPMChain):
        return torch.linspace(0.1 / 40, 20.0 / 40, 40, dtype=torch.float64), None
    return None, [*torch.logspace(-2, math.log10(50), 40, dtype=torch.float64).tolist(), 0.0]


def predict(kind, chain, x, score, i):
    """(mean, std of the noise) of the reference's predictors."""
    beta, sigma = tables(chain)
    if kind == "ancestral":
        if beta is not None:
            return (x + beta[i] * score) / (1 - beta[i]).sqrt(), float(beta[i].sqrt())
        gap = sigma[i] ** 2 - sigma[i - 1] ** 2
        return x + gap * score, sigma[i - 1] * math.sqrt(gap) / sigma[i]
    half = 0.5 if kind == "probability flow" else 1.0
    if beta is not None:
        mean, std = (2 - (1 - beta[i]).sqrt()) * x + half * beta[i] * score, float(beta[i].sqrt())
    else:
        gap = sigma[i] ** 2 - sigma[i - 1] ** 2
        mean, std = x + half * gap * score, math.sqrt(gap)
    return mean, 0.0 if kind == "probability flow" else std


def correct(chain, x, score, i, z, snr):
    beta, _ = tables(chain)
    factor = 1.0 if beta is None else 1 - float(beta[i])
    size = 2 * factor * (snr * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
    return x + size * score + torch.sqrt(2 * size) * z


RULES = {
    "ancestral": lambda chain: Ancestral("transition" if isinstance(chain, DDPMChain) else "posterior"),
    "reverse diffusion": lambda chain: ReverseDiffusion(),
    "probability flow": lambda chain: ReverseDiffusion(deterministic=True),
}


@every_chain
@pytest.mark.parametrize("kind", RULES)
def test_every_update_of_a_chain_is_the_references(chain, kind):
    denoiser, rule = gaussian(chain, 3), RULES[kind](chain)
    levels = [*ChainGrid()(chain, 39), CLEAN]
    for step, (level, target) in enumerate(pairwise(levels)):
        i, x = 39 - step, start(level, (5, 3), step)
        mean, std = predict(kind, chain, x, denoiser.score(x, level.t), i)
        found, found_mean, _ = rule(Evaluation(denoiser), x, level, target, Draw(7), None)
        if i == 0 and kind == "probability flow":
            continue  # to no noise at all: x_0 itself, where their half step would stop in between
        # Ours removes the noise of index 0 by Tweedie's formula, which for VP theirs is to second order in beta_0.
        near = 1e-9 if i > 0 or kind == "ancestral" or isinstance(chain, SMLDChain) else 2 * (0.1 / 40) ** 2
        torch.testing.assert_close(found_mean, mean, rtol=1e-8, atol=near * float(1 + mean.abs().max()))
        if i > 0:
            noise = Draw(7).normal((5, 3), torch.float64) if std else 0.0
            torch.testing.assert_close(found - found_mean, std * noise + 0 * x, rtol=1e-7, atol=1e-9)


@every_chain
@pytest.mark.parametrize("kind", ["ancestral", "reverse diffusion"])
def test_a_whole_run_of_predictor_and_corrector_is_the_references(chain, kind):
    denoiser = gaussian(chain, 3)
    sampler = Sampler(RULES[kind](chain), 40, ChainGrid(), before=[Langevin(0.16, norm="batch")])
    begin = start(chain.level(1.0), (6, 3))
    found = sampler(denoiser, None, Draw(3), start=begin)
    assert sampler.evaluations == 80
    x, draw = begin, Draw(3)
    for i in reversed(range(40)):
        t = (i + 1) / 40
        x = correct(chain, x, denoiser.score(x, t), i, draw.normal((6, 3), torch.float64), 0.16)
        mean, std = predict(kind, chain, x, denoiser.score(x, t), i)
        x = mean + std * draw.normal((6, 3), torch.float64) if i else mean
    torch.testing.assert_close(found, x, rtol=1e-7, atol=2e-5)


@every_chain
@pytest.mark.parametrize("hook", [Langevin(0.2), AnnealedLangevin(0.2)], ids=["norm", "annealed"])
def test_langevin_of_a_chain_uses_its_own_alpha(chain, hook):
    # Trap 2: the code's 1 - beta_i, not the paper's product. The factor is read off the noise term's size.
    beta, _ = tables(chain)
    for i in (0, 20, 39):
        level = chain.level(chain.time(i))
        x = start(level, (4, 3))
        denoiser, z = gaussian(chain, 3), Draw(4).normal((4, 3), torch.float64)
        score = denoiser.score(x, level.t)
        size = 2 * (0.2 * z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2
        if isinstance(hook, AnnealedLangevin):
            size = torch.full_like(size, float(2 * (0.2 * level.sigma) ** 2))
        size = size * (1.0 if beta is None else 1 - beta[i])
        found = hook(Evaluation(denoiser), x, level, Draw(4))
        torch.testing.assert_close(found, x + size * score + torch.sqrt(2 * size) * z, rtol=1e-8, atol=1e-9)


@every_chain
@pytest.mark.parametrize(("steps", "expected"), [(39, list(range(39, -1, -1))), (3, [39, 26, 13, 0]), (0, [39])])
def test_grid_is_the_chains_indices(chain, steps, expected):
    levels = ChainGrid()(chain, steps)
    assert [float(chain.index(level.t)) for level in levels] == expected


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 333, 998, 999])
def test_part_of_a_chain_is_spread_evenly(steps):
    chain = SMLDChain()
    index = torch.stack([chain.index(level.t) for level in ChainGrid()(chain, steps)])
    assert (index[0], index[-1]) == (999, 0)
    assert len(index) == steps + 1
    gaps = -index.diff()
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@every_chain
def test_chains_draw_the_data_on_all_or_some_of_their_indices(chain):
    long = DDPMChain() if isinstance(chain, DDPMChain) else SMLDChain(1000, 0.01, 50.0)
    # A Gaussian is a little too narrow after few ancestral steps (score_sde.md 8: 12.6 % at 50, 1.5 % at 1000).
    for steps, tolerance in ((400, 0.05), (100, 0.12)):
        x = Sampler(Ancestral(), steps, ChainGrid())(gaussian(long, 4, dtype=torch.float32), (2000, 4), Draw(3))
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.015)
        assert float(x.std()) == pytest.approx(STD, rel=tolerance)


def test_chains_and_continuous_processes_share_all_other_samplers():
    # A chain of 1000 indices solved on a grid of its times in between, and its SDE by the same solver.
    sampler = Sampler(ReverseDiffusion(deterministic=True), 50, UniformTime(1e-3), finish="mean")
    for chain, process in ((DDPMChain(), VP()), (SMLDChain(), VE())):
        begin = start(process.level(1.0), (64, 2))
        found, expected = (sampler(gaussian(p, 2), None, Draw(0), start=begin) for p in (chain, process))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("hook", [Langevin(0.2, 4, "batch"), AnnealedLangevin(0.2, 4)], ids=["norm", "annealed"])
def test_correctors_alone_move_a_gaussian_as_they_must(hook):
    """Song and Ermon 2019: no predictor. Each step takes the variance v to (1 - e / V)^2 v + 2 e at the level's V."""
    process = VE(0.01, 5.0)
    sampler = Sampler(Stay(), 30, UniformTime(), before=[hook])
    x = sampler(gaussian(process, 16, dtype=torch.float32), (1000, 16), Draw(2))
    assert sampler.evaluations == 30 * 4 + 1
    levels = sampler.levels(process)
    variance = float(levels[0].sigma) ** 2
    for level in levels[:-1]:
        target = STD**2 + float(level.sigma) ** 2
        for _ in range(4):
            # Of the norms, |score|^2 is about D v / V^2.
            size = float(level.sigma) ** 2 if isinstance(hook, AnnealedLangevin) else target**2 / variance
            size *= 2 * 0.2**2
            variance = (1 - size / target) ** 2 * variance + 2 * size
    shrunk = variance * (STD**2 / target) ** 2
    assert float(x.std()) == pytest.approx(math.sqrt(shrunk), rel=0.02)
    assert shrunk != pytest.approx(STD**2, rel=0.05)  # far from enough steps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChainGrid()(VP(), 4), "ChainGrid needs a discrete chain, and VP is none"),
        (lambda: ChainGrid()(SubVP(), 4), "sub-VP has no discrete form"),
        (lambda: Sampler(Ancestral(), 41, ChainGrid()).levels(CHAINS["VP"]), "41 levels of a chain of 40: .* 40 steps"),
        (lambda: Ancestral("none"), "noise of Ancestral"),  # type: ignore[arg-type]
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
