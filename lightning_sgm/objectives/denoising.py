"""Denoising score matching: a law of times, a weight per level, one squared error (Song et al. 2021, 2011.13456)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.objectives.weights import NoiseWeight, OutputWeight, Weight
from lightning_sgm.processes.chains import as_chain
from lightning_sgm.processes.gaussian import GaussianProcess, Level, as_time, match
from lightning_sgm.random import Draw


class Times:
    """The law of the training times."""

    def __call__(self, process: GaussianProcess, count: int, draw: Draw) -> Tensor:
        """(count,) float64 times in [0, 1] on the device of ``draw``."""
        raise NotImplementedError


def _uniform(count: int, draw: Draw, stratified: bool) -> Tensor:
    return draw.strata(count) if stratified else draw.uniform((count,), torch.float64)


class UniformTime(Times):
    """t uniform in [t_min, 1].

    Args:
        stratified: spread the times of a batch evenly (:meth:`~lightning_sgm.random.Draw.strata`), which makes its mean
            loss less noisy; each time alone has the same law as without. Exact draws spread those of consecutive keys.
        t_min: smallest time; None for the process's own.
    """

    def __init__(self, stratified: bool = True, t_min: float | None = None) -> None:
        if t_min is not None and not 0 <= t_min < 1:
            raise ValueError(f"t_min must lie in [0, 1), got {t_min}")
        self.stratified, self.t_min = stratified, t_min

    def __call__(self, process: GaussianProcess, count: int, draw: Draw) -> Tensor:
        """(count,) float64 times."""
        t_min = process.t_min if self.t_min is None else self.t_min
        return t_min + (1.0 - t_min) * _uniform(count, draw, self.stratified)


class ChainTimes(Times):
    """The times of a discrete chain's indices, all equally often: discrete training.

    With :class:`NoiseWeight` this is the DDPM loss (Ho et al. 2020, eq. 14) under a :class:`DDPMChain` and the SMLD
    loss (Song and Ermon 2019), there with reduction "half_sum" in Song et al.'s code, under a :class:`SMLDChain`.

    Args:
        stratified: see :class:`UniformTime`.
        first: smallest index; a negative one counts from the end, -1 being the chain's last.
        last: largest index, likewise; None for the chain's last.
    """

    def __init__(self, stratified: bool = True, first: int = 0, last: int | None = None) -> None:
        self.stratified, self.first, self.last = stratified, first, last

    def indices(self, steps: int) -> tuple[int, int]:
        """First and last index in a chain of ``steps``.

        Raises:
            ValueError: the chain does not have them, or there are none.
        """
        last = -1 if self.last is None else self.last
        first, last = (index + steps if index < 0 else index for index in (self.first, last))
        if not 0 <= first <= last < steps:
            raise ValueError(
                f"ChainTimes from first={self.first} to last={self.last} does not fit a chain of {steps} steps, whose "
                f"indices are 0 to {steps - 1} (or -{steps} to -1, from the end)"
            )
        return first, last

    def __call__(self, process: GaussianProcess, count: int, draw: Draw) -> Tensor:
        """(count,) float64 times.

        Raises:
            ValueError: the process is no discrete chain, or has not these indices.
        """
        chain = as_chain(process, "ChainTimes")
        first, last = self.indices(chain.steps)
        index = first + (_uniform(count, draw, self.stratified) * (last - first + 1)).long()
        return chain.time(index.clamp_max(last))


class LogNormalRatio(Times):
    """ln(sigma / alpha) normal (Karras et al. 2022, table 1); with the flow process, logit(t) (Esser et al. 2024).

    Noise levels that the process does not have are moved to its nearest, at ``process.t_min`` or 1.

    Args:
        mean: of ln(sigma / alpha); -1.2 in the paper, for data of standard deviation 0.5.
        std: its standard deviation, positive.
        stratified: see :class:`UniformTime`.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = True) -> None:
        if std <= 0:
            raise ValueError(f"std of ln(sigma / alpha) must be positive, got {std}")
        self.mean, self.std, self.stratified = mean, std, stratified

    def __call__(self, process: GaussianProcess, count: int, draw: Draw) -> Tensor:
        """(count,) float64 times."""
        normal = torch.special.ndtri(_uniform(count, draw, self.stratified))
        log_ratio = self.mean + self.std * normal
        return process.t_from_log_snr(-2.0 * log_ratio).clamp(process.t_min, 1.0)


