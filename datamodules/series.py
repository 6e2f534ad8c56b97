"""Multivariate time series as windows: generated ones, daily quotes, and the user's own files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules import series_sources as sources
from datamodules.base import SPLITS, DataModule, Split, require_fractions, require_positive
from datamodules.loaders import Batch
from datamodules.scaling import Scaling, ScalingKind
from datamodules.series_files import Fill, SeriesTable, choose, read_series
from datamodules.series_splits import Runs, split_series

_LOOKED_AT, _NUMBERS = 8192, 1 << 22  # windows, and numbers in them, at most, for the spread in model space


class SeriesDataModule(DataModule):
    """Windows of multivariate time series: a batch has ``x`` (B, L', D) float32 in the model's scaling, and ``index``.

    Windows are cut from the rows as they are asked for, one beginning every ``stride`` rows, and never cross from one
    series into the next, nor from one split into another. Files are split by time, not by shuffled windows, which
    share almost all rows: each series is cut into ``blocks`` pieces of time, and the end of each piece is held out,
    first validation and then test, with ``length - 1`` unused rows between splits. With one block the model is judged
    on the end of time; with many, on all regimes. Of ten series or more (and one block) whole ones are held out.
    Generated sets have as many more windows as the fractions say, drawn by themselves. The scaling sees training
    windows only. One dimension is enough for all but correlations, which need two.

    ``spec``: kind "series", shape [L', D], length L, columns (D names), scaling (see scaling.py), classes 0, sigma_data
    (standard deviation in model space over training windows).

    Args:
        dataset: "sines" (generated, independent dimensions), "mujoco" (a falling hopper, 14 dimensions; needs
            dm-control), "nasdaq" or "sp500" (5031 days, 6 dimensions; need arch).
        path: a .csv, .npy or .npz file, which takes the place of ``dataset``; see series_files.py.
        columns: names of the dimensions to model, in this order; all by default.
        drop: names of columns to leave out, e.g. dates.
        series: a column of a .csv file that names the series each row belongs to.
        time: a column of a .csv file with times or dates, which must grow in even steps within each series; it is
            checked and left out.
        rows_per_series: a new series begins every so many rows of a file.
        length: rows L of a window.
        stride: rows from the beginning of a window to that of the next.
        windows: number of training windows of generated sets.
        dims: number of dimensions of "sines".
        scaling: "minmax", "standard", "quantile" or "window", see scaling.py; the last adds two rows to a window.
        log: take the natural logarithm of all columns, or of those named, first.
        fill: refuse missing cells, or fill them: "interpolate" between those around, or repeat the "previous" one.
        val_fraction: share of the rows, series or windows for validation.
        test_fraction: share for testing. With both 0 nothing is held out and all splits are the same windows, which is
            the reference's way; a model that memorises then scores best.
        blocks: pieces of time of each series whose ends are held out.
        batch_size: windows per batch and process.
        seed: of the order of training.

    Raises:
        ValueError: an argument out of range, an unknown column, what is wrong with a file, too few rows, a package that
            is missing.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        dataset: Literal["sines", "nasdaq", "sp500", "mujoco"] = "sines",
        path: str | None = None,
        columns: list[str] | None = None,
        drop: list[str] | None = None,
        series: str | None = None,
        time: str | None = None,
        rows_per_series: int | None = None,
        length: int = 24,
        stride: int = 1,
        windows: int = 10000,
        dims: int = 5,
        scaling: ScalingKind = "minmax",
        log: bool | list[str] = False,
        fill: Fill = "error",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        blocks: int = 1,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        require_positive(stride=stride, windows=windows, dims=dims, blocks=blocks)
        if length < 2:
            raise ValueError(f"length must be at least 2, got {length}")
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        if val_fraction or test_fraction:
            require_fractions(val_fraction, test_fraction)
        else:
            rank_zero_warn(
                "val_fraction and test_fraction are 0: nothing is held out, all splits are the same windows, and a "
                "model that memorises scores best"
            )
        self.length, self.stride = length, stride
        self._name = path or dataset
        if not path and dataset in sources.GENERATED:
            self._table, runs = self._generated(dataset, windows, dims, columns, drop)
        else:
            options = (columns, drop, series, time, rows_per_series, fill)
            self._table = read_series(Path(path), *options) if path else _quotes(dataset, columns, drop)
            runs = split_series(self._long_enough(), length, val_fraction, test_fraction, blocks)
        self.columns = self._table.columns
        self._runs = {split: runs[split] for split in SPLITS}
        self._ends = {split: np.cumsum(runs[split].counts(length, stride)) for split in SPLITS}
        self.scaling = self._fit(scaling, self._logged(log), unit=not path and dataset == "sines")
        self.spec = {
            "kind": "series",
            "shape": [length + self.scaling.extra, len(self.columns)],
            "length": length,
            "columns": list(self.columns),
            "scaling": self.scaling.spec,
            "classes": 0,
            "sigma_data": self._spread(),
        }

    @property
    def held_out(self) -> bool:
        """Whether validation and test windows are others than those of training."""
        return bool(self.val_fraction)

    def load(self) -> None:
        """Nothing is left to do: rows are known, or on disk, since the spec needed them."""

    def count(self, split: Split) -> int:
        """Number of windows of a split."""
        return int(self._ends[split][-1])

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Windows ``index`` (B,) of a split: x (B, L', D) float32."""
        return {"x": self.scaling.scale(self.originals(split, index)).float()}

    def originals(self, split: Split, index: Tensor) -> Tensor:
        """Windows ``index`` (B,) of a split in original units, (B, L, D) float64."""
        ends, runs = self._ends[split], self._runs[split]
        place = np.searchsorted(ends, index.numpy(), side="right")
        before = np.where(place > 0, ends[place - 1], 0)
        first = runs.first[place] + self.stride * (index.numpy() - before)
        rows = first[:, None] + np.arange(self.length)
        return torch.from_numpy(np.asarray(self._table.values[rows], dtype=np.float64))

    def _generated(
        self, dataset: str, windows: int, dims: int, columns: list[str] | None, drop: list[str] | None
    ) -> tuple[SeriesTable, dict[Split, Runs]]:
        """Windows as series of their length, those of each split behind each other."""
        counts = [windows, *(max(1, round(windows * part)) for part in (self.val_fraction, self.test_fraction) if part)]
        try:
            made = [sources.generate(dataset, count, self.length, dims, split) for split, count in enumerate(counts)]
        except MemoryError as error:
            raise ValueError(f"{sum(counts):,} windows of {dataset} do not fit into memory: lower windows") from error
        names = made[0][1]
        places = choose(names, columns, drop, dataset)
        values = np.concatenate([part[..., places] for part, _ in made]).reshape(-1, len(places))
        lengths = np.full(sum(counts), self.length)
        whole = Runs(np.arange(sum(counts)) * self.length, lengths)
        ends = [0, *np.cumsum(counts).tolist()]
        parts = [Runs(whole.first[a:b], whole.rows[a:b]) for a, b in pairwise(ends)]
        runs = dict(zip(SPLITS, parts if len(parts) == len(SPLITS) else parts * len(SPLITS), strict=True))
        return SeriesTable(values, [names[place] for place in places], lengths), runs

    def _long_enough(self) -> Runs:
        """The series that hold a window."""
        lengths = self._table.lengths
        kept = lengths >= self.length
        if not kept.any():
            raise ValueError(
                f"a window takes {self.length} rows, but {self._name} has {len(lengths)} series of at most "
                f"{lengths.max()} rows: lower length"
            )
        if not kept.all():
            rank_zero_warn(f"{(~kept).sum()} of {len(kept)} series have less than {self.length} rows and are left out")
        return Runs((np.cumsum(lengths) - lengths)[kept], lengths[kept])

    def _logged(self, log: bool | list[str]) -> list[bool]:
        """Of which dimensions the logarithm is taken; all values of these must be positive."""
        if isinstance(log, bool):
            logged = [log] * len(self.columns)
        else:
            places = choose(self.columns, log, None, self._name) if log else []
            logged = [place in places for place in range(len(self.columns))]
        for place in np.flatnonzero(logged):
            smallest = self._table.values[:, place].min()
            if smallest <= 0:
                raise ValueError(
                    f"the logarithm of column {self.columns[place]!r} is asked for, but its smallest value is "
                    f"{smallest:g}: leave the column out of log, or shift it to positive values"
                )
        return logged

    def _fit(self, kind: ScalingKind, log: list[bool], unit: bool) -> Scaling:
        """The scaling by training windows; with ``unit`` the range is [-1, 1] whatever was drawn."""
        pieces = self._runs["train"].pieces(self._table.values)
        scaling = Scaling.fit(pieces, kind, log, self.columns, self.length)
        low, high = scaling.spec["low"], scaling.spec["high"]
        constant = [f"{name!r} ({low[i]:g})" for i, name in enumerate(self.columns) if low[i] == high[i]]
        if constant:
            rank_zero_warn(f"{self._name}: constant in training, and always generated so: {', '.join(constant)}")
        if unit and not any(log):
            scaling = Scaling({**scaling.spec, "low": [-1.0] * len(low), "high": [1.0] * len(low)})
        return scaling

    def _spread(self) -> float:
        """Standard deviation in model space, over some evenly spaced training windows."""
        count = self.count("train")
        most = max(1, min(count, _LOOKED_AT, _NUMBERS // (self.length * len(self.columns))))
        index = torch.linspace(0, count - 1, most, dtype=torch.float64).long()
        x = self.scaling.scale(self.originals("train", index))
        return float(x.std(correction=0)) or 1.0


def _quotes(dataset: str, columns: list[str] | None, drop: list[str] | None) -> SeriesTable:
    """Daily quotes by the name of an index."""
    if dataset not in sources.QUOTES:
        known = ", ".join((*sources.GENERATED, *sources.QUOTES))
        raise ValueError(f"there is no dataset {dataset!r}: choose one of {known}, or give a path")
    values, names = sources.quotes(dataset)
    places = choose(names, columns, drop, dataset)
    return SeriesTable(values[:, places], [names[place] for place in places], np.array([len(values)]))
