"""One sampler interface, one law, every process: 20 evaluations solve the probability-flow ODE to about 1e-3.

score_sde.md 8: an 8-mode mixture in 192 dimensions, 16 samples, errors against a solution to 1e-11.
"""

import math

import pytest
import torch

from lightning_sgm.denoiser import GaussianMixtureDenoiser
from lightning_sgm.processes.gaussian import EDM, VE, VP, SubVP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import DPMpp2M, LogUniform, Sampler

# Each with the noise levels to which the table solves it.
PROCESSES = {
    "VP": (VP(), 0.0105, 152.0),
    "sub-VP": (SubVP(), 0.0105, 152.0),
    "VE": (VE(0.01, 50.0), 0.0101, 50.0),
    "EDM": (EDM(), 0.0101, 80.0),
}


def mixture(process):
    """8 modes in 192 dimensions, each a ball of standard deviation 0.05 around a point of size 0.5."""
    means = 0.5 * Draw(11).normal((8, 192), torch.float64)
    covariances = 0.0025 * torch.eye(192, dtype=torch.float64).expand(8, 192, 192)
    return GaussianMixtureDenoiser(process, means, covariances)


def solution(denoiser, x, level, target):
    """The ODE dy/d ln r = y - x_0 of y = x / alpha over the ratio r, to 1e-11."""
    from scipy.integrate import solve_ivp

    process = denoiser.process

    def slope(log_ratio, flat):
        at = process.level(process.t_from_ratio(math.exp(log_ratio)))
        y = torch.from_numpy(flat.reshape(x.shape) * math.sqrt(1 + math.exp(2 * log_ratio)))
        decay = math.exp(2 * log_ratio) / (1 + math.exp(2 * log_ratio))
        change = (y - denoiser.x0(at.alpha * y, at.t)) / math.sqrt(1 + math.exp(2 * log_ratio))
        return change.numpy().ravel() - decay * flat

    low, high = (float(value.ratio.log()) for value in (target, level))
    begin = (x / level.alpha / math.sqrt(1 + math.exp(2 * high))).numpy().ravel()
    end = solve_ivp(slope, (high, low), begin, method="DOP853", rtol=1e-9, atol=1e-10).y[:, -1]
    return target.alpha * math.sqrt(1 + math.exp(2 * low)) * torch.from_numpy(end.reshape(x.shape))


@pytest.mark.parametrize("name", PROCESSES)
def test_twenty_evaluations_for_a_thousandth(name):
    process, low, high = PROCESSES[name]
    denoiser = mixture(process)
    errors: dict[int, float] = {}
    for steps in (20, 40):
        sampler = Sampler(DPMpp2M(), steps, LogUniform(low, high), finish="state")
        level, target = sampler.levels(process)[0], sampler.levels(process)[-1]
        begin = level.sigma * Draw(5).normal((16, 192), torch.float64)
        found = sampler(denoiser, None, Draw(0), start=begin)
        assert sampler.evaluations == steps
        if not errors:
            exact = solution(denoiser, begin, level, target)
        errors[steps] = float((found - exact).square().mean().sqrt())
    print(name, errors)
    assert errors[20] < 1.2e-3
    assert errors[40] < errors[20] / 2
