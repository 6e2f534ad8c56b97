"""Grids: the decreasing noise levels a sampler visits.

They are made once per run, on the CPU in float64, so that no step waits for a device. All of them stay at t > 0 where
the process does: a last step to no noise at all is the sampler's (``finish="clean"``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sgm.processes.chains import as_chain
from lightning_sgm.processes.gaussian import GaussianProcess
from lightning_sgm.samplers.evaluation import Processes, first, level_at


class Grid:
    """Base of all grids; a subclass gives :meth:`times`."""

    def __call__(self, process: Processes, steps: int) -> list[Any]:
        """``steps`` + 1 levels, noisiest first: each a Level, or for a dict of processes a dict of them at one time.

        Components share the times made for the first of them.
        """
        return [level_at(process, t) for t in self.times(first(process), steps)]

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """Decreasing times of shape (steps + 1,), float64."""
        raise NotImplementedError


class UniformTime(Grid):
    """Equal steps of t from 1 to ``t_min``: the grid of the SDE samplers, and Karras et al.'s own for the EDM process.

    Args:
        t_min: last time, in [0, 1); None for the process's own. Song et al. sample VP and sub-VP to 1e-3, VE to 1e-5.
    """

    def __init__(self, t_min: float | None = None) -> None:
        if t_min is not None and not 0 <= t_min < 1:
            raise ValueError(f"t_min of a grid must lie in [0, 1), got {t_min}")
        self.t_min = t_min

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """linspace(1, t_min)."""
        return torch.linspace(1.0, process.t_min if self.t_min is None else self.t_min, steps + 1, dtype=torch.float64)


_MOST, _ENOUGH = 1e4, 80.0


def _check_ratios(ratio_min: float, ratio_max: float | None) -> None:
    if not 0 < ratio_min < (math.inf if ratio_max is None else ratio_max):
        raise ValueError(f"a grid needs 0 < ratio_min < ratio_max, got {ratio_min} and {ratio_max}")


def _reachable(process: GaussianProcess, ratio_min: float, ratio_max: float | None) -> tuple[float, float]:
    """The part of [ratio_min, ratio_max] that ``process`` covers."""
    low, own = (float(process.level(t).ratio) for t in (process.t_min, 1.0))
    low = max(ratio_min, low)
    if ratio_max is None:
        # Starting lower would leave out the largest features of large images: their values add up.
        ratio_max = own if own <= _MOST else _ENOUGH
    high = min(ratio_max, own)
    if not low < high:
        raise ValueError(
            f"no level of {type(process).__name__} lies between the grid's sigma / alpha of {ratio_min} and "
            f"{ratio_max}: change ratio_min and ratio_max"
        )
    return low, high


def _shares(steps: int) -> Tensor:
    return torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)


class LogUniform(Grid):
    """Equal steps of ln(sigma / alpha), the natural grid of multistep solvers (Lu et al. 2022, 2206.00927).

    Args:
        ratio_min: smallest sigma / alpha; the process's own at t_min where that is larger.
        ratio_max: largest sigma / alpha; the process's own at t = 1 where that is smaller. None: that, or 80 where it
            is above 10^4 (flow, cosine: infinite).
    """

    def __init__(self, ratio_min: float = 0.002, ratio_max: float | None = None) -> None:
        _check_ratios(ratio_min, ratio_max)
        self.ratio_min, self.ratio_max = ratio_min, ratio_max

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """Times of high (low / high)^share."""
        low, high = _reachable(process, self.ratio_min, self.ratio_max)
        return process.t_from_ratio(high * (low / high) ** _shares(steps)).clamp(process.t_min, 1.0)


class Karras(Grid):
    """Equal steps of (sigma / alpha)^(1 / rho) (Karras et al. 2022, 2206.00364, eq. 5).

    Args:
        rho: how much the steps shorten towards the data; 7 in the paper.
        ratio_min: smallest sigma / alpha; the process's own at t_min where that is larger.
        ratio_max: largest sigma / alpha; the process's own at t = 1 where that is smaller. None: that, or 80 where it
            is above 10^4 (flow, cosine: infinite).
    """

    def __init__(self, rho: float = 7.0, ratio_min: float = 0.002, ratio_max: float | None = None) -> None:
        _check_ratios(ratio_min, ratio_max)
        if rho <= 0:
            raise ValueError(f"rho of the Karras grid must be positive, got {rho}")
        self.rho, self.ratio_min, self.ratio_max = rho, ratio_min, ratio_max

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """Times of (high^(1 / rho) + share (low^(1 / rho) - high^(1 / rho)))^rho."""
        low, high = (ratio ** (1.0 / self.rho) for ratio in _reachable(process, self.ratio_min, self.ratio_max))
        return process.t_from_ratio((high + _shares(steps) * (low - high)) ** self.rho).clamp(process.t_min, 1.0)


class ChainGrid(Grid):
    """The levels of a discrete chain's own indices, from its last to index 0: the ancestral samplers' grid.

    A sampler of N steps with finish "clean" visits all N indices and then removes the noise of index 0; one with fewer
    steps takes as many indices, spread evenly.
    """

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """Times of ``steps`` + 1 indices.

        Raises:
            ValueError: the process is no discrete chain, or has not so many indices.
        """
        chain = as_chain(process, "ChainGrid")
        if steps >= chain.steps:
            raise ValueError(
                f"ChainGrid cannot visit {steps + 1} levels of a chain of {chain.steps}: a sampler with finish "
                f"clean has at most {chain.steps} steps, one with finish mean or state one fewer"
            )
        last = chain.steps - 1
        # Integer arithmetic, rounded to the nearest index.
        return torch.stack([chain.time(last - (2 * k * last + steps) // max(1, 2 * steps)) for k in range(steps + 1)])


class StridedChain(Grid):
    """Every i-th index of a discrete chain of T, from 0: "ddimN" of improved-diffusion, as PaD-TS samples.

    i is the smallest stride with N indices 0, i, 2 i, ... below T, so the run starts before the chain's last index
    unless N is T. Where N divides T it is diffusers' "leading" spacing.
    """

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """Times of ``steps`` + 1 indices, for as many steps of a sampler with finish "clean".

        Raises:
            ValueError: the process is no discrete chain, or has no such stride.
        """
        chain = as_chain(process, "StridedChain")
        count = steps + 1
        stride = -(-chain.steps // count)
        if (fewer := len(range(0, chain.steps, stride))) != count:
            more = "" if stride == 1 else f" or {len(range(0, chain.steps, stride - 1))}"
            raise ValueError(
                f"StridedChain: no stride visits {count} levels of a chain of {chain.steps}; take {fewer}{more}"
            )
        return chain.time(torch.arange(count).flip(0) * stride)
