import math
from itertools import pairwise

import pytest
import torch

from lightning_sgm.processes.gaussian import CLEAN, VP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    AnnealedLangevin,
    Clamp,
    Langevin,
    LogUniform,
    ReverseDiffusion,
    Sampler,
    Stay,
    UniformTime,
)
from lightning_sgm.samplers.evaluation import Evaluation
from tests.samplers.exact import MEAN, PROCESSES, SDES, STD, gaussian, start


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize(("norm", "excess"), [("batch", 0.0), ("sample", 4 / 64), ("dimension", 2 / 64)])
def test_langevin_keeps_the_noisy_law(name, norm, excess):
    """Its stationary variance is the level's, with the known excess: snr^2 by step size, the rest by the norms."""
    process, snr = SDES[name], 0.16
    level = process.level(0.4)
    variance = float((level.alpha * STD) ** 2 + level.sigma**2)
    x = level.alpha.float() * MEAN + variance**0.5 * Draw(9).normal((600, 64))
    hook = Langevin(snr, 60, norm)
    x = hook(Evaluation(gaussian(process, 64, dtype=torch.float32)), x, level, Draw(1))
    found = float(((x - level.alpha * MEAN) ** 2).mean()) / variance
    # 38,400 numbers: standard error 0.7 %.
    assert found == pytest.approx(1 + snr**2 + excess, abs=0.025)
    assert float((x - level.alpha * MEAN).mean()) / variance**0.5 == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("t", [0.15, 0.6])
def test_annealed_langevin_keeps_the_noisy_law(name, t):
    """Steps of one size e keep V / (1 - e / 2 V) of a Gaussian with variance V exactly: here e = 2 a (snr sigma)^2."""
    process, snr = SDES[name], 0.3
    level = process.level(t)
    variance = float((level.alpha * STD) ** 2 + level.sigma**2)
    share = snr**2 * float(level.sigma) ** 2 / variance * chain_scale(process, t)
    x = level.alpha.float() * MEAN + variance**0.5 * Draw(9).normal((600, 64))
    x = AnnealedLangevin(snr, 60)(Evaluation(gaussian(process, 64, dtype=torch.float32)), x, level, Draw(1))
    found = float(((x - level.alpha * MEAN) ** 2).mean()) / variance
    assert found == pytest.approx(1 / (1 - share), abs=0.022)
    assert float((x - level.alpha * MEAN).mean()) / variance**0.5 == pytest.approx(0.0, abs=0.02)


def chain_scale(process, t, step=1e-3):
    """Squared scale of a transition over one step of the chain: 1 for VE, 1 - beta / 1000 to first order for others."""
    return float((process.level(t).alpha / process.level(max(0.0, t - step)).alpha) ** 2)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("t", [1e-4, 0.3, 1.0])
def test_step_sizes_are_the_formulas(name, t):
    # score_sde.md 2.4: e = 2 a (r sigma)^2 for annealed Langevin dynamics; the noise of its step is sqrt(2 e) z.
    process = SDES[name]
    level, denoiser = process.level(t), gaussian(process, 3)
    x, z = start(level, (5, 3)), Draw(4).normal((5, 3), torch.float64)
    score = denoiser.score(x, t)
    factors = {"chain": chain_scale(process, t), "marginal": float(level.alpha) ** 2}
    if name != "VE" and t == 0.3:  # trap 1: sub-VP has it, the one of VP
        assert factors["chain"] == pytest.approx(1 - (0.1 + 0.3 * 19.9) / 1000, abs=5e-5)
    for scale, factor in factors.items():
        e = 2 * factor * (0.2 * float(level.sigma)) ** 2
        found = AnnealedLangevin(0.2, 1, scale)(Evaluation(denoiser), x, level, Draw(4))  # type: ignore[arg-type]
        torch.testing.assert_close(found, x + e * score + math.sqrt(2 * e) * z, rtol=1e-9, atol=1e-12)
        norms = z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)
        e = 2 * factor * (0.2 * norms) ** 2
        found = Langevin(0.2, 1, scale=scale)(Evaluation(denoiser), x, level, Draw(4))  # type: ignore[arg-type]
        torch.testing.assert_close(found, x + e * score + torch.sqrt(2 * e) * z, rtol=1e-9, atol=1e-9)


