"""Completing windows of series: several samples of each, and how far they are from what was held out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sgm.metrics.base import ExampleMean
from lightning_sgm.random import Draw

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Batch
    from lightning_sgm.methods.pad_ts import PaDTS
    from lightning_sgm.methods.series_tasks import SeriesTask

_MASK = 1  # purpose of random numbers
_OUTSIDE = 0.1  # of the band of 80 %, on either side
_AT_ONCE = 1024  # completions drawn at once
_OF_SAMPLES, _OF_LINES = ("mae", "rmse", "crps", "coverage_80"), ("mae", "rmse")


def completed(module: PaDTS, task: SeriesTask, batch: Batch) -> Batch:
    """Completions of the windows of a batch, ``task.samples`` of each, as a batch for a writer.

    Args:
        module: the model.
        task: what is known of windows without gaps of their own.
        batch: "x" (n, L, D) scaled windows, finite; "index" (n,); perhaps "known" (n, L, D) bool, their own gaps.

    Returns:
        "x" (n S, L, D), the samples of a window one after another; "before", NaN where nothing was known; "truth" where
        the task took it away; "group" (n S,), the window's number; "index" (n S,).

    Raises:
        ValueError: a scaling behind which values cannot be known one by one.
    """
    if module.scaling.extra:
        raise ValueError(
            "windows that are each scaled by themselves cannot be completed: train with data.scaling minmax, standard "
            "or quantile"
        )
    index, x = batch["index"].to(module.device), batch["x"]
    known, truth = batch.get("known"), {}
    if known is None:
        known = task.known(tuple(x.shape), Draw(_MASK, keys=index), module.spec["columns"])
        truth = {"truth": x.repeat_interleave(task.samples, 0)}
    x, known = (part.repeat_interleave(task.samples, 0) for part in (x, known))
    numbers = (index[:, None] * task.samples + torch.arange(task.samples, device=index.device)).flatten()
    parts = [
        task.complete(module.denoiser, module.sampler, part, mask, module.sample_draw(keys))
        for part, mask, keys in zip(*(value.split(_AT_ONCE) for value in (x, known, numbers)), strict=True)
    ]
    before = torch.where(known, x, torch.nan)
    group = index.repeat_interleave(task.samples)
    return {"x": torch.cat(parts), "before": before, **truth, "group": group, "index": numbers}


class CompletionTest:
    """Errors of completions of held-out windows, over the values that were taken away.

    In units of each dimension's range in the training data: "mae" and "rmse" of the median and the mean of the samples,
    "crps", the continuous ranked probability score of the samples (Gneiting and Raftery 2007, eq. 21, with the fair
    estimate of the spread), and "coverage_80", how often the truth lies in the :func:`band` of 80 %. "mae" and "rmse"
    also of straight lines between known values (at an end, the nearest), as "interpolation".

    Args:
        task: what is known.
        device: of the model.
    """

    def __init__(self, task: SeriesTask, device: torch.device | str = "cpu") -> None:
        self.task = task
        # All at once: a process without windows meets the others in compute.
        names = (*(f"completion/{name}" for name in _OF_SAMPLES), *(f"interpolation/{name}" for name in _OF_LINES))
        self._means = {name: ExampleMean().to(device) for name in names}

    def update(self, module: PaDTS, batch: Batch) -> None:
        """Complete the windows of a test batch and compare."""
        found = completed(module, self.task, batch)
        count = self.task.samples
        samples, truth = (module.scaling.unit(found[name]).unflatten(0, (-1, count)) for name in ("x", "truth"))
        truth = truth[:, 0]
        missing = found["before"].unflatten(0, (-1, count))[:, 0].isnan()
        low, high = band(samples, _OUTSIDE)
        values = {
            "completion/mae": (samples.quantile(0.5, 1) - truth).abs(),
            "completion/rmse": (samples.mean(1) - truth).square(),
            "completion/crps": crps(samples, truth),
            "completion/coverage_80": ((low <= truth) & (truth <= high)).double(),
        }
        line = interpolated(truth, ~missing)
        values |= {"interpolation/mae": (line - truth).abs(), "interpolation/rmse": (line - truth).square()}
        for name, value in values.items():
            self._means[name].update(value[missing])

    def compute(self) -> dict[str, Tensor]:
        """Scalars over the windows of all processes."""
        found = {name: mean.compute().float() for name, mean in self._means.items()}
        return {name: value.sqrt() if name.endswith("rmse") else value for name, value in found.items()}


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Mean |X - y| - E|X - X'| / 2 of samples (n, S, *) about truths (n, *), unbiased in S >= 2; |x - y| for S = 1."""
    count = samples.shape[1]
    error = (samples - truth[:, None]).abs().mean(1)
    if count == 1:
        return error
    # Sum over pairs of |x_i - x_j| from the order statistics.
    weights = 2.0 * torch.arange(count, device=samples.device, dtype=samples.dtype) - (count - 1)
    ordered = samples.sort(1).values.movedim(1, -1)
    return error - (ordered * weights).sum(-1) / (count * (count - 1))


def band(samples: Tensor, outside: float) -> tuple[Tensor, Tensor]:
    """Lower and upper end (n, *) of the band that a further sample leaves with probability ``outside`` on either side.

    The usual quantiles of S samples are too near: with S = 20 a further one lies between those of 10 % and 90 % in 72 %
    of all cases. Place p (S + 1) among the ordered samples has no such bias (Weibull's positions; Hyndman and Fan 1996,
    type 6). Fewer than 1 / ``outside`` - 1 samples cannot reach so far; their band is all of them.

    Args:
        samples: (n, S, *).
        outside: below 1/2.
    """
    count = samples.shape[1]
    place = min(max(outside * (count + 1) - 1.0, 0.0), (count - 1) / 2)  # counted from 0
    below, above = math.floor(place), math.ceil(place)
    ordered = samples.sort(1).values
    low = torch.lerp(ordered[:, below], ordered[:, above], place - below)
    return low, torch.lerp(ordered[:, count - 1 - below], ordered[:, count - 1 - above], place - below)


def interpolated(x: Tensor, known: Tensor) -> Tensor:
    """Straight lines in time between known values of windows (n, L, D); the nearest one at an end, 0.5 without any."""
    length = x.shape[1]
    steps = torch.arange(length, device=x.device)[None, :, None].expand(x.shape)
    before = torch.where(known, steps, -1).cummax(1).values
    after = torch.where(known, steps, length).flip(1).cummin(1).values.flip(1)
    left = torch.where(before < 0, after, before)
    right = torch.where(after == length, before, after)
    never = (left < 0) | (left == length)
    left, right = left.clamp(0, length - 1), right.clamp(0, length - 1)
    share = torch.where(right > left, (steps - left).to(x) / (right - left).clamp_min(1), 0.0)
    low, high = x.gather(1, left), x.gather(1, right)
    return torch.where(never, 0.5, low + share * (high - low))
