import math

import pytest
import torch

from lightning_sgm.denoiser import BaseDenoiser, GaussianMixtureDenoiser
from lightning_sgm.guidance import Gray, Mask, Matrix
from lightning_sgm.processes.gaussian import CLEAN, VE, VP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    Ancestral,
    Clamp,
    Euler,
    EulerMaruyama,
    Heun,
    Hook,
    Langevin,
    Replacement,
    ReverseDiffusion,
    Sampler,
    UniformTime,
)
from lightning_sgm.samplers.evaluation import Evaluation
from tests.samplers.exact import LAST_TIME, PROCESSES, SDES, gaussian, start
from tests.samplers.test_loop import Pair

FIRST = Mask(torch.tensor([True, False]))
PIXEL = torch.tensor([[0.6, 0.0]])
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def two_pixels(process):
    """Correlation 0.9, sd 0.5: given 0.6 in one, the other is 0.54 with sd 0.5 sqrt(1 - 0.9^2) = 0.218."""
    covariance = 0.25 * torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    return GaussianMixtureDenoiser(process, torch.zeros(1, 2), covariance)


# score_sde.md 2.6: the authors' code with N = 500 and 4000 samples; steps of the corrector, mean and sd.
BIAS = {
    ("VP", 0): (0.37, 0.28),
    ("VP", 1): (0.495, 0.234),
    ("VP", 5): (0.523, 0.231),
    ("VE", 0): (0.37, 0.28),
    ("VE", 1): (0.541, 0.222),
    ("VE", 5): (0.527, 0.231),
}


@pytest.mark.parametrize(("name", "steps"), BIAS)
def test_two_pixels_have_the_bias_of_the_published_way(name, steps):
    corrector: list[Hook] = [Langevin(0.16, steps, norm="batch")] if steps else []
    sampler = Sampler(ReverseDiffusion(), 500, UniformTime(LAST_TIME[name]), before=corrector, finish="mean")
    x = Replacement(FIRST, PIXEL).around(sampler)(two_pixels(SDES[name]), (4000, 2), Draw(1))
    mean, std = BIAS[name, steps]
    # Standard errors of both runs together: 0.005 of the mean and 0.0035 of the sd.
    assert float(x[:, 1].mean()) == pytest.approx(mean, abs=0.015)
    assert float(x[:, 1].std()) == pytest.approx(std, abs=0.01)
    # And what is known has the noise of the last level, as the mean of a step has it.
    last = SDES[name].level(LAST_TIME[name])
    assert float(x[:, 0].mean()) == pytest.approx(0.6, abs=0.001)
    assert float(x[:, 0].std()) == pytest.approx(float(last.sigma), rel=0.05)


@pytest.mark.parametrize("name", SDES)
def test_nothing_but_the_data_is_left_in_the_end(name):
    """score_sde.md 8, trap 3: the authors' code leaves sd 0.0099 in the unknown part with VE."""
    process = SDES[name]
    denoiser = GaussianMixtureDenoiser(process, torch.tensor([[0.6, -0.2]]), torch.zeros(1, 2, 2))
    corrector: list[Hook] = [Langevin(0.1, norm="batch")]
    sampler = Sampler(ReverseDiffusion(), 200, UniformTime(LAST_TIME[name]), before=corrector)
    x = Replacement(FIRST, PIXEL).around(sampler)(denoiser, (500, 2), Draw(1))
    assert torch.equal(x[:, 0], torch.full((500,), 0.6))
    assert float((x[:, 1] + 0.2).abs().max()) < 1e-5
    # The mean of the last of 20 exact steps: of the noise what the posterior's mean keeps, and nothing fresh.
    sampler = Sampler(Ancestral(), 20, UniformTime(LAST_TIME[name]), finish="mean")
    x = Replacement(FIRST, PIXEL).around(sampler)(denoiser, (4000, 2), Draw(1))
    level, target = sampler.levels(process)[-2:]
    kept = float(level.alpha / target.alpha * target.sigma**2 / level.sigma)
    assert float(x[:, 1].std()) == pytest.approx(kept, rel=0.05)
    assert kept < 0.7 * float(target.sigma)


@every_process
def test_the_known_part_is_a_draw_of_its_noisy_law(process):
    hook, evaluate = Replacement(FIRST, PIXEL), Evaluation(gaussian(process, 2))
    level = process.level(0.4)
    x = start(level, (20000, 2))
    found = hook(evaluate, x, level, Draw(3))
    assert found is not x
    assert torch.equal(found[:, 1], x[:, 1])
    sigma = float(level.sigma)
    assert float(found[:, 0].mean()) == pytest.approx(0.6 * float(level.alpha), abs=4 * sigma / math.sqrt(20000))
    assert float(found[:, 0].std()) == pytest.approx(sigma, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([found[:, 0], x[:, 0]]))[0, 1])) < 0.03
    assert not torch.equal(found, hook(evaluate, x, level, Draw(4)))
    clean = hook(evaluate, x, CLEAN, Draw(3))
    assert torch.equal(clean[:, 0], PIXEL[:, 0].double().expand(20000))
    assert torch.equal(clean[:, 1], x[:, 1])
    assert evaluate.count == 0