def test_a_process_says_how_long_a_step_of_its_chain_is():
    class Coarse(VP):
        chain_step = 0.1

    process = Coarse()
    level = process.level(0.5)
    x, z = start(level, (5, 3)), Draw(4).normal((5, 3), torch.float64)
    e = 2 * chain_scale(process, 0.5, 0.1) * (0.2 * float(level.sigma)) ** 2
    expected = x + e * gaussian(process, 3).score(x, 0.5) + math.sqrt(2 * e) * z
    found = AnnealedLangevin(0.2)(Evaluation(gaussian(process, 3)), x, level, Draw(4))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# Not annealed steps for sub-VP: its noise, and with it they, shrink so fast that the mean stays behind by 0.015.
@pytest.mark.parametrize(
    ("name", "hook"),
    [
        *((name, Langevin(0.16, 2, "batch")) for name in SDES),
        *((name, AnnealedLangevin(0.3, 5)) for name in ("VP", "VE")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_correctors_alone_reach_the_data_in_enough_steps(name, hook):
    sampler = Sampler(Stay(), 300, LogUniform(), before=[hook])
    x = sampler(gaussian(SDES[name], 16, dtype=torch.float32), (1000, 16), Draw(2))
    assert sampler.evaluations == 300 * hook.steps + 1
    # 16,000 numbers: standard errors 0.003 and 0.6 %. Langevin's excess is snr^2 / 2, the annealed one's a little more
    # at 300 levels, which hand on what they have not forgotten.
    excess = 0.16**2 / 2 if isinstance(hook, Langevin) else 0.015
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x.std()) == pytest.approx(STD * (1 + excess), rel=0.018)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("order", ["corrector first", "predictor first"])
def test_predictor_and_corrector_in_both_orders(name, order):
    """The authors' code corrects at t_i and then predicts; their algorithm 1 predicts and corrects at t_{i-1}."""
    process, denoiser = SDES[name], gaussian(SDES[name], 3)
    corrector = [Langevin(0.1)]
    sampler = Sampler(
        ReverseDiffusion(),
        6,
        UniformTime(0.05),
        before=corrector if order == "corrector first" else None,  # type: ignore[arg-type]
        after=corrector if order == "predictor first" else None,  # type: ignore[arg-type]
        finish="state",
    )
    levels = sampler.levels(process)
    x = begin = start(levels[0], (4, 3))
    draw = Draw(3)

    def correct(x, level):
        z, score = draw.normal((4, 3), torch.float64), denoiser.score(x, level.t)
        norms = z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)
        e = 2 * chain_scale(process, float(level.t)) * (0.1 * norms) ** 2
        return x + e * score + torch.sqrt(2 * e) * z

    def predict(x, level, target):
        scale, std = process.transition(target, level)
        mean = (2 - scale) * x + std**2 * denoiser.score(x, level.t)
        return mean + std * draw.normal((4, 3), torch.float64)

    for level, target in pairwise(levels):
        if order == "corrector first":
            x = predict(correct(x, level), level, target)
        else:
            x = correct(predict(x, level, target), target)
    found = sampler(denoiser, None, Draw(3), start=begin)
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)
    assert sampler.evaluations == 12


def test_langevin_forgets_where_it_started():
    process = SDES["VE"]
    level = process.level(0.3)
    width = float(torch.sqrt(STD**2 + level.sigma**2))
    x = torch.full((400, 64), MEAN + 5 * width)
    x = Langevin(0.3, 100, "batch")(Evaluation(gaussian(process, 64, dtype=torch.float32)), x, level, Draw(1))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.05 * width)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("norm", ["sample", "batch", "dimension"])
def test_langevin_is_the_formula(name, norm):
    # score_sde.md 2.4: e = 2 a (r |z| / |s|)^2, x + e s + sqrt(2 e) z.
    process = SDES[name]
    level = process.level(0.5)
    denoiser, x = gaussian(process, 3), start(level, (5, 3))
    noise, score = Draw(4).normal((5, 3), torch.float64), denoiser.score(x, 0.5)
    z, s = noise.norm(dim=1, keepdim=True), score.norm(dim=1, keepdim=True)
    if norm == "batch":
        z, s = z.mean(), s.mean()
    if norm == "dimension":
        z = torch.full((5, 1), 3.0, dtype=torch.float64).sqrt()
    # 1 - beta(t) / 1000 to first order, for VP and sub-VP.
    factor = 1.0 if name == "VE" else 1 - (0.1 + 0.5 * 19.9) / 1000
    e = 2 * factor * (0.16 * z / s) ** 2
    found = Langevin(0.16, 1, norm)(Evaluation(denoiser), x, level, Draw(4))
    torch.testing.assert_close(found, x + e * score + torch.sqrt(2 * e) * noise, rtol=0, atol=1e-4)
    factor = float(level.alpha) ** 2
    e = 2 * factor * (0.16 * z / s) ** 2
    found = Langevin(0.16, 1, norm, "marginal")(Evaluation(denoiser), x, level, Draw(4))
    torch.testing.assert_close(found, x + e * score + torch.sqrt(2 * e) * noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["sample", "dimension"])
