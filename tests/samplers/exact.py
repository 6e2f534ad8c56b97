"""Data whose every noisy law is known: what the sampler tests compare with."""

from typing import NamedTuple

import torch

from lightning_sgm.denoiser import GaussianMixtureDenoiser
from lightning_sgm.processes.gaussian import EDM, VE, VP, Cosine, Flow, SubVP

MEAN, STD = 0.3, 0.4
PROCESSES = {
    "VP": VP(),
    "sub-VP": SubVP(),
    "VE": VE(0.01, 50.0),
    "EDM": EDM(),
    "cosine": Cosine(),
    "flow": Flow(),
}
SDES = {name: PROCESSES[name] for name in ("VP", "sub-VP", "VE")}
LAST_TIME = {"VP": 1e-3, "sub-VP": 1e-3, "VE": 1e-5}


def gaussian(process, dimension=1, std=STD, dtype=torch.float64):
    """Denoiser of N(MEAN, std^2) in each of ``dimension`` coordinates."""
    eye = torch.eye(dimension, dtype=dtype)[None]
    return GaussianMixtureDenoiser(process, torch.full((1, dimension), MEAN, dtype=dtype), std**2 * eye)


class Mixture(NamedTuple):
    """Two correlated modes in the plane with unequal weights."""

    means: torch.Tensor = torch.tensor([[-0.8, 0.3], [0.7, -0.2]])
    covariances: torch.Tensor = torch.tensor([[[0.04, 0.02], [0.02, 0.05]], [[0.09, -0.03], [-0.03, 0.02]]])
    weights: torch.Tensor = torch.tensor([0.3, 0.7])

    def denoiser(self, process):
        return GaussianMixtureDenoiser(process, self.means, self.covariances, self.weights)

    def draw(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return self.means[which] + torch.einsum("bij,bj->bi", torch.linalg.cholesky(self.covariances)[which], noise)


def start(level, shape, seed=1):
    """float64 noise of the first level."""
    return level.sigma * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ode_map(x, level, target, std=STD):
    """Where the probability-flow ODE of N(MEAN, std^2) takes x: y - m grows like the noisy standard deviation."""
    before = torch.sqrt((level.alpha * std) ** 2 + level.sigma**2)
    after = torch.sqrt((target.alpha * std) ** 2 + target.sigma**2)
    return target.alpha * MEAN + (x - level.alpha * MEAN) * after / before
