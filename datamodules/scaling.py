"""Scalings of series: from the units of a file to the numbers a model is trained on, and back, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

ScalingKind = Literal["minmax", "standard", "quantile", "window"]
KINDS: tuple[ScalingKind, ...] = get_args(ScalingKind)
Array = NDArray[Any]
Values = Array | Tensor | Sequence[Array] | Sequence[Tensor]

_CHUNK = 1 << 22  # numbers whose statistics are taken at once
_KNOTS = 256  # at most, of each dimension of "quantile"
_SORTED = 1 << 20  # at most, values of a dimension that are sorted for its knots; of more, every so many
_WINDOWS = 1 << 18  # at most, whose levels and deviations are taken
_FLOOR = 1e-3  # of a window's standard deviation, as a share of the dimension's
_LARGEST = 1e100  # values beyond it would overflow in squares
_EXPONENT = 700.0  # exp of more is infinite
_LISTS: dict[str, tuple[str, ...]] = {
    "minmax": (),
    "standard": ("mean", "std"),
    "quantile": ("knots", "normal"),
    "window": ("floor", "level_mean", "level_std", "spread_mean", "spread_std"),
}


class Scaling:
    """Takes windows from their original units to model space and back, dimension by dimension.

    Kinds, of values v after the logarithm of those dimensions that ask for it:

    - "minmax": 2 (v - low) / (high - low) - 1, in [-1, 1] over the values it was fitted to.
    - "standard": (v - mean) / std.
    - "quantile": through the empirical distribution to a standard normal; linear between at most 256 knots and beyond.
    - "window": each window by its own mean m and s = sqrt(variance + floor^2), floor being 0.001 of the dimension's
      standard deviation; two more rows behind the L of the window hold m and log s, both standardised over the training
      windows. On the way back the shape is standardised again, so that level and spread are said by those rows alone.

    A constant dimension becomes 0 and comes back as its constant. All is computed in float64 and differentiable.

    Attributes:
        spec: the numbers as plain lists and strings, kept in checkpoints: kind, log (D booleans), low and high (the
            smallest and largest value of each dimension in original units), and those of the kind.
        kind: see above.
        dims: number of dimensions D.
        extra: rows a window has in model space beyond its L: 2 for "window", else 0.

    Args:
        spec: as the attribute.

    Raises:
        ValueError: no such kind, numbers missing, or not as many as there are dimensions.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        kind = spec.get("kind")
        if kind not in KINDS:
            raise ValueError(f"there is no scaling {kind!r}: choose one of {', '.join(KINDS)}")
        needed = ("log", "low", "high", *_LISTS[kind])
        missing = [name for name in needed if name not in spec]
        if missing:
            raise ValueError(f"the {kind} scaling lacks {', '.join(missing)}: give them, or fit it to data again")
        self.spec = {"kind": kind, **{name: list(spec[name]) for name in needed}}
        self.kind: ScalingKind = kind
        self.dims = len(self.spec["low"])
        uneven = [f"{len(self.spec[name])} of {name}" for name in needed if len(self.spec[name]) != self.dims]
        if uneven or not self.dims:
            raise ValueError(f"a scaling needs one number per dimension: {self.dims} of low, but {', '.join(uneven)}")
        self.extra = 2 if kind == "window" else 0
        self._kept: dict[tuple[str, torch.device], Tensor] = {}  # copies: a step must not wait for a device
        self._log = torch.tensor(self.spec["log"], dtype=torch.bool)
        low, high = (torch.tensor(self.spec[end], dtype=torch.float64) for end in ("low", "high"))
        self._low, self._constant = low, _constant(low, high)
        self._range = torch.where(self._constant, 1.0, high - low)
        if kind == "quantile":
            self._knots, self._normal = _padded(self.spec["knots"]), _padded(self.spec["normal"])

    @classmethod
    def fit(
        cls,
        values: Values,
        kind: ScalingKind,
        log: bool | Sequence[bool] = False,
        columns: Sequence[str] | None = None,
        length: int | None = None,
    ) -> Scaling:
        """A scaling by the statistics of training values.

        Args:
            values: an array of rows (n, D) or of windows (n, L, D) in original units, or a list of such arrays; views
                of files too, as they are read in pieces and never as a whole. "window" needs three dimensions.
            kind: see the class.
            log: whether the natural logarithm is taken first, of all dimensions or of each.
            columns: names of the D dimensions, for messages.
            length: rows L of a window, where the values are longer runs (n, T, D) and "window" is to take its
                statistics over all windows within them (over 2^18 evenly spaced ones, if there are more).

        Raises:
            ValueError: no such kind, no values, values that are not finite or too large, values of a dimension with
                ``log`` that are not positive, rows given to "window".
        """
        if kind not in KINDS:
            raise ValueError(f"there is no scaling {kind!r}: choose one of {', '.join(KINDS)}")
        pieces: list[Any] = [values] if isinstance(values, np.ndarray | Tensor) else list(values)
        arrays: list[Array] = [np.asarray(piece) for piece in pieces if len(piece)]
        if not arrays:
            raise ValueError("there are no values to fit a scaling to")
        if kind == "window" and any(piece.ndim != 3 for piece in arrays):
            raise ValueError("the window scaling is fitted to windows (n, L, D)")
        dims = arrays[0].shape[-1]
        logs = [log] * dims if isinstance(log, bool) else [bool(flag) for flag in log]
        names = list(columns) if columns is not None else [str(i) for i in range(dims)]
        low, high = _extremes(arrays, logs, names)
        spec: dict[str, Any] = {"kind": kind, "log": logs, "low": low.tolist(), "high": high.tolist()}
        constant = _constant(torch.from_numpy(low), torch.from_numpy(high)).numpy()
        if kind == "window":
            return cls({**spec, **_windows(arrays, np.array(logs), constant, length)})
        statistics = {"minmax": _no_statistics, "standard": _moments, "quantile": _quantiles}
        return cls({**spec, **statistics[kind](arrays, np.array(logs), constant)})

    def scale(self, values: Tensor) -> Tensor:
        """Windows (B, L, D) in original units to model space (B, L + extra, D), float64.

        Raises:
            ValueError: another number of dimensions; a dimension with ``log`` has values that are not positive.
        """
        values = self._checked(values)
        log, constant = self._on("_log", values.device), self._on("_constant", values.device)
        if bool(((values <= 0) & log).any()):
            bad = ((values <= 0) & log).reshape(-1, self.dims).any(0).nonzero()[0].item()
            raise ValueError(
                f"dimension {bad} (counted from 0) has values that are not positive, but its logarithm is taken: mend "
                "these values, or train with data.log false"
            )
        logged = torch.where(log, torch.where(log, values, 1.0).log(), values)
        return torch.where(constant, 0.0, getattr(self, f"_scale_{self.kind}")(logged))

    def unscale(self, x: Tensor) -> Tensor:
        """Model space (B, L + extra, D) to windows (B, L, D) in original units, float64; the inverse of ``scale``.

        Raises:
            ValueError: another number of dimensions.
        """
        x = self._checked(x)
        log, constant, low = (self._on(name, x.device) for name in ("_log", "_constant", "_low"))
        values = getattr(self, f"_unscale_{self.kind}")(x)
        # Both branches stay finite, or the gradient of the one not chosen would be NaN.
        grown = torch.where(log, values, 0.0).clamp(-_EXPONENT, _EXPONENT).exp()
        return torch.where(constant, low, torch.where(log, grown, values))

    def unit(self, x: Tensor) -> Tensor:
        """Model space (B, L + extra, D) to (B, L, D) float64: original units with low at 0 and high at 1, not clamped.

        A constant dimension is 0. This is the space distances between distributions are measured in.
        """
        return (self.unscale(x) - self._on("_low", x.device)) / self._on("_range", x.device)

    def _checked(self, values: Tensor) -> Tensor:
        """The values in float64."""
        if values.shape[-1:] != (self.dims,):
            raise ValueError(f"the scaling has {self.dims} dimensions, but the values are of {tuple(values.shape)}")
        return values.double()

    def _on(self, name: str, device: torch.device) -> Tensor:
        """An attribute, or a list of the spec as (D,) float64, on a device."""
        if (name, device) not in self._kept:
            found = getattr(self, name) if name.startswith("_") else torch.tensor(self.spec[name], dtype=torch.float64)
            self._kept[name, device] = found.to(device)
        return self._kept[name, device]

    def _ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Middle and half of the range of each dimension, after the logarithm; a constant has half 1."""
        low, high = self._on("low", device), self._on("high", device)
        log, constant = self._on("_log", device), self._on("_constant", device)
        low, high = (torch.where(log, torch.where(log, end, 1.0).log(), end) for end in (low, high))
        return (low + high) / 2, torch.where(constant, 1.0, (high - low) / 2)

    def _scale_minmax(self, values: Tensor) -> Tensor:
        middle, half = self._ends(values.device)
        return (values - middle) / half

    def _unscale_minmax(self, x: Tensor) -> Tensor:
        middle, half = self._ends(x.device)
        return middle + half * x

    def _scale_standard(self, values: Tensor) -> Tensor:
        return (values - self._on("mean", values.device)) / self._on("std", values.device)

    def _unscale_standard(self, x: Tensor) -> Tensor:
        return self._on("mean", x.device) + self._on("std", x.device) * x

    def _scale_quantile(self, values: Tensor) -> Tensor:
        return _interpolate(values, self._on("_knots", values.device), self._on("_normal", values.device))

    def _unscale_quantile(self, x: Tensor) -> Tensor:
        return _interpolate(x, self._on("_normal", x.device), self._on("_knots", x.device))

    def _scale_window(self, values: Tensor) -> Tensor:
        floor, level_mean, level_std, spread_mean, spread_std = self._window_numbers(values.device)
        level = values.mean(-2, keepdim=True)
        spread = (values.var(-2, correction=0, keepdim=True) + floor**2).sqrt()
        rows = (level - level_mean) / level_std, (spread.log() - spread_mean) / spread_std
        return torch.cat([(values - level) / spread, *rows], dim=-2)

    def _unscale_window(self, x: Tensor) -> Tensor:
        floor, level_mean, level_std, spread_mean, spread_std = self._window_numbers(x.device)
        shape, level, spread = x[..., :-2, :], x[..., -2:-1, :], x[..., -1:, :]
        shape = shape - shape.mean(-2, keepdim=True)
        # A window whose deviation is under 0.001 of the floor is left at its size: there shape * floor = v - m already.
        size = shape.square().mean(-2, keepdim=True).clamp(min=1e-6).sqrt()
        squared = (2 * (spread_mean + spread_std * spread).clamp(max=_EXPONENT / 4)).exp()
        deviation = torch.maximum(squared - floor**2, 1e-6 * floor**2).sqrt()
        return level_mean + level_std * level + shape / size * deviation

    def _window_numbers(self, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(self._on(name, device) for name in _LISTS["window"])


def difference(one: Mapping[str, Any], other: Mapping[str, Any], columns: Sequence[str]) -> str:
    """In what two specifications of scalings differ beyond rounding, in words; "" where they do not.

    Args:
        one: of the model.
        other: of the data.
        columns: names of the dimensions of the data.
    """
    if one == other:
        return ""
    if len(one["low"]) != len(other["low"]):
        return f"{len(one['low'])} dimensions in the model, {len(other['low'])} in the data"
    for name in ("kind", "log"):
        if one[name] != other[name]:
            return f"{name} {one[name]} in the model, {other[name]} in the data"
    ends = [
        f"column {column!r} from {one['low'][i]:g} to {one['high'][i]:g} in the model, from {other['low'][i]:g} to "
        f"{other['high'][i]:g} in the data"
        for i, column in enumerate(columns)
        if not all(_close(one[end][i], other[end][i]) for end in ("low", "high"))
    ]
    if ends:
        return ends[0]
    same = all(
        _close(mine, its) for name in _LISTS[one["kind"]] for mine, its in zip(one[name], other[name], strict=True)
    )
    return "" if same else f"the statistics of the scaling {one['kind']} differ"


def _close(one: float | Sequence[float], other: float | Sequence[float]) -> bool:
    """Whether numbers, or lists of them, are the same but for the order in which sums were taken."""
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=1e-12 * float(np.abs(a).max(initial=0.0))))


def _constant(low: Tensor, high: Tensor) -> Tensor:
    """Which dimensions (D,) do not vary beyond rounding."""
    return high - low <= (1e-12 * torch.maximum(low.abs(), high.abs())).clamp(min=1e-100)


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Increasing lists of any lengths as (D, K) float64, filled up with infinity; a single number gets a second."""
    whole = np.full((len(rows), max(2, *(len(row) for row in rows))), np.inf)
    for place, row in zip(whole, rows, strict=True):
        place[: max(2, len(row))] = row if len(row) > 1 else [row[0], row[0] + max(1.0, abs(row[0]))]
    return torch.from_numpy(whole)


