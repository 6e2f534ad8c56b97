"""Pictures of windows of time series: lines, distributions, correlations, autocorrelations, and completed windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_sgm.io.figures import new_figure
from lightning_sgm.metrics.correlations import correlations, pairs
from lightning_sgm.metrics.series import autocorrelations

Array = NDArray[Any]

# Okabe and Ito's blue and vermilion, which the colour-blind tell apart.
_REAL, _GENERATED = "#0072B2", "#D55E00"
_DIMENSIONS, _LINES, _PAIRS = 9, 24, 15  # most that a picture shows
_WINDOWS, _COMPLETED = 5, 6  # most rows and columns of a picture of completed windows
_BINS = 60
_BAND = 5  # so many completions of a window are shown by their median and middle 80 %, fewer one by one


@dataclass(frozen=True)
class Dimension:
    """One dimension of the series.

    Attributes:
        name: what it is called in pictures.
        low: smallest value of the training data, in original units.
        high: largest value.
        log: whether its axis is logarithmic.
    """

    name: str
    low: float
    high: float
    log: bool = False

    def ends(self, *values: Array, tails: float = 0.0) -> tuple[float, float]:
        """The ends of an axis for ``values``: without a share ``tails`` on both sides, nor what is far out of range.

        A model that explodes is not to make a line of everything else: values are shown as far as half the width of the
        training range beyond it.
        """
        found = np.concatenate([value.ravel() for value in values])
        found = found[np.isfinite(found) & ((found > 0) | (not self.log))]
        low, high = self._to(np.array([self.low, self.high])).tolist()
        # Also a constant has an axis of some length.
        width = high - low or 0.1 * abs(low) or 1.0
        found = self._to(found)
        found = found[(found >= low - 0.5 * width) & (found <= high + 0.5 * width)]
        if len(found):
            low, high = np.quantile(found, [tails, 1.0 - tails]).tolist()
        margin = max(0.04 * (high - low), 1e-3 * width)
        low, high = self._from(np.array([low - margin, high + margin])).tolist()
        return low, high

    def edges(self, ends: tuple[float, float]) -> Array:
        """The edges of the bins between ``ends``, equally wide on the axis."""
        low, high = self._to(np.array(ends)).tolist()
        edges = self._from(np.linspace(low, high, _BINS + 1))
        edges[[0, -1]] = ends  # to the last digit
        return edges

    def _to(self, values: Array) -> Array:
        return np.log(values) if self.log else values

    def _from(self, values: Array) -> Array:
        return np.exp(values) if self.log else values


def windows_figure(dimensions: Sequence[Dimension], generated: Array, real: Array | None = None) -> Any:
    """The first windows as lines, a panel per dimension; with real ones beside them in panels of the same height.

    Args:
        dimensions: D of them, of which at most 9 are shown, spread evenly.
        generated: (N, L, D), original units.
        real: (M, L, D).

    Returns:
        A matplotlib figure.
    """
    chosen, kinds = _spread(len(dimensions), _DIMENSIONS), _kinds(generated, real)
    figure, panels = _grid(len(chosen), across=len(kinds), width=2.3)
    for pair, i in zip(panels, chosen, strict=True):
        shown = [values[:_LINES, :, i] for _, _, values in kinds]
        ends = dimensions[i].ends(*shown)
        for axes, (name, colour, _), lines in zip(pair, kinds, shown, strict=True):
            alpha = 0.9 if len(lines) <= 4 else 0.55
            axes.plot(lines.T, color=colour, linewidth=0.8, alpha=alpha, marker="." if lines.shape[1] == 1 else None)
            axes.set_title(f"{dimensions[i].name}, {name}" if len(kinds) > 1 else dimensions[i].name, fontsize=9)
            _scale(axes, dimensions[i], ends, "y")
    _finish(figure, "windows", "step", len(chosen), len(dimensions), "dimensions")
    return figure


def values_figure(dimensions: Sequence[Dimension], generated: Array, real: Array | None = None) -> Any:
    """Per dimension the shares of all values in bins of equal width; the panels say what lies outside of them.

    The bins span all but 0.4 % of the real values, or of the generated ones where there are none. Args and result are
    those of :func:`windows_figure`.
    """
    chosen, kinds = _spread(len(dimensions), _DIMENSIONS), _kinds(generated, real)
    figure, panels = _grid(len(chosen), width=3.0)
    for (axes,), i in zip(panels, chosen, strict=True):
        ends = dimensions[i].ends(kinds[0][2][..., i], tails=0.002)
        edges = dimensions[i].edges(ends)
        outside = []
        for name, colour, values in kinds:
            shares = np.histogram(values[..., i], edges)[0] / max(1, values[..., i].size)
            _stairs(axes, shares, edges, name, colour)
            outside += [f"{name} {1 - shares.sum():.1%}"] if shares.sum() < 0.99 else []
        title = dimensions[i].name + (f"\noutside: {', '.join(outside)}" if outside else "")
        axes.set_title(title, fontsize=9)
        axes.set(ylim=(0.0, None))
        _scale(axes, dimensions[i], ends, "x")
    _finish(figure, "values: share of each bin", "value", len(chosen), len(dimensions), "dimensions")
    return figure


def correlations_figure(dimensions: Sequence[Dimension], generated: Array, real: Array | None = None) -> Any:
    """Distributions of the correlations within windows of the pairs in which generated and real ones differ most.

    Those are the at most 15 pairs with the largest area between their cumulative distributions (the 1-Wasserstein
    distance), or the first without real windows. Args and result are those of :func:`windows_figure`.
    """
    kinds = _kinds(generated, real)
    left, right = (index.numpy() for index in pairs(len(dimensions)))
    edges = np.linspace(-1.0, 1.0, _BINS + 1)
    shares = [_shares(values) for _, _, values in kinds]
    distances = np.abs((shares[0] - shares[-1]).cumsum(axis=1)).sum(axis=1) * (edges[1] - edges[0])
    chosen = np.argsort(-distances, kind="stable")[:_PAIRS]
    figure, panels = _grid(len(chosen), width=2.4, columns=5)
    for (axes,), pair in zip(panels, chosen.tolist(), strict=True):
        for (name, colour, _), share in zip(kinds, shares, strict=True):
            _stairs(axes, share[pair], edges, name, colour)
        title = f"{dimensions[left[pair]].name} – {dimensions[right[pair]].name}"
        axes.set_title(title + (f"\ndistance {distances[pair]:.3f}" if len(kinds) > 1 else ""), fontsize=8)
        axes.set(xlim=(-1.0, 1.0), ylim=(0.0, None))
    title = "correlations within windows" + ("" if len(left) else ": one dimension has none")
    what = "pairs, the furthest" if len(kinds) > 1 else "pairs"
    _finish(figure, title, "Pearson correlation", len(chosen), len(left), what)
    return figure


def autocorrelation_figure(dimensions: Sequence[Dimension], generated: Array, real: Array | None = None) -> Any:
    """Per dimension the autocorrelation within windows at each lag from 1, their mean and middle 80 %.

    Args and result are those of :func:`windows_figure`.
    """
    chosen, kinds = _spread(len(dimensions), _DIMENSIONS), _kinds(generated, real)
    figure, panels = _grid(len(chosen), width=3.0)
    lags = np.arange(1, generated.shape[1])
    for (axes,), i in zip(panels, chosen, strict=True):
        for name, colour, values in kinds:
            finite = _finite(values[..., [i]])
            if not len(finite):
                continue
            found = autocorrelations(finite)[..., 0].numpy()
            low, high = np.nanquantile(found, [0.1, 0.9], axis=0)  # NaN: values whose squares are infinite
            axes.fill_between(lags, low, high, color=colour, alpha=0.18, linewidth=0)
            width = 2.4 if name == "real" else 1.1
            axes.plot(lags, np.nanmean(found, axis=0), color=colour, linewidth=width, label=name)
        axes.axhline(0.0, color="0.6", linewidth=0.6)
        axes.set_title(dimensions[i].name, fontsize=9)
        axes.set(xlim=(0, max(1, generated.shape[1] - 1)), ylim=(-1.02, 1.05))
    title = "autocorrelation: mean and middle 80 % of windows"
    _finish(figure, title, "lag", len(chosen), len(dimensions), "dimensions")
    return figure


def completions_figure(
    dimensions: Sequence[Dimension], windows: Sequence[Array], known: Array, truths: Array | None, names: Sequence[str]
) -> Any:
    """Windows of which a part was known, a row each, and their completions.

    What was known is dotted and black, completions are in colour: the median and the middle 80 % of five or more,
    otherwise each. The truth is dashed.

    Args:
        dimensions: D of them, of which at most 6 are shown, spread evenly over those with something to complete.
        windows: W arrays (S, L, D) of S completions of a window, with what was known in them; the first 5 are shown.
        known: (W, L, D), whether a value was known.
        truths: (W, L, D), or None.
        names: W titles of the rows.

    Returns:
        A matplotlib figure.
    """
    rows = min(len(windows), _WINDOWS)
    open_ones = np.flatnonzero(~known[:rows].all(axis=(0, 1)))
    if not len(open_ones):
        open_ones = np.arange(len(dimensions))
    chosen = open_ones[_spread(len(open_ones), _COMPLETED)].tolist()
    figure, axes_of = _empty(max(3.6, 2.4 * len(chosen)), 1.5 * rows + 0.8, rows, len(chosen))
    for row in range(rows):
        for axes, i in zip(axes_of[row], chosen, strict=True):
            truth = None if truths is None else truths[row, :, i]
            _completed(axes, windows[row][:, :, i], known[row, :, i], truth)
            ends = dimensions[i].ends(windows[row][:, :, i], *([] if truth is None else [truth]))
            _scale(axes, dimensions[i], ends, "y")
            axes.set_title(dimensions[i].name if row == 0 else "", fontsize=9)
        axes_of[row, 0].set_ylabel(names[row], fontsize=8)
    _finish(figure, "completed windows", "step", len(chosen), len(open_ones), "dimensions")
    return figure


def _completed(axes: Any, samples: Array, known: Array, truth: Array | None) -> None:
    """One dimension of the completions (S, L) of a window; those that are not finite are left out."""
    steps, gap = np.arange(len(known)), ~known
    # Lines reach to the known neighbours of a gap.
    near = gap | np.append(gap[1:], False) | np.append(False, gap[:-1])
    whole = samples[np.isfinite(samples).all(axis=1)]
    if len(whole) >= _BAND:
        low, middle, high = np.quantile(whole, [0.1, 0.5, 0.9], axis=0)
        axes.fill_between(steps, low, high, where=near, color=_GENERATED, alpha=0.25, linewidth=0, label="middle 80 %")
        axes.plot(steps, np.where(near, middle, np.nan), color=_GENERATED, linewidth=1.3, label="median")
    elif len(whole):
        lines = np.where(near, whole, np.nan)
        axes.plot(steps, lines.T, color=_GENERATED, linewidth=1.0, label=["completed", *["_"] * (len(lines) - 1)])
    if truth is not None:
        axes.plot(steps, np.where(near, truth, np.nan), "--", color=_REAL, linewidth=1.0, label="truth")
    given = np.where(known, samples[0], np.nan)
    axes.plot(steps, given, ".-", color="0.15", linewidth=0.9, markersize=3.0, label="known")


def _shares(values: Array) -> Array:
    """(N, L, D) -> (P, bins): for each pair the share of finite windows whose correlation is in each bin of [-1, 1]."""
    found = correlations(_finite(values)).numpy()
    bins = np.clip((found + 1.0) * (0.5 * _BINS), 0, _BINS - 1).astype(np.int64)
    count, width = found.shape
    flat = (bins + _BINS * np.arange(width)).ravel()
    return np.bincount(flat, minlength=width * _BINS).reshape(width, _BINS) / max(1, count)


def _finite(values: Array) -> torch.Tensor:
    """The windows (N, L, D) without a value that is not finite."""
    return torch.from_numpy(values[np.isfinite(values).all(axis=(1, 2))])


def _kinds(generated: Array, real: Array | None) -> list[tuple[str, str, Array]]:
    """(name, colour, windows) of what a picture compares."""
    first = [] if real is None else [("real", _REAL, real)]
    return [*first, ("generated", _GENERATED, generated)]


def _spread(count: int, most: int) -> Array:
    """At most so many of ``count`` numbers, evenly."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def _empty(width: float, height: float, rows: int, columns: int) -> tuple[Any, Array]:
    """A figure of (rows, columns) axes."""
    figure, axes = new_figure(width, height)
    axes.remove()
    return figure, figure.subplots(rows, columns, squeeze=False)


