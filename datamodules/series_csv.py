"""Series from text files of columns: read in blocks by pyarrow; what is wrong is found again by row and column."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_DELIMITERS = (",", ";", "\t")
# What stands for a missing cell, as pyarrow has it.
_MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA"}
_MISSING |= {"NULL", "NaN", "n/a", "nan", "null"}
_TIMES = ("%Y/%m/%d", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y-%m-%d %H:%M")
_UNEVEN = 0.1  # a step of time may differ from the usual one by this share of it


_SMALLER = "take fewer columns by --data.columns, or save it as .npy once, which is read from disk as needed"


class Csv(NamedTuple):
    """What a file holds.

    Attributes:
        values: (T, D) float64; NaN where a cell is missing.
        rows: (T,) int64, rows of the file they stand in, its header being row 1.
        lengths: (S,) int64, rows of each series, one series after another.
    """

    values: Array
    rows: Array
    lengths: Array


def header(path: Path) -> tuple[list[str], str]:
    """Column names and delimiter (comma, semicolon or tab: the one that makes most columns) of the first row.

    Raises:
        ValueError: an empty file, bytes that are no UTF-8, names that are missing, repeated, or numbers.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}): save it as CSV in UTF-8") from error
    if not first.strip():
        raise ValueError(
            f"{path} is empty or begins with an empty row: the first row must hold the names of the columns"
        )
    rows = {mark: next(csv.reader(io.StringIO(first), delimiter=mark)) for mark in _DELIMITERS}
    delimiter = max(rows, key=lambda mark: len(rows[mark]))
    names = [name.strip() for name in rows[delimiter]]
    if all(_is_number(name) for name in names):
        raise ValueError(f"the first row of {path} holds numbers: put a row with the names of the columns above it")
    unnamed = [position for position, name in enumerate(names, 1) if not name]
    if unnamed:
        raise ValueError(f"column {unnamed[0]} of {path} has no name in the first row: give it one")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path} has {names.count(twice[0])} columns {twice[0]!r}: give each its own name")
    return names, delimiter


def read_csv(path: Path, columns: list[str], series: str | None = None, time: str | None = None) -> Csv:
    """The numbers of some columns.

    Rows of one series are brought together, in the order of the file.

    Args:
        path: a file whose first row names its columns; numbers with a decimal point.
        columns: the D columns wanted.
        series: a column that names the series a row belongs to.
        time: a column of times, numbers or dates, which must grow in even steps within each series.

    Raises:
        ValueError: no rows, rows of another width, cells that are no numbers, times that do not grow evenly, a file
            that does not fit into memory.
    """
    names, delimiter = header(path)
    _require_rows_and_memory(path, len(columns))
    texts, moments, numbers = [], [], []
    try:
        for batch in _batches(path, names, delimiter, columns, series, time):
            numbers.append(np.stack([batch[name].to_numpy(zero_copy_only=False) for name in columns], axis=1))
            texts += [batch[series]] if series else []
            moments += [batch[time]] if time else []
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory: {_SMALLER}") from error
    except ValueError as error:  # pyarrow's errors are ValueErrors
        locate(path, columns)
        raise ValueError(f"cannot read {path}: {error}") from error
    values = np.concatenate(numbers) if numbers else np.empty((0, len(columns)))
    if not len(values):
        raise ValueError(f"{path} has a header but no rows below it")
    order, lengths = _by_series(texts, path, series) if series else (np.arange(len(values)), np.array([len(values)]))
    if time:
        _require_even(_moments(moments, path, time)[order], order + 2, lengths, path, time)
    in_order = bool((order[1:] > order[:-1]).all())
    return Csv(values if in_order else values[order], order + 2, lengths)


def locate(path: Path, columns: list[str], missing: bool = False) -> None:
    """Raise the ValueError that names the first row or cell of ``columns`` that is wrong; return if there is none.

    Args:
        path: the file.
        columns: where to look for cells that are no numbers.
        missing: missing and infinite cells are wrong, too.
    """
    names, delimiter = header(path)
    places = [(name, names.index(name)) for name in columns]
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        reader = csv.reader(file, delimiter=delimiter)
        next(reader)
        for cells in reader:
            if not cells and len(names) > 1:
                continue
            row, cells = reader.line_num, cells or [""]
            if len(cells) != len(names):
                raise ValueError(
                    f"row {row} of {path} has {len(cells)} cells, but the header names {len(names)} columns"
                )
            for name, place in places:
                _require_number(cells[place].strip(), f"row {row}, column {name!r} of {path}", name, missing)


