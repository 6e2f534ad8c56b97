import pytest
import torch

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.gaussian import CLEAN, VE, VP, Flow, match
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    Ancestral,
    Clamp,
    DPMpp2M,
    Euler,
    EulerMaruyama,
    Heun,
    Hook,
    Langevin,
    LogUniform,
    ReverseDiffusion,
    Sampler,
    UniformTime,
)
from lightning_sgm.samplers.evaluation import Evaluation, per_component
from tests.samplers.exact import MEAN, PROCESSES, Mixture, gaussian, start


class Counting(BaseDenoiser):
    """x_0 = 0.5 x + the condition ``shift``; remembers every call."""

    def __init__(self, process):
        super().__init__(process)
        self.calls = []

    def x0(self, x, t, **conditions):
        self.calls.append((tuple(x.shape), float(t)))
        return 0.5 * x + match(conditions["shift"], x) if conditions else 0.5 * x


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(), 35),
        (Sampler(Heun(), 9, finish="state"), 18),
        (Sampler(Euler(), 7), 7),
        (Sampler(DPMpp2M(), 20), 20),
        (Sampler(Ancestral(), 5), 5),
        (Sampler(EulerMaruyama(), 6, UniformTime(), finish="mean"), 6),
        (Sampler(ReverseDiffusion(), 6, UniformTime(), before=[Langevin(steps=2)], finish="mean"), 18),
        # The clean level has no corrector.
        (Sampler(Euler(), 6, after=[Langevin()]), 11),
        (Sampler(Euler(), 1), 1),
    ],
)
def test_evaluations_are_counted(sampler, expected):
    denoiser = Counting(VP())
    sampler(denoiser, (3, 2), Draw(0))
    assert sampler.evaluations == expected == len(denoiser.calls)
    assert all(t > 0 for _, t in denoiser.calls)


def test_an_answer_is_remembered_for_the_same_state_and_level_only():
    denoiser = Counting(VP())
    evaluate = Evaluation(denoiser)
    x, level = torch.ones(2, 1), VP().level(0.5)
    assert evaluate(x, level) is evaluate(x, VP().level(0.5))
    assert evaluate.count == 1
    evaluate(x.clone(), level)
    evaluate(x, VP().level(0.4))
    evaluate(x, level)
    assert evaluate.count == len(denoiser.calls) == 4


def test_a_look_between_steps_is_free():
    class Look(Hook):
        def __call__(self, evaluate, x, level, draw):
            if level.sigma > 0:
                evaluate(x, level)
            return x

    sampler = Sampler(Euler(), 8, after=[Look()], before=[Look()])
    sampler(Counting(VP()), (2, 1), Draw(0))
    assert sampler.evaluations == 8


def test_finish():
    process = VE(0.01, 50.0)
    denoiser = gaussian(process, dtype=torch.float32)
    grid = UniformTime(0.2)
    noise = process.sigma(torch.tensor(0.2, dtype=torch.float64))
    states = {}
    for finish in ("clean", "mean", "state"):
        sampler = Sampler(EulerMaruyama(), 12, grid, finish=finish)
        levels = sampler.levels(process)
        assert len(levels) == 13
        assert levels[-1] == CLEAN if finish == "clean" else levels[-1].sigma == noise
        states[finish] = sampler(denoiser, (4, 1), Draw(1))
    # The last step's noise is all that tells the two apart.
    level, target = levels[-2:]
    std = process.diffusion(level.t) * torch.sqrt(level.t - target.t)
    last = Draw(1)
    for _ in range(13):
        noise = last.normal((4, 1))
    torch.testing.assert_close(states["state"] - states["mean"], std.float() * noise, rtol=1e-4, atol=1e-5)
    # "clean" is the posterior mean of the state of one step fewer.
    state = Sampler(EulerMaruyama(), 11, grid, finish="state")(denoiser, (4, 1), Draw(1))
    torch.testing.assert_close(states["clean"], denoiser.x0(state, 0.2), rtol=1e-5, atol=1e-6)