def _grid(count: int, *, width: float, across: int = 1, columns: int = 3) -> tuple[Any, list[list[Any]]]:
    """A figure, and its ``count`` groups of ``across`` axes beside each other."""
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    figure, axes = _empty(max(4.2, width * across * columns), 1.75 * rows + 0.9, rows, across * columns)
    groups = axes.reshape(rows * columns, across).tolist()
    for group in groups[count:]:
        for one in group:
            one.set_axis_off()
    return figure, groups[:count]


def _stairs(axes: Any, shares: Array, edges: Array, name: str, colour: str) -> None:
    """A histogram: real ones filled, generated ones as a line."""
    axes.stairs(shares, edges, fill=name == "real", color=colour, alpha=0.35 if name == "real" else 1.0, label=name)


def _scale(axes: Any, dimension: Dimension, ends: tuple[float, float], side: str) -> None:
    getattr(axes, f"set_{side}lim")(*ends)  # before the scale, which would look for ends itself
    if dimension.log:
        getattr(axes, f"set_{side}scale")("log")


def _finish(figure: Any, title: str, below: str, shown: int, of: int, what: str) -> None:
    """Title, one legend for all axes, what is ``below`` them, and their look."""
    for axes in figure.axes:
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.25, linewidth=0.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_offset_text().set_fontsize(7)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel(below, fontsize=7)
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in found}
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), fontsize=8)
    figure.suptitle(title + (f" ({shown} of {of} {what})" if shown < of else ""), fontsize=10)
