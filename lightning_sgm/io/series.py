"""Samples that are windows of time series: tables and arrays in the series' own units, and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor

from datamodules.scaling import Scaling
from lightning_sgm.io.figures import pixels_of, save_figure
from lightning_sgm.io.files import atomic_write
from lightning_sgm.io.series_figures import (
    Dimension,
    autocorrelation_figure,
    completions_figure,
    correlations_figure,
    values_figure,
    windows_figure,
)
from lightning_sgm.io.writers import Batch, Writer, names_of, numbers_of, with_suffix

Array = NDArray[Any]

_VIEWS = {
    "windows": windows_figure,
    "values": values_figure,
    "correlations": correlations_figure,
    "autocorrelation": autocorrelation_figure,
}
_DIGITS = 10  # of numbers in tables: float32, in which models compute, has fewer
_LABEL = 24  # characters of a title
_PLACES = 22  # powers of ten up to this are exact in float64


@dataclass(frozen=True)
class _Windows:
    """N windows in original units, sorted by number; those that complete something by window, then by number.

    Attributes:
        x: (N, L, D) float64, with what was known put in.
        index: (N,) int64.
        window: (N,) int64, the number of the window that a sample completes, or its own.
        known: (N, L, D) bool, or None for samples that complete nothing.
        truth: (N, L, D) float64, or None.
    """

    x: Array
    index: Array
    window: Array
    known: Array | None = None
    truth: Array | None = None

    def arrays(self) -> dict[str, Array]:
        """What there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def ordered(self) -> _Windows:
        """Sorted."""
        order = np.lexsort((self.index, self.window))
        return _Windows(**{name: value[order] for name, value in self.arrays().items()})

    def starts(self) -> Array:
        """The places of the first samples of the windows."""
        return np.flatnonzero(np.append(True, self.window[1:] != self.window[:-1]))


