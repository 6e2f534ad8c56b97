from pathlib import Path

import numpy as np
import pytest

from datamodules import series_csv
from datamodules.series_files import choose, read_series
from tests.conftest import SHARED


def written(folder, text, name="mine.csv"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_csv_of_every_shape(tmp_path, delimiter, start, newline, last):
    rows = [["a", '"b c"', "d"], ["1", " 2.5 ", "-3e2"], ["4", "5", "6"]]
    text = start + newline.join(delimiter.join(row) for row in rows) + newline * last
    table = read_series(written(tmp_path, text))
    assert table.columns == ["a", "b c", "d"]
    assert table.values.tolist() == [[1, 2.5, -300], [4, 5, 6]]
    assert table.lengths.tolist() == [2]


def test_a_long_file_equals_numpys_reading(tmp_path):
    values = np.random.default_rng(0).normal(size=(3000, 4)).cumsum(0)
    path = tmp_path / "long.csv"
    np.savetxt(path, values, delimiter=",", header="a,b,c,d", comments="", fmt="%.17g")
    assert np.array_equal(read_series(path).values, values)
    assert np.array_equal(read_series(path, columns=["c", "a"]).values, values[:, [2, 0]])
    assert np.array_equal(read_series(path, drop=["b"]).values, values[:, [0, 2, 3]])
    table = read_series(path, rows_per_series=1000)
    assert table.lengths.tolist() == [1000] * 3


def test_many_blocks_of_a_file_are_joined(tmp_path, monkeypatch):
    from pyarrow import csv

    options = csv.ReadOptions
    monkeypatch.setattr(csv, "ReadOptions", lambda **given: options(**{**given, "block_size": 200}))
    text = "day,a\n" + "".join(f"2020-01-{i % 28 + 1:02},{i}\n" for i in range(500))
    assert read_series(written(tmp_path, text), drop=["day"]).values[:, 0].tolist() == list(range(500))
    with pytest.raises(ValueError, match=r"row 30 of .* does not grow"):
        read_series(written(tmp_path, text), time="day")


CELLS = "a,b\n1,2\n3,{}\n5,6\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (CELLS.format("x"), {}, r"row 3, column 'b' of .*mine.csv holds 'x', which is no number.*--data.drop '\[b\]'"),
        (CELLS.format("1_0"), {}, "row 3, column 'b' of .* holds '1_0'"),
        ("a;b\n1;2\n3;4,5\n", {}, "row 3, column 'b' of .* holds '4,5'.* decimals with a point"),
        (CELLS.format(""), {}, r"row 3, column 'b' of .* is missing \(''\).*--data.fill interpolate"),
        (CELLS.format("NaN"), {}, r"row 3, column 'b' of .* is missing \('NaN'\)"),
        (CELLS.format("inf"), {}, "row 3, column 'b' of .* is inf"),
        ("\n".join(["a,b", "", "1,2", "", "3,nan"]), {}, "row 5, column 'b'"),
        ("a\n1\n\n3\n", {}, "row 3, column 'a' of .* is missing"),
        ("date,b\n2020-01-01,2\n", {}, r"holds '2020-01-01'.*--data.drop '\[date\]'.*--data.time date"),
        ("a,b\n1,2\n3\n", {}, "row 3 of .* has 1 cells, but the header names 2 columns"),
        ("a,b\n1,2\n3,4,5\n", {}, "row 3 of .* has 3 cells"),
        ("", {}, "is empty"),
        ("\n1,2\n", {}, "begins with an empty row"),
        ("a,b\n", {}, "has a header but no rows"),
        ("a,b", {}, "has a header but no rows"),
        ("1,2\n3,4\n", {}, "first row of .* holds numbers"),
        ("a,,c\n1,2,3\n", {}, "column 2 of .* has no name"),
        ("a,b,a\n1,2,3\n", {}, "has 2 columns 'a'"),
        ("a,b\n1,2\n", {"columns": ["a", "bb"]}, "no column 'bb', only a, b; did you mean 'b'?"),
        ("a,b\n1,2\n", {"drop": ["date"]}, "no column 'date', only a, b"),
        ("a,b\n1,2\n", {"time": "t"}, "no column 't', only a, b"),
        ("a,b\n1,2\n", {"drop": ["a", "b"]}, "no column of mine.csv is left"),
        ("a,b\n1,2\n", {"columns": ["a", "a"]}, "columns names 'a' twice"),
        ("a,b\n1,2\n1,2\n1,2\n", {"rows_per_series": 2}, "rows_per_series 2 does not divide"),
        ("a,b\n1,x\n,2\n", {"series": "a", "columns": ["a"]}, "no column of mine.csv is left"),
        ("a,b\nx,1\n,2\n", {"series": "a"}, "column 'a' of .* has rows without a name of their series"),
        (CELLS.format("x"), {"fill": "interpolate"}, "row 3, column 'b' of .* holds 'x'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_by_row_and_column(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_series(written(tmp_path, text), **options)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_series(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="not read by its ending"):
        read_series(written(tmp_path, "a\n1\n", "mine.xlsx"))
    (tmp_path / "latin.csv").write_bytes("größe\n1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_series(tmp_path / "latin.csv")


def test_a_file_larger_than_memory_is_refused_before_reading(tmp_path, monkeypatch):
    known = tmp_path / "meminfo"
    known.write_text("MemTotal: 9 kB\nMemAvailable:          1 kB\n")
    monkeypatch.setattr(series_csv, "Path", lambda _: known)
    path = written(tmp_path, "a,b\n" + "1,2\n" * 1000)
    with pytest.raises(ValueError, match=r"takes about .* GiB.*save it as .npy"):
        series_csv.read_csv(path, ["a", "b"])
    assert len(series_csv.read_csv(written(tmp_path, "a,b\n" + "1,2\n" * 10), ["a", "b"]).values) == 10


@pytest.mark.parametrize(
    "times",
    [
        ["0", "1", "2", "3"],
        ["0.5", "1.0", "1.5", "2.0"],
        ["2020-02-27", "2020-02-28", "2020-02-29", "2020-03-01"],
        ["2020-01-01 00:00:00", "2020-01-01 00:10:00", "2020-01-01 00:20:00", "2020-01-01 00:30:00"],
        ["2020-01-01 00:00:00.000", "2020-01-01 00:00:00.015", "2020-01-01 00:00:00.031", "2020-01-01 00:00:00.046"],
        ["2020/01/01", "2020/01/02", "2020/01/03", "2020/01/04"],
        ["10:00:00", "10:00:10", "10:00:20", "10:00:30"],
        ["2020-01-01T00:00:00Z", "2020-01-01T01:00:00Z", "2020-01-01T02:00:00Z", "2020-01-01T03:00:00Z"],
    ],
)
def test_times_are_checked_and_left_out(tmp_path, times):
    def file(order):
        return written(tmp_path, "t,a\n" + "".join(f"{times[i]},{i}\n" for i in order))

    table = read_series(file([0, 1, 2, 3]), time="t")
    assert table.columns == ["a"]
    assert table.values[:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"row 4 of .*'t' does not grow.*--data.series"):
        read_series(file([0, 2, 1, 3]), time="t")
    with pytest.raises(ValueError, match=r"row 4 of .* grows by 2.* times the usual step.*--data.drop '\[t\]'"):
        read_series(file([0, 1, 3]), time="t")


@pytest.mark.parametrize(
    ("cells", "message"),
    [(["0", "", "2"], "row 3, column 't' of .* is missing"), (["a", "b", "c"], "not understood, e.g. 'a'")],
)
def test_times_that_are_none(tmp_path, cells, message):
    with pytest.raises(ValueError, match=message):
        read_series(written(tmp_path, "t,a\n" + "".join(f"{cell},1\n" for cell in cells)), time="t")


def test_rows_of_a_series_are_brought_together_and_timed_alone(tmp_path):
    text = "who,t,a\n" + "".join(f"{who},{t},{t}.{ord(who)}\n" for t in range(4) for who in "yx")
    table = read_series(written(tmp_path, text), series="who", time="t")
    assert table.columns == ["a"]
    assert table.lengths.tolist() == [4, 4]
    assert table.values[:, 0].tolist() == [t + ord(who) / 1000 for who in "yx" for t in range(4)]
    swapped = text.replace("x,2,", "x,9,").replace("x,3,", "x,2,")
    with pytest.raises(ValueError, match=r"row 9 of .* does not grow"):
        read_series(written(tmp_path, swapped), series="who", time="t")


def test_missing_cells_are_filled_within_each_series(tmp_path):
    cells = ["1", "", "4", "inf", "10", "", "", "20"]
    text = "who,a\n" + "".join(f"{'xy'[i // 4]},{cell}\n" for i, cell in enumerate(cells))
    with pytest.warns(UserWarning, match="4 missing or infinite cells of 8 are filled"):
        table = read_series(written(tmp_path, text), series="who", fill="interpolate")
    assert table.values[:, 0].tolist() == pytest.approx([1, 2.5, 4, 4, 10, 10 + 10 / 3, 10 + 20 / 3, 20])
    with pytest.warns(UserWarning, match="are filled"):
        table = read_series(written(tmp_path, text), series="who", fill="previous")
    assert table.values[:, 0].tolist() == [1, 1, 4, 4, 10, 10, 10, 20]
    text = "a,b\n,1\n2,1\n"
    with pytest.warns(match="filled"), pytest.raises(ValueError, match=r"column 'a' .* begins with a missing cell"):
        read_series(written(tmp_path, text), fill="previous")
    with pytest.warns(match="filled"), pytest.raises(ValueError, match=r"column 'b' .* no number at all in 2 rows"):
        read_series(written(tmp_path, "a,b\n1,\n2,\n"), fill="interpolate")


def test_arrays_stay_on_disk_and_keep_their_series(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 40, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    table = read_series(tmp_path / "x.npy", columns=["1", "2"])
    assert isinstance(table.values, np.memmap)
    assert table.lengths.tolist() == [40] * 3
    assert np.array_equal(table.values, values.reshape(-1, 4)[:, 1:3])
    assert np.array_equal(read_series(tmp_path / "x.npy", drop=["1"]).values, values.reshape(-1, 4)[:, [0, 2, 3]])
    np.savez(tmp_path / "x.npz", mine=values[0], columns=np.array(["a", "b", "c", "d"]))
    table = read_series(tmp_path / "x.npz", rows_per_series=20)
    assert table.columns == ["a", "b", "c", "d"]
    assert table.lengths.tolist() == [20, 20]
    np.save(tmp_path / "one.npy", np.arange(10))
    assert read_series(tmp_path / "one.npy").values.tolist() == [[i] for i in range(10)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((3, 2)), "b": np.zeros((3, 2))}, 'one named "x", but has a, b'),
        ({"x": np.zeros((3, 2, 2, 2))}, r"holds float64 of shape \(3, 2, 2, 2\)"),
        ({"x": np.array([["a", "b"]])}, "holds <U1"),
        ({"x": np.zeros((0, 2))}, r"of shape \(0, 2\)"),
        ({"x": np.array([[1, None]])}, "cannot read"),
        ({"x": np.zeros((3, 2)), "columns": np.array(["a"])}, "has 2 dimensions but the names a"),
        ({"x": np.array([[1.0, 2.0], [3.0, np.nan]])}, "row 1, column '1' of .* is missing or infinite"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path / "x.npz")


def test_arrays_have_no_columns_of_names(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"columns of .csv files"):
        read_series(tmp_path / "x.npy", series="who")
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*broken.npy"):
        read_series(tmp_path / "broken.npy")


def test_choosing_keeps_the_given_order():
    assert choose(["a", "b", "c"], ["c", "a"], ["a"], "x") == [2]
    assert choose(["a", "b", "c"], None, ["b"], "x") == [0, 2]


@pytest.mark.skipif(not (SHARED / "data/time_series").is_dir(), reason="needs the shared data")
def test_real_files():
    folder: Path = SHARED / "data/time_series"
    table = read_series(folder / "stock_data.csv")
    expected = np.loadtxt(folder / "stock_data.csv", delimiter=",", skiprows=1)
    assert np.array_equal(table.values, expected)
    assert table.columns == ["Open", "High", "Low", "Close", "Adj_Close", "Volume"]
    table = read_series(folder / "fmri_sim4.npz")
    assert table.values.shape == (10000, 50)
    assert table.lengths.tolist() == [200] * 50
    table = read_series(folder / "daphnet_S06R02E0.csv", drop=["is_anomaly"], time="timestamp")
    assert table.values.shape == (7040, 9)
