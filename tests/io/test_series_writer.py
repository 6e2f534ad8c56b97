import warnings
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from datamodules.scaling import Scaling
from lightning_sgm.io.series import SeriesWriter
from lightning_sgm.io.series_figures import (
    Dimension,
    autocorrelation_figure,
    completions_figure,
    correlations_figure,
    values_figure,
    windows_figure,
)
from lightning_sgm.io.writers import writer_for

VIEWS = ("windows", "values", "correlations", "autocorrelation")
NAMES = ["price", "volume", "rate"]


def windows(count=9, length=8, seed=0):
    """In original units: a price, a volume over magnitudes, and a small rate far from 0."""
    rng = np.random.default_rng(seed)
    price = 100 + rng.normal(size=(count, length)).cumsum(1)
    volume = np.exp(10 + 2 * rng.normal(size=(count, length)))
    rate = 5000 + 1e-3 * rng.normal(size=(count, length))
    return np.stack([price, volume, rate], axis=2)


def writer_of(values, kind="minmax", log=(False, True, False), columns=NAMES):
    scaling = Scaling.fit(values, kind, list(log))
    return SeriesWriter(columns, scaling.spec, values.shape[1]), scaling


def read(path):
    """{column: values} of a table."""
    return {name: column.to_numpy() for name, column in zip(*columns_of(pyarrow.csv.read_csv(path)), strict=True)}


def columns_of(table):
    return table.column_names, table.columns