class SeriesWriter(Writer):
    """Windows of time series in original units.

    A batch holds ``x`` (B, L', D) as the model scales it. In one that completes windows ``before`` (B, L, D), scaled
    likewise, has NaN where nothing was known; ``group`` (B,) numbers the windows, of which each may have several
    completions, and ``truth`` (B, L', D) is what should have come out. A batch with ``view`` ("windows", "values",
    "correlations" or "autocorrelation") is a picture of that kind, of ``x`` and, if there are any, the windows ``real``
    (M, L', D).

    Tables have a row per step of a window and can be read again with ``--data.series window --data.drop '[step]'``.
    Their numbers have ten digits or more; the arrays are exact.

    Args:
        columns: names of the D dimensions.
        scaling: a data specification's "scaling", see :class:`~datamodules.scaling.Scaling`.
        length: L, the number of steps of a window.
    """

    def __init__(self, columns: Sequence[str], scaling: Mapping[str, Any], length: int) -> None:
        self.columns = list(columns)
        self.length = length
        self.scaling = Scaling(scaling)
        if len(self.columns) != self.scaling.dims:
            raise ValueError(f"the series have {len(self.columns)} columns, but the scaling has {self.scaling.dims}")
        ranges = zip(map(_label, self.columns), scaling["low"], scaling["high"], scaling["log"], strict=True)
        self._dimensions = [Dimension(*one) for one in ranges]

    def save(self, batch: Batch, stem: Path) -> list[Path]:
        """``stem.csv``, ``stem.npz`` and ``stem.png``; of a batch with a view the picture only.

        The table has the columns window, step and those of the series. The arrays are x (N, L, D) and columns (D,).
        Of completed windows both say more: the table has a column sample and for each of the series' columns NAME one
        called NAME_known with 1 for what was given; the arrays are also window (N,), known (N, L, D) and, if there is
        one, truth (N, L, D).
        """
        if "view" in batch:
            return [save_figure(self._view(batch), with_suffix(stem, ".png"))]
        real = self._values(batch["real"]) if "real" in batch else None
        return self._write(self._windows(batch).ordered(), real, stem)

    def save_each(self, batch: Batch, folder: Path) -> list[Path]:
        """One file ``folder/parts/FIRST.npz`` with the windows and their numbers, for all of the batch."""
        path = with_suffix(folder / "parts" / min(names_of(batch)), ".npz")
        _save_arrays(self._windows(batch).arrays(), path)
        return [path] * len(batch["x"])

    def collect(self, files: Sequence[Path], stem: Path) -> list[Path]:
        """All windows in the order of their numbers, in the files that ``save`` writes."""
        parts = [dict(np.load(file, allow_pickle=False)) for file in dict.fromkeys(files)]
        merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._write(_Windows(**merged).ordered(), None, stem)

    def log(self, logger: Logger, tag: str, batch: Batch, step: int) -> None:
        """The picture."""
        if not isinstance(logger, TensorBoardLogger):
            return
        if "view" in batch:
            figure = self._view(batch)
        else:
            real = self._values(batch["real"]) if "real" in batch else None
            figure = self._figure(self._windows(batch).ordered(), real)
        logger.experiment.add_image(tag, pixels_of(figure), step, dataformats="HWC")

    def _values(self, x: Tensor) -> Array:
        """(N, L', D) as the model scales it -> (N, L, D) float64 in original units."""
        if x.dim() != 3 or x.shape[2] != len(self.columns):
            raise ValueError(
                f"a batch of series has the shape (B, steps, {len(self.columns)}), a column for each of "
                f"{', '.join(self.columns)}; got {tuple(x.shape)}"
            )
        values = self.scaling.unscale(x.detach().cpu().double()).numpy()
        if values.shape[1] != self.length:
            raise ValueError(
                f"the model's windows have {self.length} steps, but a batch of shape {tuple(x.shape)} has "
                f"{values.shape[1]}"
            )
        return values

    def _windows(self, batch: Batch) -> _Windows:
        x, index = self._values(batch["x"]), np.array(numbers_of(batch))
        if "before" not in batch:
            return _Windows(x, index, index)
        before = batch["before"].detach().cpu()
        if before.shape[1] != self.length:
            raise ValueError(
                f"what was known of a window has {before.shape[1]} rows for {self.length} steps: it has no units of "
                "its own where each window is scaled by itself; complete windows with another scaling, such as minmax"
            )
        known = ~before.isnan()
        x = np.where(known.numpy(), self._values(before.nan_to_num(nan=0.0)), x)
        window = batch["group"].cpu().numpy().astype(np.int64) if "group" in batch else index
        truth = self._values(batch["truth"]) if "truth" in batch else None
        return _Windows(x, index, window, known.numpy(), truth)

    def _view(self, batch: Batch) -> Any:
        if batch["view"] not in _VIEWS:
            raise ValueError(f"series have no view {batch['view']!r}; there are {', '.join(_VIEWS)}")
        real = self._values(batch["real"]) if "real" in batch else None
        return _VIEWS[batch["view"]](self._dimensions, self._values(batch["x"]), real)

    def _figure(self, windows: _Windows, real: Array | None) -> Any:
        if windows.known is None:
            return windows_figure(self._dimensions, windows.x, real)
        starts = windows.starts()
        parts = np.split(windows.x, starts[1:])
        truths = None if windows.truth is None else windows.truth[starts]
        names = [f"window {number}" for number in windows.window[starts]]
        return completions_figure(self._dimensions, parts, windows.known[starts], truths, names)

    def _write(self, windows: _Windows, real: Array | None, stem: Path) -> list[Path]:
        table, arrays, picture = (with_suffix(stem, end) for end in (".csv", ".npz", ".png"))
        self._write_table(windows, table)
        kept = {"x": windows.x} if windows.known is None else windows.arrays()
        kept.pop("index", None)
        _save_arrays({**kept, "columns": np.array(self.columns, dtype=np.str_)}, arrays)
        return [table, arrays, save_figure(self._figure(windows, real), picture)]

    def _write_table(self, windows: _Windows, path: Path) -> None:
        import pyarrow
        from pyarrow import csv as arrow

        count, length, _ = windows.x.shape
        spans = np.array([one.high - one.low for one in self._dimensions])
        numbers = {"window": windows.window, "step": np.tile(np.arange(length), count)}
        if windows.known is not None:
            starts = windows.starts()
            runs = np.diff(np.append(starts, count))
            numbers = {"window": windows.window, "sample": np.arange(count) - np.repeat(starts, runs)} | numbers
        columns = [value if name == "step" else np.repeat(value, length) for name, value in numbers.items()]
        columns += [_rounded(values, span) for values, span in zip(_by_column(windows.x), spans, strict=True)]
        names = [_free(name, self.columns) for name in numbers] + self.columns
        if windows.known is not None:
            columns += list(_by_column(windows.known.astype(np.int8)))
            names += [f"{name}_known" for name in self.columns]
        header = io.StringIO()
        csv.writer(header, lineterminator="\n").writerow(names)
        with atomic_write(path) as file:
            file.write(header.getvalue().encode())
            whole = pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], names=names)
            arrow.write_csv(whole, file, arrow.WriteOptions(include_header=False))


def _by_column(values: Array) -> Array:
    """(N, L, D) -> (D, N L)."""
    return np.ascontiguousarray(values.reshape(-1, values.shape[2]).T)


def _rounded(values: Array, span: float) -> Array:
    """Values with so many digits that they are right to 1e-9 of themselves and of the range ``span`` of the data."""
    with np.errstate(all="ignore"):
        size = np.minimum(np.abs(values), span) if span > 0 else np.abs(values)
        places = _DIGITS - 1 - np.floor(np.log10(size))
        sensible = (places >= 0) & (places <= _PLACES)
        scale = 10.0 ** np.where(sensible, places, 0.0)
        rounded = np.rint(values * scale) / scale
    return np.where(sensible & np.isfinite(rounded), rounded, values)


def _label(name: str) -> str:
    """A column's name as a title: not too long, and dollars are no formulas."""
    short = name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"
    return short.replace("$", r"\$")


def _free(name: str, taken: Sequence[str]) -> str:
    """A name that no column of the series has."""
    while name in taken:
        name += "_"
    return name


def _save_arrays(arrays: Mapping[str, Array], path: Path) -> None:
    with atomic_write(path) as file:
        np.savez(file, **dict[str, Any](arrays))
