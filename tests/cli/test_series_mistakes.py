"""Mistakes with series and parts of their models: one line that names the thing, and nothing half-written."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.test_restoration_mistakes import check_fit, said
from tests.conftest import TINY
from tests.io.test_released_pad_ts import authors_file
from tests.io.test_released_pad_ts import table as write_table
from tests.methods.series_models import L, rows, table

FIT = ("fit", "--config", "pad_ts", *TINY["pad_ts"], f"--data.length={L}")
FINE = ("fit", "--config", "pad_ts_fine", *TINY["pad_ts_fine"], f"--data.length={L}")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Files of series, right and wrong ones."""
    x = rows(80)
    text = table(tmp_path / "good.csv", x).read_text().splitlines()
    dated = [f"day,{text[0]}", *(f"2026-01-{i + 1:02},{line}" for i, line in enumerate(text[1:29]))]
    contents = {
        "hole.csv": [*text[:7], text[7].rpartition(",")[0] + ",", *text[8:]],
        "nan.csv": [*text[:7], "nan" + text[7][text[7].index(",") :], *text[8:]],
        "text.csv": [*text[:12], text[12].rpartition(",")[0] + ",n/k", *text[13:]],
        "short.csv": text[:L],
        "few.csv": text[: L + 4],
        "uneven.csv": dated[:9] + dated[10:],
        "empty.csv": text[:1],
    }
    for name, lines in contents.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    constant = x.clone()
    constant[:, 1] = 4.25
    table(tmp_path / "constant.csv", constant)
    constant[:] = 1.0
    table(tmp_path / "still.csv", constant)
    table(tmp_path / "one.csv", x[:, :1])
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 not an archive")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.path=hole.csv", ("row 8, column 'c' of hole.csv is missing", "--data.fill interpolate")),
        ("--data.path=nan.csv", ("row 8, column 'a' of nan.csv", "--data.fill interpolate")),
        ("--data.path=text.csv", ("row 13", "'c'", "n/k")),
        ("--data.path=short.csv", ("a window takes 6 rows", "short.csv", "5 rows", "lower length")),
        ("--data.path=few.csv", ("9 rows", "too short", "a shorter length")),
        ("--data.path=empty.csv", ("empty.csv",)),
        ("--data.path=uneven.csv --data.time=day", ("uneven.csv", "row 10", "day")),
        ("--data.path=good.csv --data.columns=[a,bb]", ("good.csv has no column 'bb', only a, b, c", "'b'")),
        ("--data.path=good.csv --data.drop=[day]", ("good.csv has no column 'day'",)),
        ("--data.path=good.csv --data.time=day", ("good.csv has no column 'day'",)),
        ("--data.path=good.csv --data.log=[d]", ("good.csv has no column 'd'",)),
        ("--data.path=gone.csv", ("there is no file gone.csv",)),
        ("--data.path=damaged.npz", ("cannot read damaged.npz",)),
        ("--data.path=good.csv --data.length=1", ("length must be at least 2, got 1",)),
        ("--data.path=good.csv --data.length=100", ("a window takes 100 rows", "80 rows", "lower length")),
        ("--model.sampler.steps=2000", ("chain of 250", "at most 250 steps")),
        ("--data.windows=1000000000000", ("windows of sines do not fit into memory", "lower windows")),
    ],
)
def test_series_that_cannot_be_trained_on(cli: Any, files: Path, arguments: str, words: tuple[str, ...]):
    check_fit(cli(*FIT, *arguments.split()), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.path=still.csv", ("not all the same", "look at the data")),
        ("--model.preconditioning.label=index", ("the label index needs a discrete chain, and EDM is none",)),
        ("--model.objective.times=ChainTimes", ("ChainTimes", "EDM is none")),
        ("--model.objective.weight=NoiseWeight", ("NoiseWeight squares the error of noise", "choose")),
        ("--data.path=one.csv", ("fdds", "these data have one", "leave", "model.metrics")),
    ],
)
def test_parts_that_do_not_fit(cli: Any, files: Path, arguments: str, words: tuple[str, ...]):
    check_fit(cli(*FINE, *arguments.split()), words)


def test_a_population_of_one(cli: Any):
    check_fit(cli(*FIT, "--data.batch_size=1"), ("populations need at least 2 windows", "raise the batch size"))


def test_the_covariance_of_data_is_for_those_who_learn_it(cli: Any):
    points = ("fit", "--config", "score_sde_points", *TINY["score_sde_points"])
    check_fit(cli(*points, "--model.preconditioning=LinearPreconditioning"), ("PaDTS", "choose EDMPreconditioning"))


