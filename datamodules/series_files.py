"""Series from files: .csv, .npy (stays on disk) and .npz. Nothing is unpickled."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.series_csv import header, locate, read_csv

Array = NDArray[Any]
Fill = Literal["error", "interpolate", "previous"]

_CHUNK = 1 << 20  # numbers that are checked at once
_FORMATS = "a .csv file, or .npy or .npz of numbers of shape (time, dimensions) or (series, time, dimensions)"


class SeriesTable(NamedTuple):
    """Series one after another.

    Attributes:
        values: (T, D), perhaps on disk, all finite unless missing cells were to be left.
        columns: D names.
        lengths: (S,) int64, rows of each series.
    """

    values: Array
    columns: list[str]
    lengths: Array


def read_series(
    path: Path,
    columns: list[str] | None = None,
    drop: list[str] | None = None,
    series: str | None = None,
    time: str | None = None,
    rows_per_series: int | None = None,
    fill: Fill | None = "error",
) -> SeriesTable:
    """The series of a file.

    Args:
        path: a .csv file with a header (comma, semicolon or tab; read into memory); a .npy array (T, D) or (S, T, D),
            which stays on disk if its dimensions are neighbours and nothing is missing; an .npz file with such an array
            "x" or "ts", or with one alone, perhaps "columns" (D names) and "n_timepoints" (rows per series).
        columns: names of the dimensions wanted, in this order; those of arrays without names are "0", "1", ...
        drop: names of dimensions not wanted.
        series: a column of a .csv file that names the series of each row.
        time: a column of a .csv file with times that must grow in even steps; it is checked and left out.
        rows_per_series: a new series begins every so many rows.
        fill: what to do with missing and infinite cells: refuse, draw a line between those before and after (at an end,
            the nearest), or repeat the one before; None leaves them as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong with the file, the names, or the cells, by row and column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give {_FORMATS}")
    if path.suffix.lower() in (".npy", ".npz"):
        if series or time:
            raise ValueError(f"series and time name columns of .csv files; {path} has none: use rows_per_series")
        values, names, lengths, own = _read_array(path)
        places = choose(names, columns, drop, path.name)
        values, rows = _pick(values, places), None
        rows_per_series = rows_per_series or (own if len(lengths) == 1 else None)
    elif path.suffix.lower() in (".csv", ".tsv", ".txt"):
        names, _ = header(path)
        aside = [names[place] for name in (series, time) if name for place in choose(names, [name], None, path.name)]
        ignored = [name for name in aside if name not in (drop or [])]
        places = choose(names, columns, [*(drop or []), *ignored], path.name)
        values, rows, lengths = read_csv(path, [names[place] for place in places], series, time)
    else:
        raise ValueError(f"{path} is not read by its ending: give {_FORMATS}")
    chosen = [names[place] for place in places]
    if rows_per_series is not None:
        lengths = _every(rows_per_series, lengths, path)
    if fill is not None:
        values = _complete(values, chosen, rows, lengths, fill, path)
    return SeriesTable(values, chosen, lengths)


def choose(names: list[str], columns: list[str] | None, drop: list[str] | None, source: str) -> list[int]:
    """Positions of the wanted names: those of ``columns`` in their order, or all, without those of ``drop``.

    Raises:
        ValueError: a name that does not exist or is repeated, or nothing left.
    """
    for name in [*(columns or []), *(drop or [])]:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source} has no column {name!r}, only {', '.join(names)}{hint}")
    wanted = names if columns is None else columns
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"columns names {next(n for n in wanted if wanted.count(n) > 1)!r} twice: name each once")
    kept = [names.index(name) for name in wanted if name not in (drop or [])]
    if not kept:
        raise ValueError(f"no column of {source} is left: it has {', '.join(names)}")
    return kept


