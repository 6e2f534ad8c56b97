"""Weights: what the squared error at a noise level counts.

Errors of noise, x_0 and velocity are multiples of each other at one level: err_x0 = -(sigma / alpha) err_noise. A
weight therefore names the error which stays accurate at its levels (attribute ``of``) and multiplies its square.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser, Denoiser
from lightning_sgm.linear_denoiser import LinearDenoiser
from lightning_sgm.processes.chains import Chain, as_chain
from lightning_sgm.processes.gaussian import GaussianProcess, Level


class Weight:
    """What the squared error at a level counts.

    Attributes:
        of: the error that is squared.
    """

    of: Literal["noise", "x0", "velocity"]

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """Factor of the squared error, float64 of the shape of the level."""
        raise NotImplementedError


class NoiseWeight(Weight):
    """lambda = sigma^2: (sigma score + eps)^2, the default of Ho et al. 2020 and Song et al. 2021."""

    of = "noise"

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """1."""
        return torch.ones_like(level.t)


class LikelihoodWeight(Weight):
    """lambda = g^2 (Song et al. 2021b, 2101.09258): an upper bound of the negative log-likelihood.

    Only for processes whose noise starts above 0 (VE, EDM): elsewhere its variance explodes near t = 0, and
    :class:`NoiseWeight` under :class:`UniformLogSNR` times has the same expectation.
    """

    of = "noise"

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """g^2 / sigma^2."""
        return (process.diffusion(level.t) / level.sigma) ** 2


class DataWeight(Weight):
    """The plain x_0 error: ResShift's unweighted loss (Yue et al. 2023), for networks that say x_0 or y - x_0."""

    of = "x0"

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """1."""
        return torch.ones_like(level.t)


class PosteriorWeight(Weight):
    """What the x_0 error at an index of a chain adds to the likelihood bound: ResShift's weighted loss.

    c^2 / (2 v), with c the share of x_0 in the mean of the posterior of one index less and v its variance, that of
    index 1 in place of index 0, where it is 0. In every chain this is the term of Ho et al. 2020, eq. 8, per dimension.
    """

    of = "x0"

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """c^2 / (2 v).

        Raises:
            ValueError: the process is no discrete chain.
        """
        chain = as_chain(process, "PosteriorWeight")
        share, _ = _step_back(chain, level)
        _, std = _step_back(chain, chain.level(level.t.clamp_min(2.0 * chain.chain_step)))
        return 0.5 * (share / std) ** 2


def _step_back(chain: Chain, level: Level) -> tuple[Tensor, Tensor]:
    """(share of x_0 in the mean, standard deviation) of the posterior one index before ``level``."""
    before = chain.level((level.t - chain.chain_step).clamp_min(0.0))
    return chain.posterior(torch.ones_like(level.t), torch.zeros_like(level.t), level, before)


class EDMWeight(Weight):
    """1 / c_out^2: the plain squared error of a network under EDM preconditioning (Karras et al. 2022, table 1).

    (r^2 + sigma_data^2) / (r sigma_data)^2 on the x_0 error with r = sigma / alpha, finite at alpha = 0.

    Args:
        sigma_data: standard deviation of the data, as in :class:`~lightning_sgm.denoiser.EDMPreconditioning`.
    """

    of = "x0"

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """(sigma^2 + alpha^2 sigma_data^2) / (sigma sigma_data)^2."""
        return (level.sigma**2 + (level.alpha * self.sigma_data) ** 2) / (level.sigma * self.sigma_data) ** 2


class MinSNR(Weight):
    """min(SNR, gamma) on the x_0 error (Hang et al. 2023, 2303.09556), whatever the network predicts.

    Args:
        gamma: largest weight of the x_0 error, positive; 5 in the paper.
    """

    of = "noise"

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.gamma = gamma

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """min(1, gamma / SNR) on the noise error."""
        return (self.gamma * level.ratio**2).clamp_max(1.0)


class VelocityWeight(Weight):
    """The error of dx/dt = alpha' x_0 + sigma' eps: conditional flow matching (Lipman et al. 2023, 2210.02747)."""

    of = "velocity"

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """1."""
        return torch.ones_like(level.t)


class VWeight(Weight):
    """The error of v = alpha eps - sigma x_0, "SNR + 1" (Salimans and Ho 2022, 2202.00512)."""

    of = "velocity"

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """The square of (alpha^2 + sigma^2) / (alpha sigma' - sigma alpha')."""
        d_alpha, d_sigma = process.derivatives(level.t)
        return ((level.alpha**2 + level.sigma**2) / (level.alpha * d_sigma - level.sigma * d_alpha)) ** 2


class OutputWeight(Weight):
    """The plain squared error of what the network itself says, whatever that is under its preconditioning.

    Under :class:`~lightning_sgm.denoiser.EDMPreconditioning` this is :class:`EDMWeight`, under
    :class:`~lightning_sgm.linear_denoiser.LinearPreconditioning` every direction of the data has a factor of its own.
    """

    of = "x0"

    def __call__(self, level: Level, process: GaussianProcess) -> Tensor:
        """There is no factor of a level alone.

        Raises:
            ValueError: always.
        """
        raise ValueError("OutputWeight is not for states of several components: choose another weight")

    def squared(self, error: Tensor, level: Level, denoiser: BaseDenoiser) -> Tensor:
        """Squares (B, D), float32 or better, of errors of x_0 (B, *).

        Raises:
            ValueError: the denoiser is no network's own.
        """
        if not isinstance(denoiser, Denoiser | LinearDenoiser):
            raise ValueError(
                f"OutputWeight is for training a network, {type(denoiser).__name__} is none: choose another"
            )
        error = error.to(torch.promote_types(error.dtype, torch.float32))
        return denoiser.in_output(error, level).flatten(1).square()