def test_hooks_see_their_levels_and_the_last_mean():
    seen = []

    class Note(Hook):
        def __init__(self, name):
            self.name = name

        def __call__(self, evaluate, x, level, draw):
            seen.append((self.name, float(level.t)))
            return x + 1.0 if self.name == "after" else x

    sampler = Sampler(Ancestral(), 2, UniformTime(0.5), before=[Note("before")], after=[Note("after")], finish="mean")
    steps = []
    x = sampler(Counting(VP()), (1, 1), Draw(0), on_step=lambda step, level, x: steps.append((step, float(level.t), x)))
    assert seen == [("before", 1.0), ("after", 0.75), ("before", 0.75), ("after", 0.5)]
    assert [(step, t) for step, t, _ in steps] == [(0, 0.75), (1, 0.5)]
    assert steps[-1][2] is x
    # A hook acts on the noiseless result of the last step, which therefore stays as the hook left it.
    mean = Ancestral()(Evaluation(Counting(VP())), steps[0][2], VP().level(0.75), VP().level(0.5), Draw(0), None)[1]
    torch.testing.assert_close(x, mean + 1.0)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(),
        Sampler(Heun(0.2)),
        Sampler(DPMpp2M(), 12, LogUniform()),
        Sampler(Ancestral(), 10),
        Sampler(EulerMaruyama(), 10, UniformTime(1e-3), before=[Langevin()], finish="mean"),
        Sampler(ReverseDiffusion(), 10, UniformTime(1e-3), after=[Langevin(norm="dimension"), Clamp()]),
    ],
    ids=["Heun", "churn", "DPM++2M", "ancestral", "EM + Langevin", "RD + Langevin"],
)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    process, keys = VP(), torch.tensor([3, 14, 15, 92, 65, 35])
    denoiser = Mixture().denoiser(process)
    together = sampler(denoiser, (6, 2), Draw(8, keys))
    for part in ([0, 1, 2], [5], [4, 3]):
        alone = sampler(denoiser, (len(part), 2), Draw(8, keys[part]))
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(EulerMaruyama(), 8, UniformTime(1e-3))], ids=["Heun", "EM"])
def test_same_seed_same_samples(sampler):
    denoiser = Mixture().denoiser(VP())
    assert torch.equal(sampler(denoiser, (5, 2), Draw(8)), sampler(denoiser, (5, 2), Draw(8)))
    assert not torch.equal(sampler(denoiser, (5, 2), Draw(8)), sampler(denoiser, (5, 2), Draw(9)))


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|, without the zeros of the diagonal."""
    n, m = len(a), len(b)
    within = torch.cdist(a, a).sum() / (n * (n - 1)) + torch.cdist(b, b).sum() / (m * (m - 1))
    return float(2 * torch.cdist(a, b).mean() - within)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize(
    "sampler",
    [Sampler(Heun(), 36), Sampler(DPMpp2M(), 60, LogUniform()), Sampler(Ancestral(), 200, LogUniform())],
    ids=["Heun", "DPM++2M", "ancestral"],
)
def test_samples_of_the_mixture(process, sampler):
    # The same count of exact draws is within 0.002 (9 of 10 seeds); a shift of all samples by 0.1 gives 0.015.
    mixture, count = Mixture(), 2000
    samples = sampler(mixture.denoiser(process), (count, 2), Draw(1))
    exact = mixture.draw(4000)
    assert energy_distance(samples, exact) < 0.005
    assert float((samples[:, 0] < 0).float().mean()) == pytest.approx(0.3, abs=0.04)


def test_energy_distance_notices():
    mixture = Mixture()
    a, b = mixture.draw(2000, 1), mixture.draw(4000)
    assert abs(energy_distance(a, b)) < 0.004
    assert energy_distance(a + torch.tensor([0.1, 0.0]), b) > 0.005


class Pair:
    """Two components with their own processes, denoised jointly."""

    def __init__(self, parts):
        self.parts = parts
        self.process = {name: part.process for name, part in parts.items()}
        self.calls = 0

    def x0(self, x, t, **conditions):
        self.calls += 1
        return {name: part.x0(x[name], t, **conditions) for name, part in self.parts.items()}


@pytest.mark.parametrize("rule", [Euler(), Heun(), DPMpp2M(), ReverseDiffusion(deterministic=True)])
def test_components_run_jointly_as_they_would_alone(rule):
    parts = {"x": gaussian(VP(), 3), "adj": gaussian(VE(0.01, 50.0), 2)}
    pair = Pair(parts)
    sampler = Sampler(rule, 10, UniformTime(1e-3), after=[Clamp()])
    level = sampler.levels(pair.process)[0]
    begin = {"x": start(level["x"], (4, 3)), "adj": start(level["adj"], (4, 2), 2)}
    together = sampler(pair, None, Draw(0), start=begin)  # type: ignore[arg-type]
    assert sampler.evaluations == pair.calls
    assert set(together) == {"x", "adj"}
    for name, part in parts.items():
        alone = sampler(part, None, Draw(0), start=begin[name])
        torch.testing.assert_close(together[name], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(Ancestral(), 300, LogUniform()),
        Sampler(EulerMaruyama(), 200, UniformTime(1e-3), finish="mean"),
        Sampler(Heun(0.1), 30, LogUniform(), before=[Langevin(0.1, norm="batch")]),
    ],
    ids=["ancestral", "EM", "churn + Langevin"],
)
def test_stochastic_rules_draw_every_component(sampler):
    parts = {"x": gaussian(VP(), 3, dtype=torch.float32), "adj": gaussian(VE(0.01, 50.0), 2, 0.8, torch.float32)}
    samples = sampler(Pair(parts), {"x": (4000, 3), "adj": (4000, 2)}, Draw(4))
    for name, std in (("x", 0.4), ("adj", 0.8)):
        assert float(samples[name].mean()) == pytest.approx(MEAN, abs=0.04)
        assert float(samples[name].std()) == pytest.approx(std, rel=0.06)
    both = torch.cat([samples["x"], samples["adj"]], 1)
    assert float(torch.corrcoef(both.T).fill_diagonal_(0).abs().max()) < 0.07


def test_per_component_splits_tuples_and_leaves_levels_alone():
    level = VP().level(0.5)
    assert per_component(lambda a, b: a + b, 1, 2) == 3
    assert per_component(lambda a: (a, -a), {"p": 1, "q": 2}) == ({"p": 1, "q": 2}, {"p": -1, "q": -2})
    assert per_component(lambda a: level, {"p": 1}) == {"p": level}


def test_start_noise_is_the_first_level_and_can_have_its_own_source():
    for process in (VP(), VE(0.01, 50.0), Flow()):
        sampler = Sampler(Euler(), 3, LogUniform())
        noise = sampler.prior(process, (10000, 2), Draw(3))
        assert noise.dtype == torch.float32
        assert float(noise.std()) == pytest.approx(float(sampler.levels(process)[0].sigma), rel=0.03)
    denoiser = gaussian(VP(), 2, dtype=torch.float32)
    begin = sampler.prior(VP(), (3, 2), Draw(3, torch.arange(3)))
    torch.testing.assert_close(
        sampler(denoiser, None, Draw(5), start=begin), sampler(denoiser, (3, 2), Draw(3, torch.arange(3)))
    )


def test_conditions_reach_the_denoiser():
    shift = torch.tensor([0.0, 10.0])
    x = Sampler(Euler(), 4)(Counting(VP()), (2, 1), Draw(0), shift=shift)
    y = Sampler(Euler(), 4)(Counting(VP()), (2, 1), Draw(0))
    assert float(x[0]) == pytest.approx(float(y[0]))
    assert float(x[1] - y[1]) > 5.0


def test_gradients_stay_as_the_caller_has_them():
    shift = torch.tensor([1.0, 2.0], requires_grad=True)
    Sampler(Heun(), 3)(Counting(VP()), (2, 1), Draw(0), shift=shift).sum().backward()
    assert shift.grad is not None
    assert (shift.grad != 0).all()
    with torch.inference_mode():
        x = Sampler(EulerMaruyama(), 3, UniformTime(1e-3), before=[Langevin()])(Counting(VP()), (2, 1), Draw(0))
    assert not x.requires_grad


def test_bad_values():
    with pytest.raises(ValueError, match="steps"):
        Sampler(steps=0)
    with pytest.raises(ValueError, match="finish"):
        Sampler(finish="noisy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        Sampler()(Counting(VP()), None, Draw(0))
