"""Files that a model of series is to complete: which windows, which rows, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.scaling import Scaling
from lightning_sgm.methods.series_inputs import SeriesInputs
from tests.methods.series_models import COLUMNS, D, L, rows, spec, table


def stand_in(kind: Any = "minmax", log: bool = False) -> Any:
    of = spec(kind, log)
    return SimpleNamespace(spec=of, scaling=Scaling(of["scaling"]))


def gaps(x, *cells):
    x = x.clone()
    for row, column in cells:
        x[row, column] = torch.nan
    return x


def joined(inputs):
    """All batches as one."""
    parts = list(inputs)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_windows_with_gaps_come_with_their_rows(tmp_path: Path):
    x = gaps(rows(20), (0, 1), (7, 2), (8, 0), (19, 1))
    found = joined(SeriesInputs(str(table(tmp_path / "a.csv", x)), stand_in()))
    # Windows begin at 0, 6, 12 and, so that it ends with the file, 14; nothing is missing in the third.
    assert found["index"].tolist() == [0, 6, 14]
    assert found["x"].shape == found["known"].shape == (3, L, D)
    assert found["x"].dtype == torch.float32
    for start, window, known in zip([0, 6, 14], found["x"], found["known"], strict=True):
        original = x[start : start + L]
        assert torch.equal(known, ~original.isnan())
        values = stand_in().scaling.unscale(window)
        torch.testing.assert_close(values[known], original[known], rtol=1e-5, atol=1e-5)
        assert window.isfinite().all()


@given(st.integers(L, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, D - 1)), min_size=1, max_size=12))
def test_every_missing_cell_is_in_a_window(count, cells):
    cells = [(row % count, column) for row, column in cells]
    with pytest.MonkeyPatch.context() as patch:
        x = gaps(rows(count), *cells).numpy()
        read = SimpleNamespace(values=x, lengths=np.array([count]))
        patch.setitem(SeriesInputs.__init__.__globals__, "read_series", lambda *_, **__: read)
        found = joined(SeriesInputs("a.csv", stand_in()))
    covered = {
        (int(start) + int(row), int(column))
        for start, known in zip(found["index"], found["known"], strict=True)
        for row, column in (~known).nonzero()
    }
    assert covered == set(cells)
    assert found["x"].isfinite().all()
    assert (~found["known"]).any((1, 2)).all()


@pytest.mark.parametrize("horizon", [1, 2, L - 1])
def test_a_forecast_goes_on_from_the_last_rows(horizon, tmp_path: Path):
    x = gaps(rows(11), (2, 0))  # an old gap is of no concern
    inputs = SeriesInputs(str(table(tmp_path / "a.csv", x)), stand_in(), horizon)
    assert len(inputs) == 1
    (found,) = inputs
    needed = L - horizon
    assert found["index"].tolist() == [11 - needed]
    assert found["known"][0, :needed].all()
    assert not found["known"][0, needed:].any()
    values = stand_in().scaling.unscale(found["x"])[0, :needed]
    torch.testing.assert_close(values, x[11 - needed :], rtol=1e-5, atol=1e-5)
    assert found["x"].isfinite().all()


def test_as_many_rows_as_are_known_are_enough(tmp_path: Path):
    path = str(table(tmp_path / "a.csv", rows(4)))
    assert SeriesInputs(path, stand_in(), 2)[0]["index"].tolist() == [0]
    with pytest.raises(ValueError, match="has 4 rows, but the model needs 5: give a longer file"):
        SeriesInputs(path, stand_in(), 1)


@pytest.mark.parametrize("kind", ["minmax", "standard", "quantile"])
@pytest.mark.parametrize("log", [False, True])
def test_all_scalings_stay_finite_where_nothing_is_known(kind: Any, log: bool, tmp_path: Path):
    x = gaps(rows(L), *((row, 1) for row in range(L)), (0, 0))
    (found,) = SeriesInputs(str(table(tmp_path / "a.csv", x)), stand_in(kind, log))
    assert found["x"].isfinite().all()
    assert found["known"].sum() == 2 * L - 1


def test_infinite_cells_are_gaps_and_other_columns_are_passed_over(tmp_path: Path):
    x = rows(L)
    x[3, 1] = torch.inf
    wide = torch.cat([torch.full((L, 1), torch.nan), x[:, [2, 0, 1]]], 1)
    (found,) = SeriesInputs(str(table(tmp_path / "a.csv", wide, ["more", "c", "a", "b"])), stand_in())
    assert (~found["known"]).nonzero().tolist() == [[0, 3, 1]]
    torch.testing.assert_close(stand_in().scaling.unscale(found["x"])[0, :, 2], x[:, 2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_arrays(ending: str, tmp_path: Path):
    x = gaps(rows(8), (7, 0)).numpy()
    path = tmp_path / f"a.{ending}"
    if ending == "npy":
        np.save(path, x)
    else:
        np.savez(path, x=x, columns=np.array(COLUMNS))
    module = stand_in()
    module.spec["columns"] = ["0", "1", "2"] if ending == "npy" else COLUMNS
    assert joined(SeriesInputs(str(path), module))["index"].tolist() == [2]


def test_many_windows_come_in_batches(tmp_path: Path):
    x = rows(40 * L)
    x[::L, 0] = torch.nan
    inputs = SeriesInputs(str(table(tmp_path / "a.csv", x)), stand_in())
    assert len(inputs) == 2
    assert [len(part["index"]) for part in inputs] == [32, 8]
    assert joined(inputs)["index"].tolist() == [*range(0, 40 * L, L)]
    with pytest.raises(IndexError):
        inputs[2]


@pytest.mark.parametrize(
    ("change", "horizon", "message"),
    [
        (lambda x: x, 0, "nothing is missing in .*a.csv: leave cells empty"),
        (lambda x: gaps(x[: L - 1], (0, 0)), 0, "has 5 rows, but the model needs 6"),
        (lambda x: gaps(x, (11, 2)), 2, "cells are missing in the last 4 rows of .*: fill them by Impute first"),
        (lambda x: x, L, "horizon 6 of Forecast leaves nothing known of windows of 6 steps: lower it"),
        (lambda x: x, L + 3, "horizon 9 of Forecast leaves nothing known"),
    ],
)
def test_files_that_do_not_suit(change, horizon, message, tmp_path: Path):
    path = table(tmp_path / "a.csv", change(rows(12)))
    with pytest.raises(ValueError, match=message):
        SeriesInputs(str(path), stand_in(), horizon)


def test_columns_text_several_series_and_no_file(tmp_path: Path):
    path = table(tmp_path / "a.csv", rows(12), ["a", "b", "z"])
    with pytest.raises(ValueError, match="'c'"):
        SeriesInputs(str(path), stand_in())
    path = table(tmp_path / "b.csv", rows(12))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], "1.0,two,3.0", *lines[5:]]))
    with pytest.raises(ValueError, match=r"row 5, column 'b' of .*b\.csv"):
        SeriesInputs(str(path), stand_in())
    module = stand_in()
    module.spec["columns"] = ["0", "1", "2"]
    np.save(tmp_path / "c.npy", rows(24).view(2, 12, D).numpy())
    with pytest.raises(ValueError, match="holds 2 series: give a file for each"):
        SeriesInputs(str(tmp_path / "c.npy"), module)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*d\.csv"):
        SeriesInputs(str(tmp_path / "d.csv"), stand_in())
    x = rows(12)
    x[3, 1] = -1.0
    with pytest.raises(ValueError, match="not positive"):
        SeriesInputs(str(table(tmp_path / "e.csv", gaps(x, (0, 0)))), stand_in(log=True))