class UniformLogSNR(Times):
    """ln(sigma / alpha) uniform: density of t proportional to g^2 / sigma^2 (Song et al. 2021b, 2101.09258, sec. 5.1).

    With :class:`NoiseWeight` this is likelihood weighting up to a constant, without its infinite variance.

    Args:
        ratio_min: smallest sigma / alpha; None for the process's at ``t_min``.
        ratio_max: largest sigma / alpha; None for the process's at 1, needed where that is infinite.
        stratified: see :class:`UniformTime`.
    """

    def __init__(self, ratio_min: float | None = None, ratio_max: float | None = None, stratified: bool = True) -> None:
        self.ratio_min, self.ratio_max, self.stratified = ratio_min, ratio_max, stratified

    def log_range(self, process: GaussianProcess) -> tuple[float, float]:
        """Smallest and largest ln(sigma / alpha).

        Raises:
            ValueError: if they are not increasing, or not levels of the process.
        """
        # log_snr on the CPU: no accelerator is waited for.
        clean, start, end = (-0.5 * float(process.log_snr(as_time(t))) for t in (0.0, process.t_min, 1.0))
        low = start if self.ratio_min is None else _log(self.ratio_min)
        high = end if self.ratio_max is None else _log(self.ratio_max)
        if not clean - 1e-9 <= low < high <= end + 1e-9 or high == float("inf") or low == float("-inf"):
            raise ValueError(
                "ratio_min and ratio_max must be finite levels sigma / alpha of the process, one below the other, but "
                f"ln(sigma / alpha) was asked for from {low:.4g} to {high:.4g} and "
                f"{type(process).__name__} has {clean:.4g} to {end:.4g}"
            )
        return low, high

    def __call__(self, process: GaussianProcess, count: int, draw: Draw) -> Tensor:
        """(count,) float64 times."""
        low, high = self.log_range(process)
        return process.t_from_log_snr(-2.0 * (low + (high - low) * _uniform(count, draw, self.stratified)))


def _log(ratio: float) -> float:
    return float(torch.log(as_time(ratio)))


class DenoisingObjective:
    """Weighted squared error of a denoiser at random levels.

    Args:
        times: law of t.
        weight: of the squared error at a level.
        reduction: over the dimensions of an example: "mean" (a zero noise network then has loss 1), or "half_sum", half
            the sum, which Song et al. use for VE. Clipping gradients at 1 means something else then.
    """

    def __init__(
        self,
        times: Times = UniformTime(),
        weight: Weight = NoiseWeight(),
        reduction: Literal["mean", "half_sum"] = "mean",
    ) -> None:
        if reduction not in ("mean", "half_sum"):
            raise ValueError(f"reduction must be mean or half_sum, got {reduction!r}")
        self.times, self.weight = times, weight
        self.reduction: Literal["mean", "half_sum"] = reduction

    def __call__(self, denoiser: BaseDenoiser, x0: Tensor, draw: Draw, **conditions: Tensor) -> dict[str, Tensor]:
        """Losses per example.

        Args:
            denoiser: what is trained.
            x0: (B, *) floating clean data.
            draw: source of times and noise.
            conditions: passed on to the network.

        Returns:
            "loss" (B,), float32 or the better type of ``x0``.
        """
        return {"loss": self.at(self.times(denoiser.process, len(x0), draw), denoiser, x0, draw, **conditions)}

    def at(self, times: Tensor, denoiser: BaseDenoiser, x0: Tensor, draw: Draw, **conditions: Tensor) -> Tensor:
        """Losses (B,) at given times (B,): what the curve of the loss over noise levels is made of."""
        return self.reduce(self.answered(times, denoiser, x0, draw, **conditions)[1])

    def answered(
        self, times: Tensor, denoiser: BaseDenoiser, x0: Tensor, draw: Draw, **conditions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Answers (B, *) of the kind ``weight.of`` and weighted squared errors (B, D): for losses with more to say.

        Both at given times (B,).
        """
        process = denoiser.process
        level = process.level(times, x0.device)
        noise = draw.normal(x0.shape, x0.dtype).to(x0.device)
        answer = getattr(denoiser, self.weight.of)(process.perturb(x0, level, noise), level.t, **conditions)
        if isinstance(self.weight, OutputWeight):
            return answer, self.weight.squared(answer - x0, level, denoiser)
        return answer, self.squared(answer, x0, noise, level, process)

    def reduce(self, squared: Tensor) -> Tensor:
        """Losses (B,) of squared errors (B, D)."""
        return squared.mean(1) if self.reduction == "mean" else 0.5 * squared.sum(1)

    def squared(self, answer: Tensor, x0: Tensor, noise: Tensor, level: Level, process: GaussianProcess) -> Tensor:
        """Weighted squared errors (B, D), float32 or better, of an ``answer`` (B, *) of the kind ``weight.of``."""
        if self.weight.of == "noise":
            error = answer - noise
        elif self.weight.of == "x0":
            error = answer - x0
        else:
            d_alpha, d_sigma = process.derivatives(level.t)
            error = answer - match(d_alpha, x0) * x0 - match(d_sigma, x0) * noise
        squared = error.to(torch.promote_types(error.dtype, torch.float32)).square().flatten(1)
        return match(self.weight(level, process), squared) * squared