def check_picture(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
        assert image.format == "PNG"
    assert 300 < pixels.shape[0] < 1500
    assert 300 < pixels.shape[1] < 2500
    assert 0.01 < (pixels < 250).mean() < 0.6  # neither empty nor black


@pytest.mark.parametrize("kind", ["minmax", "standard", "quantile", "window"])
def test_tables_and_arrays_hold_what_the_model_said_in_original_units(tmp_path, kind):
    values = windows()
    writer, scaling = writer_of(values, kind)
    x = scaling.scale(torch.from_numpy(values)).float()
    table, arrays, picture = writer.save({"x": x}, tmp_path / "a_0.5")
    assert [file.name for file in (table, arrays, picture)] == ["a_0.5.csv", "a_0.5.npz", "a_0.5.png"]
    with np.load(arrays, allow_pickle=False) as found:
        assert sorted(found) == ["columns", "x"]
        assert found["columns"].tolist() == NAMES
        exact = found["x"]
    assert exact.dtype == np.float64
    assert np.array_equal(exact, scaling.unscale(x).numpy())
    rows = read(table)
    assert list(rows) == ["window", "step", *NAMES]
    assert rows["window"].tolist() == np.repeat(np.arange(9), 8).tolist()
    assert rows["step"].tolist() == list(range(8)) * 9
    written = np.stack([rows[name] for name in NAMES], axis=1).reshape(9, 8, 3)
    spans = values.max((0, 1)) - values.min((0, 1))
    assert (np.abs(written - exact) <= 1e-9 * np.minimum(spans, np.abs(exact))).all()
    again = scaling.scale(torch.from_numpy(written)).float()
    assert torch.allclose(again, x, rtol=1e-6, atol=2e-6)
    check_picture(picture)


def test_numbers_in_tables_have_no_noise_in_their_last_digits(tmp_path):
    values = np.array([0.1, 12.5, 7.0]).reshape(1, 3, 1)
    writer = SeriesWriter(["a"], {"kind": "minmax", "log": [False], "low": [0.1], "high": [12.5]}, 3)
    x = writer.scaling.scale(torch.from_numpy(values))
    table, *_ = writer.save({"x": x, "index": torch.tensor([41])}, tmp_path / "s")
    assert table.read_text() == "window,step,a\n41,0,0.1\n41,1,12.5\n41,2,7\n"


def test_parts_of_batches_and_processes_are_joined_in_order(tmp_path):
    values = windows(7)
    writer, scaling = writer_of(values)
    x = scaling.scale(torch.from_numpy(values)).float()
    files: dict[int, Path] = {}
    for rows in ([4, 1], [0, 2, 6], [5, 3]):
        index = torch.tensor(rows)
        batch = {"x": x[index], "index": index + 10}
        files |= dict(zip(rows, writer.save_each(batch, tmp_path), strict=True))
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["000010.npz", "000011.npz", "000013.npz"]
    table, arrays, picture = writer.collect([files[i] for i in range(7)], tmp_path / "samples")
    assert read(table)["window"].tolist() == np.repeat(np.arange(10, 17), 8).tolist()
    with np.load(arrays, allow_pickle=False) as found:
        assert np.array_equal(found["x"], scaling.unscale(x).numpy())
    check_picture(picture)


def completions(scaling, values, samples=6):
    """Two windows, numbers 30 and 20, whose second half and one earlier price were not known; mixed samples."""
    x = scaling.scale(torch.from_numpy(values[:2])).float()
    known = torch.ones_like(x, dtype=torch.bool)
    known[:, 4:] = False
    known[:, 1, 0] = False
    group = torch.tensor([0, 1]).repeat(samples)
    noise = 0.1 * torch.randn(len(group), *x.shape[1:], generator=torch.Generator().manual_seed(0))
    before = torch.where(known, x, torch.nan)[group]
    return {
        "x": x[group] + noise,  # also where something was known: that is put in
        "before": before,
        "truth": x[group],
        "group": 30 - 10 * group,
        "index": torch.arange(len(group)),
    }


@pytest.mark.parametrize("samples", [1, 6])
def test_completed_windows_say_what_was_known(tmp_path, samples):
    values = windows()
    writer, scaling = writer_of(values)
    batch = completions(scaling, values, samples)
    files = dict.fromkeys(
        file for half in (0, 1) for file in writer.save_each({k: v[half::2] for k, v in batch.items()}, tmp_path)
    )
    table, arrays, picture = writer.collect(list(files), tmp_path / "samples")
    rows = read(table)
    assert list(rows) == ["window", "sample", "step", *NAMES, *(f"{name}_known" for name in NAMES)]
    assert rows["window"].tolist() == np.repeat([20, 30], 8 * samples).tolist()
    assert rows["sample"].tolist() == np.repeat(np.tile(np.arange(samples), 2), 8).tolist()
    assert rows["price_known"][:8].tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    assert rows["rate_known"][:8].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    with np.load(arrays, allow_pickle=False) as found:
        assert sorted(found) == ["columns", "known", "truth", "window", "x"]
        known, order = found["known"], [*range(1, 2 * samples, 2), *range(0, 2 * samples, 2)]
        assert np.array_equal(known, ~batch["before"].isnan().numpy()[order])
        assert np.array_equal(found["truth"], scaling.unscale(batch["truth"])[order].numpy())
        assert np.array_equal(found["x"][known], found["truth"][known])
        assert np.array_equal(found["x"][~known], scaling.unscale(batch["x"])[order].numpy()[~known])
    assert np.allclose(rows["price"].reshape(-1, 8)[:, 0], values[[1] * samples + [0] * samples, 0, 0], rtol=1e-6)
    check_picture(picture)
    assert writer.save(batch, tmp_path / "direct")[0].read_text() == table.read_text()


def test_every_sample_completes_its_own_window_without_groups(tmp_path):
    values = windows()
    writer, scaling = writer_of(values)
    batch = {name: value for name, value in completions(scaling, values, 1).items() if name in ("x", "before")}
    table, arrays, _ = writer.save(batch, tmp_path / "s")
    assert read(table)["window"].tolist() == [0] * 8 + [1] * 8
    with np.load(arrays) as found:
        assert sorted(found) == ["columns", "known", "window", "x"]


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_pictures_only_also_of_one_dimension_without_real_windows(tmp_path, view):
    values = windows(40)[:, :, :1]
    writer, scaling = writer_of(values, log=[False], columns=["price"])
    (picture,) = writer.save({"x": scaling.scale(torch.from_numpy(values)), "view": view}, tmp_path / "p")
    assert picture == tmp_path / "p.png"
    check_picture(picture)


@pytest.mark.parametrize("view", VIEWS)
def test_broken_samples_and_constants_can_be_looked_at(tmp_path, view):
    values = windows(30)
    values[:, :, 0] = 3.0
    writer, scaling = writer_of(values, columns=["US$", "$x$", "_"])  # no formulas
    real = scaling.scale(torch.from_numpy(values)).float()
    x = real.clone()
    x[0], x[1, 2], x[2, 0, -1] = torch.nan, torch.inf, 1e30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in ({"x": x, "real": real}, {"x": torch.full_like(x, torch.nan)}):
            check_picture(writer.save({**batch, "view": view}, tmp_path / "p")[0])


def test_broken_samples_and_constants_are_written(tmp_path):
    values = np.stack([np.full((4, 3), 0.3), np.arange(12.0).reshape(4, 3)], axis=2)
    writer, scaling = writer_of(values, log=[False, False], columns=["same", "b"])
    x = scaling.scale(torch.from_numpy(values)).float()
    x[0, 0], x[0, 1] = torch.nan, torch.inf
    table, arrays, _ = writer.save({"x": x}, tmp_path / "s")
    rows = read(table)
    assert rows["same"].tolist() == [0.3] * 12
    assert np.isnan(rows["b"][0])
    assert rows["b"][1] == np.inf
    assert rows["b"][2:] == pytest.approx(np.arange(2.0, 12.0), abs=1e-6)
    with np.load(arrays) as found:
        assert np.isnan(found["x"][0, 0, 1])


def test_windows_of_the_kind_window_cannot_be_completed_but_said_so(tmp_path):
    values = windows()
    writer, scaling = writer_of(values, "window")
    x = scaling.scale(torch.from_numpy(values)).float()
    with pytest.raises(ValueError, match=r"10 rows for 8 steps.*minmax"):
        writer.save({"x": x, "before": x}, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_names_that_tables_need_themselves_stay_the_series_own(tmp_path):
    values = windows()
    writer, scaling = writer_of(values, columns=["step", "a,b", "window"])
    table, *_ = writer.save({"x": scaling.scale(torch.from_numpy(values))}, tmp_path / "s")
    assert list(read(table)) == ["window_", "step_", "step", "a,b", "window"]


def test_pictures_in_tensorboard(tmp_path):
    values = windows()
    writer, scaling = writer_of(values)
    x = scaling.scale(torch.from_numpy(values)).float()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    batches = {"samples": {"x": x, "real": x}, "values": {"x": x, "view": "values"}}
    batches["completed"] = completions(scaling, values)
    for tag, batch in batches.items():
        writer.log(logger, tag, batch, 7)
        writer.log(CSVLogger(str(tmp_path)), tag, batch, 7)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in batches:
        (event,) = events.Images(tag)
        assert event.step == 7
        assert event.width > 300


def test_the_specification_chooses_the_writer_and_misuse_is_named(tmp_path):
    scaling = {"kind": "minmax", "log": [False], "low": [0.0], "high": [2.0]}
    spec = {"kind": "series", "shape": [4, 1], "length": 4, "columns": ["a"], "scaling": scaling}
    writer = writer_for(spec)
    assert isinstance(writer, SeriesWriter)
    with pytest.raises(ValueError, match=r"\(B, steps, 1\).*\(2, 4, 3\)"):
        writer.save({"x": torch.zeros(2, 4, 3)}, tmp_path / "s")
    with pytest.raises(ValueError, match=r"4 steps.*\(2, 5, 1\)"):
        writer.save({"x": torch.zeros(2, 5, 1)}, tmp_path / "s")
    with pytest.raises(ValueError, match=r"no view 'smell'.*autocorrelation"):
        writer.save({"x": torch.zeros(2, 4, 1), "view": "smell"}, tmp_path / "s")
    with pytest.raises(ValueError, match=r"2 columns.*1"):
        SeriesWriter(["a", "b"], scaling, 4)


# What pictures show.

PLAIN = [Dimension("a", -3.0, 3.0), Dimension("b", -3.0, 3.0), Dimension("c", -3.0, 3.0)]


def noise(count=200, length=10, dims=3, seed=0):
    return np.random.default_rng(seed).normal(size=(count, length, dims))


def test_real_and_generated_windows_have_one_height_and_the_first_are_drawn():
    generated, real = noise(), noise(seed=1) * 0.5
    figure = windows_figure(PLAIN, generated, real)
    left, right = figure.axes[2:4]
    assert (left.get_title(), right.get_title()) == ("b, real", "b, generated")
    assert left.get_ylim() == right.get_ylim()
    assert len(right.lines) == 24
    assert np.array_equal(right.lines[3].get_ydata(), generated[3, :, 1])
    assert np.array_equal(left.lines[3].get_ydata(), real[3, :, 1])


def test_an_exploded_window_does_not_flatten_the_others():
    generated = noise()
    generated[0] = 1e6
    low, high = windows_figure(PLAIN, generated).axes[0].get_ylim()
    assert -7 < low < -2
    assert 2 < high < 7


def test_of_many_dimensions_some_are_shown_and_it_is_said():
    many = [Dimension(str(i), -3.0, 3.0) for i in range(17)]
    figure = windows_figure(many, noise(dims=17))
    assert [axes.get_title() for axes in figure.axes] == [str(i) for i in range(0, 17, 2)]
    assert figure.get_suptitle() == "windows (9 of 17 dimensions)"


def test_shares_of_values_and_what_is_outside():
    real = noise(1000)
    generated = real.copy()
    generated[:100, :, 1] = 50.0
    figure = values_figure(PLAIN, generated, real)
    ends = figure.axes[1].get_xlim()
    outside = 0.1 + ((generated[100:, :, 1] < ends[0]) | (generated[100:, :, 1] > ends[1])).sum() / 10000
    assert [axes.get_title() for axes in figure.axes] == ["a", f"b\noutside: generated {outside:.1%}", "c"]
    filled, line = (patch.get_data() for patch in figure.axes[0].patches)
    assert np.array_equal(filled.values, line.values)
    expected = np.histogram(real[..., 0], filled.edges)[0] / 10000
    assert filled.values == pytest.approx(expected)
    assert 0.99 < filled.values.sum() <= 1


def test_logarithmic_dimensions_have_logarithmic_axes():
    dimensions = [Dimension("v", 1e-2, 1e4, log=True)]
    values = np.exp(np.random.default_rng(0).uniform(np.log(1e-2), np.log(1e4), (500, 4, 1)))
    axes = values_figure(dimensions, values).axes[0]
    assert axes.get_xscale() == "log"
    shares = axes.patches[0].get_data().values[3:-3]
    assert shares == pytest.approx(np.full(len(shares), 1 / 56), rel=0.6)  # uniform on that axis
    assert windows_figure(dimensions, values).axes[0].get_yscale() == "log"


def test_the_pairs_that_differ_most_come_first_with_their_distance():
    real = noise(400, dims=7)
    generated = noise(400, dims=7, seed=1)
    generated[..., 4] = generated[..., 1] + 1e-9 * generated[..., 4]  # correlation 1
    figure = correlations_figure([Dimension(str(i), -3.0, 3.0) for i in range(7)], generated, real)
    assert len([axes for axes in figure.axes if axes.get_title()]) == 15
    name, distance = figure.axes[0].get_title().split("\ndistance ")
    assert name == "4 – 1"
    wasserstein = 1 - np.mean([np.corrcoef(window[:, 4], window[:, 1])[0, 1] for window in real])
    assert float(distance) == pytest.approx(wasserstein, abs=2 / 60)
    assert figure.get_suptitle() == "correlations within windows (15 of 21 pairs, the furthest)"
    shares = figure.axes[0].patches[1].get_data().values
    assert shares.tolist() == [0.0] * 59 + [1.0]


def test_mean_autocorrelations_are_those_of_finite_windows():
    values = noise(6, 9)
    values[4, 0, 1], values[5, 2, 1] = np.nan, 1e300
    axes = autocorrelation_figure(PLAIN, values, noise(5, 9, seed=1)).axes[1]
    rows = []
    for window in values[:4, :, 1]:
        centred = window - window.mean()
        rows.append([(centred[: 9 - lag] * centred[lag:]).sum() / (centred**2).sum() for lag in range(1, 9)])
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["generated"].get_xdata().tolist() == list(range(1, 9))
    assert lines["generated"].get_ydata() == pytest.approx(np.mean(rows, axis=0), abs=1e-12)


def test_completions_are_drawn_where_something_was_missing():
    truth = noise(1, 12)
    known = np.ones((1, 12, 3), dtype=bool)
    known[0, 5:8, 1] = False
    samples = np.where(known[0], truth, truth + noise(9, 12, seed=1))
    figure = completions_figure(PLAIN, [samples], known, truth, ["window 0"])
    (axes,) = figure.axes  # the one dimension with something to complete
    assert axes.get_title() == "b"
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert set(lines) == {"median", "truth", "known"}
    drawn = np.isfinite(lines["median"])
    assert np.flatnonzero(drawn).tolist() == [4, 5, 6, 7, 8]
    assert lines["median"][drawn] == pytest.approx(np.median(samples[:, 4:9, 1], axis=0))
    assert lines["truth"][drawn] == pytest.approx(truth[0, 4:9, 1])
    assert np.flatnonzero(np.isnan(lines["known"])).tolist() == [5, 6, 7]
    few = completions_figure(PLAIN, [samples[:3]], known, None, ["window 0"]).axes[0]
    assert len(few.lines) == 4  # three completions, and what was known
    assert few.lines[1].get_ydata()[5:8] == pytest.approx(samples[1, 5:8, 1])


def test_completions_that_are_not_finite_are_left_out_of_the_band():
    truth = noise(1, 6)
    known = np.zeros((1, 6, 3), dtype=bool)
    samples = noise(7, 6, seed=1)
    samples[0], samples[1, 3] = np.nan, np.inf
    axes = completions_figure(PLAIN, [samples], known, truth, ["window 0"]).axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx(np.median(samples[2:, :, 0], axis=0))
    completions_figure(PLAIN, [samples[:2]], known, truth, ["window 0"])