def _interpolate(values: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The lines through (start, end) (D, K) and on beyond both ends, dimension by dimension at values (..., D)."""
    flat = values.reshape(-1, values.shape[-1]).T.contiguous()
    last = start.isfinite().sum(1, keepdim=True) - 2
    left = torch.minimum((torch.searchsorted(start, flat.detach(), right=True) - 1).clamp(min=0), last)
    x0, x1, y0, y1 = (knots.gather(1, place) for knots in (start, end) for place in (left, left + 1))
    return (y0 + (flat - x0) * ((y1 - y0) / (x1 - x0))).T.reshape(values.shape)


def _chunks(pieces: Iterable[Array], logs: Array | None = None) -> Iterator[Array]:
    """The pieces (n, *, D) in float64 and of bounded size, with the logarithm of the dimensions of ``logs`` (D,)."""
    for piece in pieces:
        step = max(1, _CHUNK // max(1, int(np.prod(piece.shape[1:]))))
        for first in range(0, len(piece), step):
            chunk = np.array(piece[first : first + step], dtype=np.float64)
            if logs is not None and logs.any():
                chunk[..., logs] = np.log(chunk[..., logs])
            yield chunk


def _extremes(pieces: list[Array], logs: list[bool], names: list[str]) -> tuple[Array, Array]:
    """Smallest and largest value (D,) of each dimension; checks all values."""
    if len(logs) != len(names):
        raise ValueError(f"log has {len(logs)} entries for {len(names)} dimensions: give one each, or true or false")
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for chunk in _chunks(pieces):
        flat = chunk.reshape(-1, len(names))
        wrong = np.flatnonzero(~(np.abs(flat) <= _LARGEST).all(0))
        if len(wrong):
            raise ValueError(f"column {names[wrong[0]]!r} holds values that are not finite or beyond {_LARGEST:g}")
        low, high = np.minimum(low, flat.min(0)), np.maximum(high, flat.max(0))
    wrong = np.flatnonzero(np.array(logs) & (low <= 0))
    if len(wrong):
        raise ValueError(
            f"the logarithm of column {names[wrong[0]]!r} is asked for, but its smallest value is {low[wrong[0]]:g}: "
            "leave the column out of log, or shift it to positive values"
        )
    return low, high


def _no_statistics(pieces: list[Array], logs: Array, constant: Array) -> dict[str, Any]:
    return {}


def _moments(pieces: list[Array], logs: Array, constant: Array) -> dict[str, Any]:
    """Mean and standard deviation of each dimension, in two passes."""
    dims = len(logs)
    total = sum(piece.size // dims for piece in pieces)
    mean = sum(chunk.reshape(-1, dims).sum(0) for chunk in _chunks(pieces, logs)) / total
    square = sum(((chunk.reshape(-1, dims) - mean) ** 2).sum(0) for chunk in _chunks(pieces, logs)) / total
    return {"mean": mean.tolist(), "std": np.where(constant, 1.0, np.sqrt(square)).tolist()}


def _quantiles(pieces: list[Array], logs: Array, constant: Array) -> dict[str, Any]:
    """Knots of each dimension: values, and the normal quantiles of their middle ranks (v <= as often as v >=)."""
    dims = len(logs)
    total = sum(piece.size // dims for piece in pieces)
    step = -(-total // _SORTED)
    rows = np.concatenate([chunk.reshape(-1, dims)[::step] for chunk in _chunks(pieces, logs)])
    knots, normals = [], []
    for column in rows.T:
        values, counts = np.unique(column, return_counts=True)
        ranks = torch.from_numpy((np.cumsum(counts) - 0.5 * counts) / len(column))
        normal = torch.special.ndtri(ranks).numpy()
        # Evenly spaced on the normal's side, where the error of lines between knots is then the same everywhere.
        wanted = np.linspace(normal[0], normal[-1], _KNOTS)
        chosen = np.unique(np.clip(np.searchsorted(normal, wanted), 0, len(values) - 1))
        # Values that differ by rounding only would make lines that are too steep to come back by.
        steps = np.diff(values[chosen], prepend=-np.inf)
        chosen = chosen[steps > np.maximum(1e-15 * np.abs(values[chosen]), 1e-103)]
        knots.append(values[chosen].tolist())
        normals.append(normal[chosen].tolist())
    return {"knots": knots, "normal": normals}


def _windows(pieces: list[Array], logs: Array, constant: Array, length: int | None) -> dict[str, Any]:
    """Floor of the deviations of windows, and the moments over windows of their levels and log deviations."""
    floor = np.where(constant, 1.0, _FLOOR * np.array(_moments(pieces, logs, constant)["std"]))
    windows = [window for piece in pieces for window in _within(piece, length)]
    step = -(-sum(map(len, windows)) // _WINDOWS)
    levels, spreads = [], []
    for chunk in _chunks((window[::step] for window in windows), logs):
        levels.append(chunk.mean(1))
        spreads.append(np.log(np.sqrt(chunk.var(1) + floor**2)))
    found: dict[str, Any] = {"floor": floor.tolist()}
    for name, rows in (("level", np.concatenate(levels)), ("spread", np.concatenate(spreads))):
        deviation = rows.std(0)
        found[f"{name}_mean"] = rows.mean(0).tolist()
        found[f"{name}_std"] = np.where(constant | (deviation <= 1e-12 * np.abs(rows).max(0)), 1.0, deviation).tolist()
    return found


def _within(piece: Array, length: int | None) -> list[Array]:
    """All windows (m, length, D) within runs (n, T, D), as views."""
    if length is None or piece.shape[1] == length:
        return [piece]
    return [sliding_window_view(run, length, axis=0).transpose(0, 2, 1) for run in piece]