def _read_array(path: Path) -> tuple[Array, list[str], Array, int | None]:
    """Values (T, D), names, lengths (S,), and rows per series where the file says so."""
    own = None
    found: dict[str, Array] = {}
    try:
        file = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(file, np.lib.npyio.NpzFile):
            with file:
                found = {name: file[name] for name in file.files}
        else:
            found = {"x": file}
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory: save the array as .npy, which is read as needed") from error
    except Exception as error:  # zipfile, zlib and numpy have many ways to find a file damaged
        raise ValueError(f"cannot read {path} as numbers: {error}") from error
    candidates = [name for name, array in found.items() if array.ndim in (2, 3)]
    name = next((name for name in ("x", "ts") if name in found), candidates[0] if len(candidates) == 1 else None)
    if name is None:
        raise ValueError(f'{path} must hold one array, or one named "x", but has {", ".join(found) or "nothing"}')
    values = found[name][:, None] if found[name].ndim == 1 else found[name]
    if values.ndim not in (2, 3) or values.dtype.kind not in "fiub" or not math.prod(values.shape):
        raise ValueError(f"{path} holds {values.dtype} of shape {values.shape}: give {_FORMATS}")
    if "n_timepoints" in found and found["n_timepoints"].size == 1:
        own = int(found["n_timepoints"].item())
    dims = values.shape[-1]
    names = [str(i) for i in found["columns"].ravel()] if "columns" in found else [str(i) for i in range(dims)]
    if len(names) != dims or len(set(names)) < dims:
        raise ValueError(f"{path} has {dims} dimensions but the names {', '.join(names)}: give each its own")
    lengths = np.full(len(values), values.shape[1]) if values.ndim == 3 else np.array([len(values)])
    return values.reshape(-1, dims), names, lengths, own


def _pick(values: Array, places: list[int]) -> Array:
    """Some columns: a view if they are neighbours in order, else a copy."""
    if places == list(range(places[0], places[0] + len(places))):
        return values[:, places[0] : places[0] + len(places)]
    return values[:, places]


def _every(count: int, lengths: Array, path: Path) -> Array:
    """Lengths of series that begin every ``count`` rows."""
    if count < 1 or (lengths % count).any():
        raise ValueError(
            f"{path} has series of {int(lengths.max())} rows, which rows_per_series {count} does not divide"
        )
    return np.full(int(lengths.sum()) // count, count)


def _complete(values: Array, columns: list[str], rows: Array | None, lengths: Array, fill: Fill, path: Path) -> Array:
    """The values, all finite: as they are, or a filled copy."""
    step = max(1, _CHUNK // values.shape[1])
    bad = 0
    for first in range(0, len(values), step):
        missing = ~np.isfinite(values[first : first + step])
        if missing.any() and fill == "error":
            row, column = np.argwhere(missing)[0]
            if rows is not None:
                locate(path, columns, missing=True)
            where = f"row {first + row if rows is None else rows[first + row]}, column {columns[column]!r} of {path}"
            raise ValueError(f"{where} is missing or infinite: mend it, or set --data.fill interpolate or previous")
        bad += int(missing.sum())
    if not bad:
        return values
    rank_zero_warn(f"{path}: {bad} missing or infinite cells of {values.size} are filled ({fill})")
    filled = np.array(values, dtype=np.float64)
    for number, last in enumerate(np.cumsum(lengths)):
        for place, name in enumerate(columns):
            where = f"column {name!r} of {path}, series {number} of {len(lengths)},"
            _fill(filled[last - lengths[number] : last, place], fill, where)
    return filled


def _fill(values: Array, fill: Fill, where: str) -> None:
    """Fill one dimension (T,) of one series in place."""
    known = np.isfinite(values)
    if known.all():
        return
    if not known.any():
        raise ValueError(f"{where} has no number at all in {len(values)} rows: leave it out by --data.drop")
    if fill == "previous" and not known[0]:
        raise ValueError(f"{where} begins with a missing cell, which has none before it: set --data.fill interpolate")
    places = np.arange(len(values))
    if fill == "previous":
        values[:] = values[np.maximum.accumulate(np.where(known, places, 0))]
    else:
        values[:] = np.interp(places, places[known], values[known])
