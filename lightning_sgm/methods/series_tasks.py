"""What a model of series is asked to complete: the future of a window, or its gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.guidance.inverse import Mask, PosteriorMatching
from lightning_sgm.methods.tasks import Way
from lightning_sgm.random import Draw
from lightning_sgm.samplers.known import Replacement
from lightning_sgm.samplers.loop import Sampler

Pattern = Literal["points", "steps", "blocks"]


class SeriesTask:
    """Base of all tasks on windows of series: samples of what is unknown, given what is known.

    Works with scalings that act value by value: "minmax", "standard", "quantile".

    Args:
        samples: completions of each window; their median is the answer, their spread its uncertainty.
        method: "posterior": the denoiser is told what is known (PosteriorMatching), unbiased where p(x_0 | x_t) is
            nearly Gaussian. "replacement": known values are overwritten in every state (Song et al. 2021, app. I);
            cheaper and biased.
        iterations: of "posterior"; each costs as much as an evaluation of the network.

    Attributes:
        horizon: steps behind the end of a file that are to be found; 0 where it is the file's gaps.
    """

    horizon: int = 0

    def __init__(self, samples: int = 20, method: Way = "posterior", iterations: int = 3) -> None:
        if samples < 1 or iterations < 1:
            raise ValueError(f"a task needs samples >= 1 and iterations >= 1, got {samples} and {iterations}")
        if method not in ("posterior", "replacement"):
            raise ValueError(f"method of a task must be posterior or replacement, got {method!r}")
        self.samples, self.iterations = samples, iterations
        self.method: Way = method

    def known(self, shape: tuple[int, ...], draw: Draw, columns: Sequence[str]) -> Tensor:
        """(n, L, D) bool, what is known of held-out windows of ``shape``, for judging and showing completions."""
        raise NotImplementedError

    def complete(self, denoiser: BaseDenoiser, sampler: Sampler, x: Tensor, known: Tensor, draw: Draw) -> Tensor:
        """Windows (n, L, D) that agree with ``x`` where ``known``.

        Args:
            denoiser: of the model.
            sampler: how its time is run backwards.
            x: (n, L, D) scaled windows, finite also where nothing is known.
            known: (n, L, D) bool.
            draw: of the samples.
        """
        operator, y = Mask(known), torch.where(known, x, 0.0)
        if self.method == "posterior":
            guided = PosteriorMatching(denoiser, operator, y, iterations=self.iterations)
            found: Tensor = sampler(guided, tuple(x.shape), draw)
        else:
            around = Replacement(operator, y).around(sampler)
            found = around(denoiser, tuple(x.shape), draw)
            sampler.evaluations = around.evaluations
        return torch.where(known, x, found)


class Forecast(SeriesTask):
    """The last steps of windows whose first steps are known.

    Args:
        horizon: how many steps are to be found; fewer than a window has.
        samples, method, iterations: see :class:`SeriesTask`.
    """

    def __init__(self, horizon: int = 12, samples: int = 20, method: Way = "posterior", iterations: int = 3) -> None:
        super().__init__(samples, method, iterations)
        if horizon < 1:
            raise ValueError(f"horizon of Forecast must be at least 1 step, got {horizon}")
        self.horizon = horizon

    def known(self, shape: tuple[int, ...], draw: Draw, columns: Sequence[str]) -> Tensor:
        """All but the last ``horizon`` steps.

        Raises:
            ValueError: windows have no more steps than that.
        """
        if self.horizon >= shape[1]:
            raise ValueError(
                f"horizon {self.horizon} of Forecast leaves nothing known of windows of {shape[1]} steps: lower it"
            )
        steps = torch.arange(shape[1], device=draw.device) < shape[1] - self.horizon
        return steps[:, None].expand(shape)


class Impute(SeriesTask):
    """Gaps in windows. In ``test`` gaps are made, the same for a window every time; files have their own.

    Args:
        share: of the values that are taken away, in (0, 1).
        pattern: "points": each value by itself; "steps": all dimensions of a step together; "blocks": for each
            dimension one run of neighbouring steps.
        columns: dimensions that have gaps; None for all.
        samples, method, iterations: see :class:`SeriesTask`.
    """

    def __init__(
        self,
        share: float = 0.5,
        pattern: Pattern = "points",
        columns: list[str] | None = None,
        samples: int = 20,
        method: Way = "posterior",
        iterations: int = 3,
    ) -> None:
        super().__init__(samples, method, iterations)
        if not 0 < share < 1:
            raise ValueError(f"share of the values that are missing must lie strictly between 0 and 1, got {share}")
        if pattern not in ("points", "steps", "blocks"):
            raise ValueError(f"pattern of Impute must be points, steps or blocks, got {pattern!r}")
        self.share, self.columns = share, columns
        self.pattern: Pattern = pattern

    def known(self, shape: tuple[int, ...], draw: Draw, columns: Sequence[str]) -> Tensor:
        """What is left by the pattern.

        Raises:
            ValueError: a column that the series do not have.
        """
        count, length, dims = shape
        if wrong := [name for name in self.columns or () if name not in columns]:
            raise ValueError(f"Impute names the column {wrong[0]!r}, but the series have {', '.join(columns)}")
        if self.pattern == "points":
            known = draw.uniform((count, length, dims)) >= self.share
        elif self.pattern == "steps":
            known = (draw.uniform((count, length, 1)) >= self.share).expand(shape)
        else:
            run = min(length, max(1, round(self.share * length)))
            start = (draw.uniform((count, 1, dims)) * (length - run + 1)).long()
            steps = torch.arange(length, device=draw.device)[:, None]
            known = (steps < start) | (steps >= start + run)
        if self.columns is None:
            return known
        gaps = torch.tensor([name in self.columns for name in columns], device=known.device)
        return known | ~gaps
