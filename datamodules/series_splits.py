"""Which rows of series are for training, which are held out: by whole series or by time, never by shuffled windows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.base import SPLITS, Split
from datamodules.loaders import permutation

Array = NDArray[Any]

WHOLE = 10  # from so many series on, whole ones are held out
_SPLIT = 6  # purpose of a hash, see loaders.py


class Runs(NamedTuple):
    """Stretches of neighbouring rows in which windows may lie.

    Attributes:
        first: (R,) int64, first row of each.
        rows: (R,) int64, number of rows.
    """

    first: Array
    rows: Array

    def counts(self, length: int, stride: int) -> Array:
        """(R,) number of windows of ``length`` rows in each run, one every ``stride`` rows."""
        return np.maximum(0, (self.rows - length) // stride + 1)

    def pieces(self, values: Array) -> list[Array]:
        """Their rows of ``values`` (T, D), as views (n, rows, D): runs of one length that are neighbours together."""
        apart = (self.first[1:] != self.first[:-1] + self.rows[:-1]) | (self.rows[1:] != self.rows[:-1])
        groups = np.split(np.arange(len(self.first)), np.flatnonzero(apart) + 1)
        spans = [(self.first[group[0]], len(group), self.rows[group[0]]) for group in groups]
        return [values[first : first + n * rows].reshape(n, rows, -1) for first, n, rows in spans]


def split_series(whole: Runs, length: int, val_fraction: float, test_fraction: float, blocks: int) -> dict[Split, Runs]:
    """The runs of each split.

    With no fractions every split is everything. With ten series or more, and one block, whole series are held out,
    chosen once and for all by a fixed permutation. Otherwise each series is cut into ``blocks`` equal pieces of time,
    and each piece into training, validation and test rows in this order, with ``length - 1`` rows left out wherever
    rows of two splits would be neighbours: the end of every piece is held out.

    Args:
        whole: the series.
        length: rows of a window.
        val_fraction: share of rows (or series) for validation; at least one window (or series).
        test_fraction: for testing; both or none of the two are 0.
        blocks: pieces of each series.

    Raises:
        ValueError: too few rows for a window in every part.
    """
    if not val_fraction and not test_fraction:
        return dict.fromkeys(SPLITS, whole)
    if len(whole.first) >= WHOLE and blocks == 1:
        return _by_series(whole, val_fraction, test_fraction)
    found: dict[Split, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    for start, rows in zip(whole.first.tolist(), whole.rows.tolist(), strict=True):
        edges = np.linspace(0, rows, blocks + 1).round().astype(int).tolist()
        for begin, end in pairwise(edges):
            parts = _cut(end - begin, length, val_fraction, test_fraction, gap_behind=end < rows)
            if parts is None:
                raise ValueError(
                    f"a piece of {end - begin} rows (a series of {rows} in {blocks} blocks) is too short for training, "
                    f"validation and test parts of {length} rows or more, with gaps of {length - 1} rows between; "
                    "take fewer blocks, a shorter length, smaller fractions, or set both fractions to 0"
                )
            for split, (offset, count) in parts.items():
                found[split].append((start + begin + offset, count))
    return {split: Runs(*np.array(runs, dtype=np.int64).T) for split, runs in found.items()}


def _by_series(whole: Runs, val_fraction: float, test_fraction: float) -> dict[Split, Runs]:
    """Whole series for each split."""
    total = len(whole.first)
    val, test = (max(1, round(total * fraction)) for fraction in (val_fraction, test_fraction))
    if val + test >= total:
        raise ValueError(f"of {total} series {val} and {test} are held out, which leaves none: lower the fractions")
    parts = np.split(permutation(total, _SPLIT).numpy(), [val, val + test])
    val_part, test_part, train_part = (Runs(whole.first[np.sort(part)], whole.rows[np.sort(part)]) for part in parts)
    return {"train": train_part, "val": val_part, "test": test_part}


def _cut(
    rows: int, length: int, val_fraction: float, test_fraction: float, gap_behind: bool
) -> dict[Split, tuple[int, int]] | None:
    """(offset, rows) of each split in a piece; None if a window does not fit into each."""
    gap = length - 1
    val, test = (max(length, round(rows * fraction)) for fraction in (val_fraction, test_fraction))
    train = rows - val - test - gap * (2 + gap_behind)
    if train < length:
        return None
    return {"train": (0, train), "val": (train + gap, val), "test": (train + gap + val + gap, test)}
