"""Distances between the populations of real and generated windows of time series."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_sgm.metrics.base import DoubleMetric
from lightning_sgm.metrics.binned import Grid
from lightning_sgm.metrics.correlations import correlations, pairs
from lightning_sgm.metrics.windows import Units, first_half


class PopulationDistance(DoubleMetric):
    """Mean over some statistics of the distance between their laws among real and among generated windows.

    The distance is the squared maximum mean discrepancy (V-statistic; nine Gaussians with variances 0.01 to 2) of
    PaD-TS's evaluation (Li et al. 2025): 0 is best, 18 the worst. Histograms are kept, so memory does not grow with the
    number of windows, nothing is random and the result equals that of all pairs to 1e-6. NaN among the samples makes it
    NaN. It falls with the number of windows: see the floor. "halves" is the distance between two random disjoint halves
    of the real windows, and a little above that of a perfect sampler, as each has half of them.

    Subclasses say which numbers are the ``statistics`` of windows.

    Args:
        seed: of the halves.

    Attributes:
        inputs: the batch entries passed to ``update``.
        worst: after ``compute``, what the statistic with the largest distance is called.
    """

    higher_is_better = False
    name = "population"
    against_train = True
    inputs: tuple[str, ...] = ("x",)
    grid: Grid
    first: Tensor
    second: Tensor
    generated: Tensor
    real_count: Tensor
    generated_count: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.units = Units()
        self.worst = ""
        self.add_sum("real_count")
        self.add_sum("generated_count")

    @abstractmethod
    def statistics(self, windows: Tensor) -> Tensor:
        """(N, V) numbers of windows (B, L, D); the law of each of V is compared."""

    @abstractmethod
    def names(self) -> list[str]:
        """What the V statistics are called."""

    def prepare(self, data: Any) -> None:
        """Take scaling and names of a DataModule.

        Raises:
            ValueError: the data have too few dimensions.
        """
        self.units.learn(data)
        if self.units.shape is not None:
            self._make_room()

    @torch.no_grad()
    def update(self, x: Tensor, real: bool) -> None:
        """Add windows.

        Args:
            x: (B, L', D) in model space.
            real: whether they are data or samples.

        Raises:
            ValueError: not windows, another size than before, or too few dimensions.
        """
        windows = self.units(x)
        self._make_room()
        self.add("real_count" if real else "generated_count", float(len(windows)))
        if real:
            first = first_half(windows, self.seed)
            self._count("first", windows[first])
            self._count("second", windows[~first])
        else:
            self._count("generated", windows)

    def by_statistic(self) -> Tensor:
        """(V,) float64 distances, one for each of ``names()``.

        Raises:
            ValueError: no window on a side.
        """
        counts = int(self.real_count), int(self.generated_count)
        if min(counts) < 1:
            raise ValueError(f"{self.name} needs real and generated windows, got {counts[0]} and {counts[1]}")
        return self.grid.mmd(self.first + self.second, self.generated)

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars: NAME, the mean; worst, the largest; halves, the mean of real windows' halves (see above).

        Raises:
            ValueError: no window on a side.
        """
        found = self.by_statistic()
        self.worst = self.names()[int(found.nan_to_num(nan=torch.inf).argmax())]
        halves = self.grid.mmd(self.first, self.second).mean()
        return {self.name: found.mean(), "worst": found.max(), "halves": halves}

    def _make_room(self) -> None:
        """Add the histograms, once the number of dimensions is known."""
        shape = (len(self.names()), self.grid.size)
        if "first" not in self._defaults:
            for side in ("first", "second", "generated"):
                self.add_sum(side, *shape)
        elif self.first.shape != shape:
            raise ValueError(f"{self.name} began with {len(self.first)} histograms and now needs {shape[0]}")

    def _count(self, side: str, windows: Tensor) -> None:
        held = getattr(self, side)
        if held.is_inference() and not torch.is_inference_mode_enabled():  # reset by a test, used in fit
            held = held.clone()
            setattr(self, side, held)
        # In place: histograms may be much larger than a batch.
        self.grid.add(held, self.statistics(windows))


class ValueDistance(PopulationDistance):
    """VDS of PaD-TS: how far the values of each dimension, at any time, are from the data's; mean over dimensions.

    In units of the training range, which is [0, 1]. All values are compared, where the reference draws 10000 of them,
    which adds up to 3e-4. A value more than 8 ranges away from the training range counts as one 8 ranges away.
    """

    name = "vds"
    grid = Grid(-8.0, 9.0)

    def statistics(self, windows: Tensor) -> Tensor:
        """The values, (B L, D)."""
        return windows.flatten(0, 1)

    def names(self) -> list[str]:
        """Those of the dimensions."""
        assert self.units.shape is not None
        return [self.units.name(dimension) for dimension in range(self.units.shape[1])]


class CorrelationDistance(PopulationDistance):
    """FDDS of PaD-TS: how far the correlations of each pair of dimensions within windows are from the data's.

    Mean over all pairs; needs two dimensions. ``compute`` adds "unbiased", an estimate (U-statistics) that does not
    grow with fewer windows and is about 0, of either sign, for a perfect sampler.
    """

    name = "fdds"
    grid = Grid(-1.0, 1.0, 2.0 / 2044)

    def statistics(self, windows: Tensor) -> Tensor:
        """The correlations, (B, P)."""
        return correlations(windows)

    def names(self) -> list[str]:
        """Pairs of dimensions, "a/b".

        Raises:
            ValueError: there is one dimension only.
        """
        assert self.units.shape is not None
        dimensions = self.units.shape[1]
        if dimensions < 2:
            raise ValueError(
                "fdds compares correlations between dimensions, and these data have one: leave CorrelationDistance out "
                "of model.metrics"
            )
        row, column = pairs(dimensions)
        return [
            f"{self.units.name(a)}/{self.units.name(b)}" for a, b in zip(row.tolist(), column.tolist(), strict=True)
        ]

    def compute(self) -> dict[str, Tensor]:
        """As above: float64 scalars fdds, worst, halves, unbiased."""
        found = super().compute()
        return found | {"unbiased": self.grid.unbiased(self.first + self.second, self.generated).mean()}


class AutocorrelationDistance(DoubleMetric):
    """How far the mean autocorrelation function of generated windows is from the data's.

    r_k of a window of a dimension is sum_{t < L-k} (x_t - m)(x_{t+k} - m) / sum_t (x_t - m)^2 (Box and Jenkins 1970),
    with the window's own mean m, 0 where it is constant. These are averaged over windows, and the absolute differences
    of the two means over dimensions and lags 1 to L-1 (as ACD, Ang et al. 2023, TSGBench, with its own norm). 0 is
    best, 2 the worst. "halves" is the difference of two random disjoint halves of the real windows.

    Args:
        seed: of the halves.

    Attributes:
        name: "autocorrelation", for tables and logs.
        inputs: the batch entries passed to ``update``.
    """

    higher_is_better = False
    name = "autocorrelation"
    against_train = True
    inputs: tuple[str, ...] = ("x",)
    first_sum: Tensor
    first_count: Tensor
    second_sum: Tensor
    second_count: Tensor
    generated_sum: Tensor
    generated_count: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.units = Units()
        for side in ("first", "second", "generated"):
            self.add_sum(f"{side}_count")

    def prepare(self, data: Any) -> None:
        """Take the scaling of a DataModule."""
        self.units.learn(data)
        if self.units.shape is not None:
            self._make_room(*self.units.shape)

    @torch.no_grad()
    def update(self, x: Tensor, real: bool) -> None:
        """Add windows.

        Args:
            x: (B, L', D) in model space.
            real: whether they are data or samples.

        Raises:
            ValueError: not windows, or another size than before.
        """
        windows = self.units(x)
        self._make_room(windows.shape[1], windows.shape[2])
        found = autocorrelations(windows)
        first = first_half(windows, self.seed)
        for side, rows in (("first", first), ("second", ~first)) if real else (("generated", slice(None)),):
            self.add(f"{side}_sum", found[rows].sum(0))
            self.add(f"{side}_count", float(len(found[rows])))

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars: autocorrelation, and halves (NaN where one is empty).

        Raises:
            ValueError: no window on a side.
        """
        real, generated = self.first_count + self.second_count, self.generated_count
        if min(int(real), int(generated)) < 1:
            raise ValueError(f"{self.name} needs real and generated windows, got {int(real)} and {int(generated)}")
        mean = (self.first_sum + self.second_sum) / real
        halves = self.first_sum / self.first_count - self.second_sum / self.second_count
        distance = mean - self.generated_sum / generated
        return {self.name: distance.abs().mean(), "halves": halves.abs().mean()}

    def _make_room(self, length: int, dimensions: int) -> None:
        if length < 2:
            raise ValueError(f"{self.name} needs windows of at least 2 time steps, got {length}")
        if "first_sum" not in self._defaults:
            for side in ("first", "second", "generated"):
                self.add_sum(f"{side}_sum", length - 1, dimensions)


def autocorrelations(windows: Tensor) -> Tensor:
    """Sample autocorrelations of windows (B, L, D) at lags 1 to L-1, (B, L-1, D); 0 where a window is constant."""
    length = windows.shape[1]
    if not len(windows):  # FFTs refuse that
        return windows[:, 1:]
    centred = windows - windows[:, :1]  # constants become exact zeros
    centred = centred - centred.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * length, dim=1)  # padded by zeros: no lag wraps around
    products = torch.fft.irfft(spectrum.abs().square(), 2 * length, dim=1)[:, :length]
    power = centred.square().sum(1, keepdim=True)
    return products[:, 1:] / torch.where(power > 0, power, 1.0)