def test_langevin_of_a_sample_ignores_its_batch(norm):
    process = SDES["VP"]
    level, keys = process.level(0.5), torch.arange(7) + 100
    denoiser = gaussian(process, 48, dtype=torch.float32)
    x = start(level, (7, 3, 4, 4)).float()
    hook = Langevin(steps=3, norm=norm)
    together = hook(Evaluation(denoiser), x, level, Draw(5, keys))
    apart = [hook(Evaluation(denoiser), x[part], level, Draw(5, keys[part])) for part in (slice(0, 2), slice(2, 7))]
    torch.testing.assert_close(torch.cat(apart), together, rtol=0, atol=1e-6)


def test_batch_norms_do_depend_on_the_batch():
    process = SDES["VP"]
    level, keys = process.level(0.5), torch.arange(7)
    x = start(level, (7, 4))
    hook = Langevin(norm="batch")
    together = hook(Evaluation(gaussian(process, 4)), x, level, Draw(5, keys))
    alone = hook(Evaluation(gaussian(process, 4)), x[:1], level, Draw(5, keys[:1]))
    assert (together[:1] - alone).abs().max() > 1e-3


def test_a_network_that_answers_no_noise_does_not_break_langevin():
    process = SDES["VP"]
    level = process.level(0.5)
    x = torch.full((3, 2), float(level.alpha) * MEAN, dtype=torch.float64)
    found = Langevin()(Evaluation(gaussian(process, 2, std=0.0)), x, level, Draw(0))
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", [Langevin, AnnealedLangevin])
def test_langevin_leaves_clean_data_alone_and_counts_its_evaluations(kind):
    process = SDES["VE"]
    evaluate, x = Evaluation(gaussian(process)), torch.zeros(2, 1, dtype=torch.float64)
    assert kind()(evaluate, x, CLEAN, Draw(0)) is x
    assert evaluate.count == 0
    kind(steps=4)(evaluate, x, process.level(0.5), Draw(0))
    assert evaluate.count == 4


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_clamp_keeps_what_can_be_noisy_data(process):
    hook, evaluate = Clamp(-1.0, 1.0, 4.0), Evaluation(gaussian(process))
    for t in (0.01, 0.5, 1.0):
        level = process.level(t)
        limit = float(level.alpha + 4 * level.sigma)
        inside = torch.tensor([[-0.999 * limit, 0.0, 0.999 * limit]], dtype=torch.float64)
        assert torch.equal(hook(evaluate, inside, level, Draw(0)), inside)
        outside = torch.tensor([[-2 * limit, 9 * limit]], dtype=torch.float64)
        kept = outside.clone()
        assert hook(evaluate, outside, level, Draw(0))[0].tolist() == pytest.approx([-limit, limit])
        assert torch.equal(outside, kept)
    assert hook(evaluate, torch.tensor([[-3.0, 0.2, 1.5]]), CLEAN, Draw(0)).tolist() == [
        pytest.approx([-1.0, 0.2, 1.0])
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Langevin(snr=0.0),
        lambda: Langevin(steps=0),
        lambda: Langevin(norm="l1"),  # type: ignore[arg-type]
        lambda: Langevin(scale="two"),  # type: ignore[arg-type]
        lambda: AnnealedLangevin(snr=-1.0),
        lambda: AnnealedLangevin(steps=0),
        lambda: AnnealedLangevin(scale="two"),  # type: ignore[arg-type]
        lambda: Clamp(1.0, 1.0),
        lambda: Clamp(width=-1.0),
    ],
)
def test_bad_values(make):
    with pytest.raises(ValueError):
        make()