def test_quotes_without_their_package(cli: Any, monkeypatch: pytest.MonkeyPatch):
    for name in ("arch", "arch.data", "arch.data.nasdaq"):
        monkeypatch.setitem(sys.modules, name, None)
    quotes = ("fit", "--config", "pad_ts_quotes", *TINY["pad_ts_quotes"])
    check_fit(cli(*quotes), ("nasdaq comes with the package arch", "pip install 'lightning_sgm[series]'", "path"))


def test_a_hopper_without_its_package(cli: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    hopper = ("fit", "--config", "pad_ts_mujoco", *TINY["pad_ts_mujoco"], "--data.dataset=mujoco")
    check_fit(cli(*hopper), ("mujoco needs dm-control", "pip install 'lightning_sgm[mujoco]'"))


def test_a_recipe_without_its_file(cli: Any):
    brain = ("fit", "--config", "pad_ts_fmri", *(part for part in TINY["pad_ts_fmri"] if "--data.path" not in part))
    check_fit(cli(*brain), ("there is no file fmri_sim4.npz", ".npz"))


# What is odd and no mistake.


@pytest.mark.parametrize(
    "recipe", [pytest.param(FIT, marks=pytest.mark.slow, id="paper"), pytest.param(FINE, id="fine")]
)
def test_a_constant_column_is_kept_and_told_once(cli: Any, files: Path, recipe: tuple[str, ...]):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code, _, err = cli(*recipe, "--data.path=constant.csv", "--trainer.run_dir=out")
    assert code == 0, err
    (line,) = [str(each.message) for each in told if "constant" in str(each.message)]
    assert "constant.csv: constant in training, and always generated so: 'b' (4.25)" in line
    stored = torch.load("out/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in stored.values())
    with np.load(next(Path("out/samples").glob("*.npz"))) as found:
        assert (found["x"][..., 1] == 4.25).all()
        assert np.isfinite(found["x"]).all()
        assert np.ptp(found["x"][..., 0]) > 0


@pytest.mark.parametrize(
    "recipe", [pytest.param(FIT, marks=pytest.mark.slow, id="paper"), pytest.param(FINE, id="fine")]
)
def test_one_dimension_trains_but_has_no_correlations(cli: Any, files: Path, recipe: tuple[str, ...]):
    one = (*recipe, "--data.path=one.csv", "--trainer.run_dir=out")
    code, _, err = cli(*one, "--model.metrics=[lightning_sgm.metrics.ValueDistance]")
    assert code == 0, err
    stored = torch.load("out/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in stored.values())
    judged = ("test", "--ckpt_path=out/checkpoints/last.ckpt", "--trainer.run_dir=judged")
    code, out, err = cli(*judged, "--model.metrics=[lightning_sgm.metrics.ValueDistance]", "--model.test_samples=20")
    assert code == 0, err
    assert "vds" in out.lower()
    line = said(*cli(*judged, "--model.metrics=[lightning_sgm.metrics.CorrelationDistance]")[::2])
    assert "fdds" in line
    assert "these data have one" in line


def test_windows_scaled_by_themselves_are_not_completed(cli: Any, files: Path):
    code, _, err = cli(*FIT, "--data.path=good.csv", "--data.scaling=window", "--trainer.run_dir=out")
    assert code == 0, err
    given = ("--ckpt_path=out/checkpoints/last.ckpt", "--trainer.run_dir=out/more")
    for command in (("test",), ("predict", "--data.path=hole.csv")):
        line = said(*cli(*command, *given, "--model.task=Impute")[::2])
        assert "train with data.scaling minmax, standard or quantile" in line
    assert not list(Path("out/more").glob("**/*.csv"))


def test_columns_that_an_imported_model_lacks(cli: Any, tmp_path: Path):
    authors_file(tmp_path / "theirs.pt")
    write_table(tmp_path / "three.csv", ["open", "high", "low"])
    write_table(tmp_path / "four.csv")
    arguments = ("import", "--source", "pad_ts", "--checkpoint", "theirs.pt", "--output", "ours.ckpt")
    line = said(*cli(*arguments, "--data", "three.csv")[::2])
    assert "3 columns (open, high, low)" in line
    assert "of 4 dimensions" in line
    (tmp_path / "own.yaml").write_text(
        "base: pad_ts\ndata:\n  init_args:\n    columns: [open, high, low, close]\n"
        "model:\n  init_args:\n    network:\n      init_args:\n        width: 16\n"
    )
    line = said(*cli(*arguments, "--data", "four.csv", "--model", "own.yaml")[::2])
    assert "four.csv has no column 'close', only open, high, low, volume" in line
    assert not Path("ours.ckpt").exists()