def _require_number(cell: str, where: str, name: str, missing: bool) -> None:
    if cell in _MISSING:
        if missing:
            raise ValueError(
                f"{where} is missing ({cell!r}): mend the file, or set --data.fill interpolate or previous"
            )
    elif not _is_number(cell):
        advice = "mend the cell, or empty it and set --data.fill"
        if re.search(r"\d[-/:]\d+[-/:]", cell):
            advice = f"leave the column out by --data.drop '[{name}]', or say that it is the time: --data.time {name}"
        elif re.fullmatch(r"-?\d+,\d+", cell):
            advice = "write decimals with a point"
        else:
            advice += f"; a column of text is left out by --data.drop '[{name}]'"
        raise ValueError(f"{where} holds {cell[:40]!r}, which is no number: {advice}")
    elif missing and not np.isfinite(float(cell)):
        raise ValueError(f"{where} is {cell}: mend the file, or set --data.fill interpolate or previous")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _batches(
    path: Path, names: list[str], delimiter: str, columns: list[str], series: str | None, time: str | None
) -> Iterator[dict[str, Any]]:
    """Blocks of rows as pyarrow arrays by name."""
    import pyarrow
    from pyarrow import csv as arrow

    types = {name: pyarrow.float64() for name in columns} | ({series: pyarrow.string()} if series else {})
    wanted = [*columns, *(name for name in (series, time) if name)]
    reader = arrow.open_csv(
        path,
        # Threads would lose the order in which errors are met.
        read_options=arrow.ReadOptions(column_names=names, skip_rows=1, use_threads=False, block_size=1 << 22),
        # With one column an empty row is a missing cell.
        parse_options=arrow.ParseOptions(delimiter=delimiter, ignore_empty_lines=len(names) > 1),
        convert_options=arrow.ConvertOptions(
            column_types=types, include_columns=wanted, timestamp_parsers=[arrow.ISO8601, *_TIMES]
        ),
    )
    for batch in reader:
        yield {name: batch.column(name) for name in wanted}


def _require_rows_and_memory(path: Path, dims: int) -> None:
    """Refuse a file that ends with its header, or whose numbers would take more memory than is known to be free."""
    known = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", known.read_text()) if known.is_file() else None
    with path.open("rb") as file:
        file.readline()
        width = len(file.readline())
    if not width:
        raise ValueError(f"{path} has a header but no rows below it")
    # Twice, as blocks are joined in the end.
    needed = 2 * 8 * dims * (path.stat().st_size // width)
    if found and needed > 1024 * int(found.group(1)):
        gigabytes = f"{needed / 2**30:.1f} GiB, of which {int(found.group(1)) / 2**20:.1f} are free"
        raise ValueError(f"reading {path} takes about {gigabytes}: {_SMALLER}")


def _by_series(texts: list[Any], path: Path, series: str) -> tuple[Array, Array]:
    """An order (T,) that brings each series together, and their lengths (S,); series by first appearance."""
    import pyarrow

    coded = pyarrow.chunked_array(texts).combine_chunks().dictionary_encode()
    if coded.null_count or "" in coded.dictionary.to_pylist():
        raise ValueError(f"column {series!r} of {path} has rows without a name of their series: fill them in")
    codes = coded.indices.to_numpy(zero_copy_only=False)
    return np.argsort(codes, kind="stable"), np.bincount(codes)


def _moments(batches: list[Any], path: Path, time: str) -> Array:
    """Times (T,) float64, counted from the first."""
    import pyarrow
    from pyarrow import types

    column = pyarrow.chunked_array(batches)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0]) + 2
        raise ValueError(f"row {row}, column {time!r} of {path} is missing: times must be complete")
    if types.is_temporal(column.type):
        column = column.cast(pyarrow.int32() if column.type.bit_width == 32 else pyarrow.int64())
    if types.is_integer(column.type) or types.is_floating(column.type):
        numbers = column.to_numpy()
        return (numbers - numbers[0]).astype(np.float64)  # exact also where they count nanoseconds
    raise ValueError(
        f"the times in column {time!r} of {path} are not understood, e.g. {column[0].as_py()!r}: write numbers, or "
        "dates such as 2020-12-31 or 2020-12-31 23:59:59"
    )


def _require_even(moments: Array, rows: Array, lengths: Array, path: Path, time: str) -> None:
    """Refuse times (T,) that do not grow, or not in even steps, within each series."""
    steps = np.diff(moments)
    inner = np.ones(len(steps), dtype=bool)
    inner[np.cumsum(lengths)[:-1] - 1] = False
    if not inner.any():
        return
    usual = float(np.quantile(steps[inner], 0.5, method="lower"))
    back = np.flatnonzero(inner & ~(steps > 0))
    if len(back):
        raise ValueError(
            f"row {rows[back[0] + 1]} of {path}: the time in column {time!r} does not grow; sort the rows by time"
            + ("" if len(lengths) > 1 else ", or name the series rows belong to by --data.series")
        )
    uneven = np.flatnonzero(inner & (np.abs(steps - usual) > _UNEVEN * usual))
    if len(uneven):
        raise ValueError(
            f"row {rows[uneven[0] + 1]} of {path}: the time in column {time!r} grows by "
            f"{steps[uneven[0]] / usual:.4g} times the usual step; bring the series to even steps, or, where rows "
            f"count and not time (e.g. trading days), leave the column out: --data.drop '[{time}]'"
        )
