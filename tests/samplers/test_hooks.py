import pytest
import torch

from lightning_sgm.processes.gaussian import CLEAN
from lightning_sgm.random import Draw
from lightning_sgm.samplers import Clamp, Langevin
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


def test_langevin_leaves_clean_data_alone_and_counts_its_evaluations():
    process = SDES["VE"]
    evaluate, x = Evaluation(gaussian(process)), torch.zeros(2, 1, dtype=torch.float64)
    assert Langevin()(evaluate, x, CLEAN, Draw(0)) is x
    assert evaluate.count == 0
    Langevin(steps=4)(evaluate, x, process.level(0.5), Draw(0))
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
        lambda: Clamp(1.0, 1.0),
        lambda: Clamp(width=-1.0),
    ],
)
def test_bad_values(make):
    with pytest.raises(ValueError):
        make()