@every_process
@pytest.mark.parametrize("rule", [Heun(), Euler()], ids=["Heun", "Euler"])
def test_the_result_agrees_exactly_with_what_is_known(process, rule):
    y = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = Mask(torch.arange(16).view(4, 4) % 3 == 0)
    sampler = Sampler(rule, 12, after=[Clamp(-1.0, 1.0)])
    x = Replacement(mask, y).around(sampler)(gaussian(process, 48, dtype=torch.float32), (6, 3, 4, 4), Draw(1))
    assert torch.equal(mask.measure(x), mask.measure(y))
    assert (x != y).any()
    gray = Replacement(Gray(), y.mean(1, keepdim=True)).around(sampler)
    x = gray(gaussian(process, 48, dtype=torch.float32), (6, 3, 4, 4), Draw(1))
    torch.testing.assert_close(x.mean(1), y.mean(1), rtol=0, atol=1e-6)


class Watch(BaseDenoiser):
    """Remembers every state it is asked about."""

    def __init__(self, process):
        super().__init__(process)
        self.states = []

    def x0(self, x, t, **conditions):
        self.states.append((float(t), x))
        return torch.zeros_like(x)


def test_every_state_the_model_sees_is_noisy_in_its_known_part():
    """Also the first (score_sde.md 8, trap 4: the authors start with known pixels without noise), and the corrector's.

    Except Heun's guess within a step.
    """
    process = VE(0.01, 50.0)
    denoiser = Watch(process)
    y = torch.tensor([[7.0, 0.0]])
    sampler = Sampler(EulerMaruyama(), 5, UniformTime(0.2), before=[Langevin(steps=2)], after=[Langevin()])
    Replacement(FIRST, y).around(sampler)(denoiser, (4000, 2), Draw(1))
    assert [t for t, _ in denoiser.states] == pytest.approx([1.0] * 3 + [0.8] * 4 + [0.6] * 4 + [0.4] * 4 + [0.2] * 4)
    last = None
    for index, (t, x) in enumerate(denoiser.states):
        sigma = float(process.level(t).sigma)
        # The second of two steps of one hook sees the first's answer.
        if index % 4 != 1:
            assert float(x[:, 0].mean()) == pytest.approx(7.0, abs=0.07 * sigma)
            assert float(x[:, 0].std()) == pytest.approx(sigma, rel=0.05)
            assert last is None or not torch.equal(x[:, 0], last)
        last = x[:, 0]


def test_around_leaves_the_sampler_as_it_was_and_acts_after_everything():
    order = []

    class Note(Hook):
        def __init__(self, name):
            self.name = name

        def __call__(self, evaluate, x, level, draw):
            order.append(self.name)
            return x

    class Noted(Replacement):
        def __call__(self, evaluate, x, level, draw):
            order.append("known")
            return super().__call__(evaluate, x, level, draw)

    sampler = Sampler(Euler(), 1, before=[Note("a"), Note("b")], after=[Note("c")])
    around = Noted(FIRST, PIXEL).around(sampler)
    around(gaussian(VP(), 2, dtype=torch.float32), (1, 2), Draw(0))
    assert order == ["known", "a", "known", "b", "known", "known", "c", "known"]
    assert len(sampler.before) == 2
    assert len(sampler.after) == 1
    assert around.evaluations == 1
    assert sampler.evaluations == 0


def test_a_sample_does_not_depend_on_its_batch():
    keys = torch.tensor([3, 14, 15, 92])
    y = torch.tensor([[0.6], [0.1], [-0.4], [0.9]])
    operator = Matrix([[0.5, 0.5]])
    sampler = Sampler(ReverseDiffusion(), 30, UniformTime(1e-3), before=[Langevin()])
    together = Replacement(operator, y).around(sampler)(two_pixels(VP()), (4, 2), Draw(8, keys))
    torch.testing.assert_close(together.mean(1, keepdim=True), y, rtol=0, atol=1e-6)
    for part in ([0, 1, 2], [3]):
        alone = Replacement(operator, y[part]).around(sampler)(two_pixels(VP()), (len(part), 2), Draw(8, keys[part]))
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-5)


def test_components_have_their_own_known_parts():
    parts = {"x": gaussian(VP(), 2, dtype=torch.float32), "adj": gaussian(VE(0.01, 50.0), 3, dtype=torch.float32)}
    operator = {"x": FIRST, "adj": Matrix([[1.0, 1.0, 1.0]])}
    y = {"x": PIXEL, "adj": torch.tensor([[2.0]])}
    around = Replacement(operator, y).around(Sampler(Heun(), 8))
    x = around(Pair(parts), {"x": (5, 2), "adj": (5, 3)}, Draw(1))  # type: ignore[arg-type]
    assert torch.equal(x["x"][:, 0], torch.full((5,), 0.6))
    torch.testing.assert_close(x["adj"].sum(1), torch.full((5,), 2.0), rtol=0, atol=1e-5)
    assert float(x["x"][:, 1].std()) > 0.05


def test_measurements_of_another_shape_are_refused():
    sampler = Replacement(FIRST, torch.zeros(1, 3)).around(Sampler(Euler(), 3))
    with pytest.raises(ValueError, match=r"mask of shape \(2,\)|measurements of shape|does not fit"):
        sampler(two_pixels(VP()), (4, 3), Draw(0))
    with pytest.raises(ValueError, match=r"measurements of shape \(4, 1\).*got \(4, 5\)"):
        Replacement(Matrix([[1.0, 1.0]]), torch.zeros(1, 5)).around(Sampler(Euler(), 3))(
            two_pixels(VP()), (4, 2), Draw(0)
        )
