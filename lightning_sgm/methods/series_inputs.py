"""Files of series that a model is to complete: with gaps, or with a future to forecast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.series_files import read_series

if TYPE_CHECKING:
    from lightning_sgm.methods.pad_ts import PaDTS

_BATCH = 32  # windows completed at once


class SeriesInputs(Sequence[dict[str, Any]]):
    """The windows of one series in a file that have something to be found, in batches.

    A batch has "x" (n, L, D) scaled, finite everywhere, "known" (n, L, D) bool, and "index" (n,), the rows of the file
    at which the windows begin, counted from 0.

    Args:
        path: a .csv file with the model's columns, others are passed over; or a .npy or .npz array (T, D).
        module: the model.
        horizon: steps behind the end of the file that are to be found after its last rows; 0 for the missing cells of
            the file, window by window.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, has not the model's columns, too few rows, or nothing to be found.
    """

    def __init__(self, path: str, module: PaDTS, horizon: int = 0) -> None:
        spec = module.spec
        length, columns = spec["length"], spec["columns"]
        table = read_series(Path(path), columns=columns, fill=None)
        if len(table.lengths) > 1:
            raise ValueError(f"{path} holds {len(table.lengths)} series: give a file for each")
        values, needed = table.values, length - horizon
        if needed < 1:
            raise ValueError(
                f"horizon {horizon} of Forecast leaves nothing known of windows of {length} steps: lower it"
            )
        if len(values) < needed:
            raise ValueError(f"{path} has {len(values)} rows, but the model needs {needed}: give a longer file")
        if horizon:
            future = np.full((horizon, len(columns)), np.nan)
            windows = np.concatenate([values[len(values) - needed :], future])[None]
            starts = np.array([len(values) - needed])
        else:
            # One after another; the last one ends with the file.
            starts = np.unique(np.minimum(np.arange(0, len(values), length), len(values) - length))
            windows = np.stack([values[start : start + length] for start in starts])
        known = np.isfinite(windows)
        wanted = ~known.all((1, 2))
        if not wanted.any():
            raise ValueError(f"nothing is missing in {path}: leave cells empty where values are to be found")
        if horizon and not known[0, :needed].all():
            raise ValueError(f"cells are missing in the last {needed} rows of {path}: fill them by Impute first")
        self._known = torch.from_numpy(known[wanted])
        self._starts = torch.from_numpy(starts[wanted])
        # What is not known is never looked at, but logarithms want it positive.
        low = torch.tensor(spec["scaling"]["low"], dtype=torch.float64)
        found = torch.from_numpy(np.asarray(windows[wanted], dtype=np.float64))
        self._x = module.scaling.scale(torch.where(self._known, found, low)).float()

    def __len__(self) -> int:
        return -(-len(self._x) // _BATCH)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = slice(number * _BATCH, (number + 1) * _BATCH)
        return {"x": self._x[part], "known": self._known[part], "index": self._starts[part]}
