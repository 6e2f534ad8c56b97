"""Samplers on states of two components: Gaussian graphs come out with the right mean and covariance."""

import pytest
import torch

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes import VE, VP, Flow, GraphProcess, SubVP
from lightning_sgm.processes.gaussian import as_time
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    S4,
    Euler,
    EulerMaruyama,
    Evaluation,
    Heun,
    Langevin,
    ReverseDiffusion,
    Sampler,
    UniformTime,
)
from tests.samplers.graphs import GaussianGraphs, flat, graph, law

COUNT = 5000
PROCESSES = {
    "VP and VP": GraphProcess(VP(), VP()),
    "VP and VE": GraphProcess(VP(), VE(0.01, 20.0)),
    "sub-VP and VP": GraphProcess(SubVP(), VP()),
}
SAMPLERS = {
    "Euler-Maruyama": Sampler(EulerMaruyama(), 200, UniformTime(1e-3)),
    "reverse diffusion": Sampler(ReverseDiffusion(), 200, UniformTime(1e-3)),
    "S4": Sampler(S4(), 200, UniformTime(1e-3)),
    "S4 with corrector": Sampler(S4(Langevin(0.05, norm="batch")), 200, UniformTime(1e-3)),
    "Euler-Maruyama with corrector": Sampler(
        EulerMaruyama(), 200, UniformTime(1e-3), before=[Langevin(0.05, norm="batch")]
    ),
    "Heun": Sampler(Heun(), 80),
}


def run(process, sampler, count=COUNT, seed=0):
    denoiser = GaussianGraphs(process, *law())
    mask = torch.ones(count, 3, dtype=torch.bool)
    conditions = {"node_mask": mask}
    start = sampler.levels(process)[0]
    noise = process.noise_like(graph(torch.zeros(count, 6)), Draw(seed), conditions)
    noise = {name: part.double() * start[name].sigma for name, part in noise.items()}
    return sampler(denoiser, None, Draw(seed + 1), start=noise, **conditions)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_gaussian_graphs_come_out_with_mean_and_covariance(process, sampler):
    state = run(process, sampler)
    assert torch.equal(state["adj"], state["adj"].mT)
    found, (mean, covariance) = flat(state), law()
    error = (found.mean(0) - mean) / covariance.diagonal().sqrt()
    assert error.abs().max() < 0.07
    root = covariance.diagonal().sqrt()
    difference = (found.T.cov() - covariance) / (root[:, None] * root)
    assert difference.abs().max() < 0.1


def covariance_error(rule, steps):
    """Largest error of a variance, relative, with the same noise for all rules."""
    state = run(PROCESSES["VP and VP"], Sampler(rule, steps, UniformTime(1e-3)), 50000)
    variance = law()[1].diagonal()
    return float(((flat(state).var(0) - variance) / variance).abs().max())


@pytest.mark.slow
def test_splitting_tends_to_the_law():
    errors = [covariance_error(S4(), steps) for steps in (20, 80, 320)]
    assert errors[0] > errors[1] > errors[2]


def test_splitting_asks_once_a_step_and_a_hook_before_twice():
    for sampler, evaluations in (
        (Sampler(S4(Langevin(0.05)), 10, UniformTime(1e-3)), 10),
        (Sampler(EulerMaruyama(), 10, UniformTime(1e-3), before=[Langevin(0.05)]), 20),
    ):
        run(PROCESSES["VP and VP"], sampler, 2)
        assert sampler.evaluations == evaluations


def test_a_step_of_splitting_by_hand():
    """Of the linear part alone (score 0): the flow's own scale and variance, e^I and e^I - 1."""
    process = VP(0.1, 1.0)
    level, target = (process.level(t) for t in (0.5, 0.4))
    integral = float(process.integral(level.t) - process.integral(target.t))

    class Nothing(BaseDenoiser):
        def x0(self, x, t, **conditions):
            return x / process.level(t).alpha  # no noise is estimated, so the score is 0

    rule, x = S4(), torch.ones(400000, dtype=torch.float64)
    found, mean, _ = rule(
        Evaluation(Nothing(process)), x[:, None], level, target, Draw(0), rule.start(process, [level, target])
    )
    assert float(found.mean()) == pytest.approx(torch.tensor(integral / 2).exp().item(), abs=5e-3)
    assert float(found.var()) == pytest.approx(torch.tensor(integral).expm1().item(), rel=0.01)
    assert float(mean.var()) < float(found.var())


def test_the_last_mean_of_splitting_has_no_noise_of_its_last_half():
    """What "state" has more than "mean" is the noise of the last half step alone: variance e^I - 1."""
    process, linear = PROCESSES["VP and VP"], VP()
    mean, state = (run(process, Sampler(S4(), 1, UniformTime(0.5), finish=end)) for end in ("mean", "state"))
    middle, target = (as_time(t) for t in (0.75, 0.5))
    added = torch.expm1(linear.integral(middle) - linear.integral(target))
    torch.testing.assert_close((flat(state) - flat(mean)).var(0), added.expand(6), rtol=0.1, atol=0)


def test_padding_counts_for_nothing_in_a_corrector():
    """Norms and sizes of a graph are those inside its mask."""
    for norm in ("sample", "dimension"):
        narrow, wide = (corrected(PROCESSES["VP and VP"], Langevin(0.1, norm=norm), width) for width in (3, 6))
        torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-12)


def corrected(process, hook, width):
    class Padded(GaussianGraphs):
        def x0(self, x, t, **conditions):
            inner = super().x0({"x": x["x"][:, :3], "adj": x["adj"][:, :3, :3]}, t)
            return pad(inner, width)

    def pad(state, width):
        missing = width - 3
        padded = torch.nn.functional.pad
        return {"x": padded(state["x"], (0, 0, 0, missing)), "adj": padded(state["adj"], (0, missing, 0, missing))}

    mask = (torch.arange(width) < 3).expand(4, width)
    evaluate = Evaluation(Padded(process, *law()), {"node_mask": mask})
    state = pad(graph(torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)), width)
    level = {name: part.level(0.3) for name, part in process.items()}
    moved = hook(evaluate, state, level, Draw(0, torch.arange(4)))
    return flat({"x": moved["x"][:, :3], "adj": moved["adj"][:, :3, :3]})


def test_splitting_refuses_a_corrector_of_several_steps_and_pure_noise():
    with pytest.raises(ValueError, match="shares its one evaluation"):
        S4(Langevin(0.1, steps=2))
    with pytest.raises(ValueError, match="S4 cannot start where alpha = 0"):
        run(GraphProcess(Flow(), Flow()), Sampler(S4(), 3, UniformTime(1e-3)), 2)
    with pytest.raises(ValueError, match="noise_scale"):
        Langevin(0.1, noise_scale=-1.0)


def test_noise_scale_is_the_factor_of_the_noise():
    process = PROCESSES["VP and VP"]
    without = corrected(process, Langevin(0.1, noise_scale=0.0), 3)
    half, whole = (corrected(process, Langevin(0.1, noise_scale=scale), 3) for scale in (0.5, 1.0))
    torch.testing.assert_close(whole - without, 2 * (half - without), rtol=1e-9, atol=1e-12)


def test_deterministic_rules_agree_with_each_other():
    fine = run(PROCESSES["VP and VE"], Sampler(Heun(), 60), 100)
    coarse = run(PROCESSES["VP and VE"], Sampler(Euler(), 2000), 100)
    torch.testing.assert_close(flat(fine), flat(coarse), rtol=0, atol=0.02)
