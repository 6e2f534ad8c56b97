import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import SeriesDataModule
from datamodules.base import SPLITS
from datamodules.scaling import KINDS, Scaling
from datamodules.series_splits import WHOLE, Runs, split_series
from tests.conftest import SHARED

needs_real = pytest.mark.skipif(not (SHARED / "data/time_series").is_dir(), reason="needs the shared data")
NOTHING: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0}


@pytest.fixture
def walk(tmp_path):
    """A file of 400 rows and 3 dimensions whose first tells the row."""
    values = np.random.default_rng(0).standard_normal((400, 3)).cumsum(0)
    values[:, 0] = np.arange(400)
    np.save(tmp_path / "walk.npy", values)
    return str(tmp_path / "walk.npy"), values


def everything(data, split):
    return data.originals(split, torch.arange(data.count(split))).numpy()


# Splits.


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=14),
    length=st.integers(2, 12),
    blocks=st.integers(1, 4),
    val=st.floats(0.01, 0.4),
    test=st.floats(0.01, 0.4),
    stride=st.integers(1, 5),
)
def test_no_row_is_in_windows_of_two_splits_and_gaps_are_a_window_less_one(lengths, length, blocks, val, test, stride):
    rows = np.array(lengths)
    whole = Runs(np.cumsum(rows) - rows, rows)
    owner = np.repeat(np.arange(len(rows)), rows)
    try:
        runs = split_series(whole, length, val, test, blocks)
    except ValueError as error:
        assert "too short" in str(error) or "leaves none" in str(error)  # noqa: PT017
        return
    split_of = np.full(rows.sum(), -1)
    for number, split in enumerate(SPLITS):
        for first, count in zip(*runs[split], strict=True):
            assert (split_of[first : first + count] == -1).all()
            split_of[first : first + count] = number
            assert len(set(owner[first : first + count])) == 1
    if len(rows) >= WHOLE and blocks == 1:
        assert (split_of >= 0).all()
        assert all(len(set(split_of[owner == series])) == 1 for series in range(len(rows)))
        return
    assert all(runs[split].counts(length, stride).min() >= 1 for split in SPLITS)
    for series in range(len(rows)):
        own = split_of[owner == series]
        used = np.flatnonzero(own >= 0)
        changes = np.flatnonzero(own[used][1:] != own[used][:-1])
        assert (used[changes + 1] - used[changes] == length).all()  # length - 1 rows lie between
        assert (own == -1).sum() == (3 * blocks - 1) * (length - 1)
        assert own[0] == 0
        assert own[-1] == 2


def test_fractions_are_shares_of_rows_or_of_series():
    runs = split_series(Runs(np.array([0]), np.array([10000])), 24, 0.1, 0.2, 1)
    assert [int(runs[split].rows.sum()) for split in SPLITS] == [10000 - 3000 - 46, 1000, 2000]
    runs = split_series(Runs(np.arange(0, 2000, 20), np.full(100, 20)), 5, 0.1, 0.2, 1)
    assert [len(runs[split].first) for split in SPLITS] == [70, 10, 20]


def test_blocks_hold_out_the_end_of_every_piece(walk):
    path, _ = walk
    data = SeriesDataModule(path=path, length=5, blocks=4)
    for split, begin in (("train", 0), ("val", 72), ("test", 86)):
        times = np.unique(everything(data, split)[..., 0])
        assert {int(time) // 100 for time in times} == {0, 1, 2, 3}
        assert (times % 100 >= begin).all()


# Windows.


@pytest.mark.parametrize("stride", [1, 3, 9])
@pytest.mark.parametrize("length", [2, 7])
def test_windows_equal_slices(walk, stride, length):
    path, values = walk
    with pytest.warns(UserWarning, match="nothing is held out"):
        data = SeriesDataModule(path=path, length=length, stride=stride, rows_per_series=100, **NOTHING)
    expected = [values[s + i : s + i + length] for s in range(0, 400, 100) for i in range(0, 101 - length, stride)]
    for split in SPLITS:
        assert np.array_equal(everything(data, split), np.stack(expected))
    index = torch.tensor([5, 0, len(expected) - 1])
    x = data.fetch("train", index, 0)["x"]
    assert x.dtype == torch.float32
    scaling = Scaling(data.spec["scaling"])
    np.testing.assert_allclose(scaling.unscale(x).numpy(), np.stack([expected[i] for i in index]), atol=1e-4)


def test_loaders_serve_each_window_once(walk):
    data = SeriesDataModule(path=walk[0], length=5, blocks=2, batch_size=32)
    data.setup()
    index = torch.cat([batch["index"] for batch in data.train_dataloader()])
    assert len(index.unique()) == len(index) > data.count("train") - 32
    index = torch.cat([batch["index"] for batch in data.eval_loader("test")])
    assert torch.equal(index, torch.arange(data.count("test")))
    batch = data.examples("val", 3)
    assert batch["x"].shape == (3, 5, 3)
    assert torch.equal(batch["x"], data.fetch("val", batch["index"], None)["x"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log", [False, ["1"]])
def test_the_scaling_sees_training_windows_only(tmp_path, kind, log):
    values = np.exp(0.05 * np.random.default_rng(0).standard_normal((500, 2)).cumsum(0))
    changed = values.copy()
    changed[-110:] *= 50.0
    specs = []
    for name, array in (("a", values), ("b", changed)):
        np.save(tmp_path / f"{name}.npy", array)
        data = SeriesDataModule(path=str(tmp_path / f"{name}.npy"), length=8, scaling=kind, log=log)
        specs.append(data.spec)
        x = data.fetch("train", torch.arange(data.count("train")), None)["x"]
        assert x.shape[1:] == tuple(data.spec["shape"]) == (8 + (2 if kind == "window" else 0), 2)
        assert data.spec["sigma_data"] == pytest.approx(x.double().std(correction=0).item(), rel=1e-6)
        train = everything(data, "train")
        assert data.spec["scaling"]["low"] == train.min((0, 1)).tolist()
        assert data.spec["scaling"]["high"] == train.max((0, 1)).tolist()
        back = data.scaling.unscale(data.fetch("test", torch.arange(5), None)["x"])
        np.testing.assert_allclose(back.numpy(), everything(data, "test")[:5], rtol=1e-4)
    assert specs[0] == specs[1]
    assert specs[0]["scaling"]["log"] == [False, log is not False]


@pytest.mark.parametrize("kind", KINDS)
def test_the_spec_survives_a_safe_checkpoint(walk, kind):
    spec = SeriesDataModule(path=walk[0], length=5, scaling=kind).spec
    file = io.BytesIO()
    torch.save({"spec": spec}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["spec"] == spec
    assert spec["kind"] == "series"
    assert spec["length"] == 5
    assert spec["columns"] == ["0", "1", "2"]
    assert spec["classes"] == 0


# Generated sets.


def test_sines_are_themselves_in_model_space():
    data = SeriesDataModule(windows=300, dims=2, val_fraction=0.2, test_fraction=0.1)
    assert [data.count(split) for split in SPLITS] == [300, 60, 30]
    assert data.spec["shape"] == [24, 2]
    for split in SPLITS:
        x = data.fetch(split, torch.arange(30), None)["x"]
        np.testing.assert_allclose(x.numpy(), everything(data, split)[:30], atol=1e-7)
        torch.testing.assert_close(data.scaling.unit(x), (x.double() + 1) / 2)
    starts = np.concatenate([everything(data, split)[:, 0] for split in SPLITS])
    assert len(np.unique(starts, axis=0)) == 390
    more = SeriesDataModule(windows=300, dims=2, columns=["sine_1"], val_fraction=0.1, test_fraction=0.1)
    assert np.array_equal(everything(more, "train"), everything(data, "train")[..., 1:])


def test_generated_sets_without_held_out_windows():
    with pytest.warns(UserWarning, match="memorises scores best"):
        data = SeriesDataModule(windows=50, **NOTHING)
    assert all(np.array_equal(everything(data, split), everything(data, "train")) for split in SPLITS)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_sets_take_every_scaling(kind):
    data = SeriesDataModule(windows=200, scaling=kind)
    x = data.fetch("train", torch.arange(200), None)["x"]
    np.testing.assert_allclose(data.scaling.unscale(x).numpy(), everything(data, "train"), atol=1e-5)


def test_daily_quotes():
    pytest.importorskip("arch")
    data = SeriesDataModule("sp500", drop=["Adj Close"], blocks=5, log=["Volume"])
    assert data.columns == ["Open", "High", "Low", "Close", "Volume"]
    assert data.spec["scaling"]["log"] == [False] * 4 + [True]


def test_hopper():
    pytest.importorskip("dm_control")
    data = SeriesDataModule("mujoco", windows=20, length=6)
    assert data.spec["shape"] == [6, 14]
    assert [data.count(split) for split in SPLITS] == [20, 2, 2]


# What is said.


def test_a_constant_column_is_kept_and_said_once(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([np.arange(100.0), np.full(100, 7.0)], axis=1))
    with pytest.warns(UserWarning, match=r"constant in training, and always generated so: '1' \(7\)") as said:
        data = SeriesDataModule(path=str(tmp_path / "x.npy"), length=5)
    assert len(said) == 1
    x = data.fetch("train", torch.arange(4), None)["x"]
    assert (x[..., 1] == 0).all()
    assert (data.scaling.unscale(torch.randn(2, 5, 2))[..., 1] == 7).all()


def test_short_series_are_left_out_and_said(tmp_path):
    rows = [f"{who},{i}" for who, count in (("a", 90), ("b", 4), ("c", 80)) for i in range(count)]
    (tmp_path / "x.csv").write_text("who,v\n" + "\n".join(rows))
    with pytest.warns(UserWarning, match="1 of 3 series have less than 5 rows"):
        data = SeriesDataModule(path=str(tmp_path / "x.csv"), series="who", length=5)
    assert data.count("train") == (90 - 9 - 9 - 8 - 4) + (80 - 8 - 8 - 8 - 4)


def test_one_dimension_is_enough(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(100.0))
    data = SeriesDataModule(path=str(tmp_path / "x.npy"), length=5)
    assert data.spec["shape"] == [5, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length must be at least 2"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"val_fraction": 0.0}, "must be above 0"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "sum to less than 1"),
        ({"dataset": "energy"}, "no dataset 'energy': choose one of sines, mujoco, nasdaq, sp500"),
        ({"scaling": "robust", "windows": 5}, "no scaling 'robust'"),
        ({"columns": ["sine_9"], "windows": 5}, "sines has no column 'sine_9'.*did you mean"),
        ({"log": ["v"], "windows": 5}, "sines has no column 'v'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SeriesDataModule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 401}, "window takes 401 rows, but .* has 1 series of at most 400 rows"),
        (
            {"length": 24, "blocks": 8},
            r"piece of 50 rows \(a series of 400 in 8 blocks\) is too short .*both fractions",
        ),
        ({"length": 101, "rows_per_series": 100}, "4 series of at most 100 rows"),
        ({"log": True}, "logarithm of column '0' is asked for, but its smallest value is 0"),
        ({"rows_per_series": 20, "length": 5, "val_fraction": 0.5, "test_fraction": 0.49}, "leaves none"),
    ],
)
def test_files_that_do_not_suit(walk, options, message):
    with pytest.raises(ValueError, match=message):
        SeriesDataModule(path=walk[0], **options)


def test_sets_that_do_not_fit_into_memory_say_so(monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr("datamodules.series_sources.generate", full)
    with pytest.raises(ValueError, match="1,200,000 windows of sines do not fit into memory: lower windows"):
        SeriesDataModule(windows=1_000_000)


@pytest.mark.parametrize(("windows", "numbers", "expected"), [(50, 1 << 22, 50), (50, 200, 20), (50, 3, 1)])
def test_the_spread_looks_at_so_many_numbers_at_most(monkeypatch, windows, numbers, expected):
    """Evenly spaced windows, of 10 numbers each; one at least."""
    monkeypatch.setattr("datamodules.series._NUMBERS", numbers)
    seen, whole = [], SeriesDataModule.originals

    def originals(self, split, index):
        seen.append(index)
        return whole(self, split, index)

    monkeypatch.setattr(SeriesDataModule, "originals", originals)
    data = SeriesDataModule(windows=windows, length=5, dims=2)
    (index,) = seen
    assert len(index) == expected
    assert index[0] == 0
    if expected > 1:
        assert index[-1] == windows - 1
        gaps = index.diff()
        assert gaps.max() - gaps.min() <= 1
    x = data.fetch("train", index, None)["x"].double()
    assert data.spec["sigma_data"] == pytest.approx(x.std(correction=0).item(), rel=1e-6)


def test_held_out_is_whether_splits_differ(walk):
    with pytest.warns(UserWarning, match="nothing is held out"):
        assert not SeriesDataModule(windows=50, **NOTHING).held_out
    with pytest.warns(UserWarning, match="nothing is held out"):
        assert not SeriesDataModule(path=walk[0], length=5, **NOTHING).held_out
    for data in (SeriesDataModule(windows=50), SeriesDataModule(path=walk[0], length=5)):
        assert data.held_out
        assert not np.array_equal(everything(data, "test")[:5], everything(data, "train")[:5])


# Real files.


@needs_real
def test_stocks():
    path = str(SHARED / "data/time_series/stock_data.csv")
    with pytest.warns(UserWarning, match="nothing is held out"):
        data = SeriesDataModule(path=path, **NOTHING)
    assert [data.count(split) for split in SPLITS] == [3662] * 3
    values = np.loadtxt(path, delimiter=",", skiprows=1)
    unit = (values - values.min(0)) / (values.max(0) - values.min(0))
    x = data.fetch("train", torch.arange(3662), None)["x"]
    np.testing.assert_allclose(
        x[[0, 1000, 3661]].numpy(), [2 * unit[i : i + 24] - 1 for i in (0, 1000, 3661)], atol=1e-6
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SeriesDataModule(path=path, blocks=10).count("train") > 2000


@needs_real
def test_subjects_are_not_crossed():
    path = str(SHARED / "data/time_series/fmri_sim1.npz")
    with pytest.warns(UserWarning, match="nothing is held out"):
        data = SeriesDataModule(path=path, **NOTHING)
    assert data.count("train") == 50 * 177 == 8850
    values = np.load(path)["ts"].reshape(50, 200, 5)
    windows = everything(data, "train").reshape(50, 177, 24, 5)
    assert np.array_equal(windows[7, 176], values[7, 176:])
    assert np.array_equal(windows[8, 0], values[8, :24])
    held = SeriesDataModule(path=path)
    assert [held.count(split) // 177 for split in SPLITS] == [40, 5, 5]
    cut = SeriesDataModule(path=path, blocks=2, length=10)
    assert [cut.count(split) for split in SPLITS] == [50 * (100 - 20 - 27 - 9) + 50 * (100 - 20 - 18 - 9), 100, 100]
