"""Mistakes with series and parts of their models: one line that names the thing, and nothing half-written."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from tests.methods.series_models import L, rows, table

FIT = ("fit", "--config", "pad_ts", *TINY["pad_ts"], f"--data.length={L}")
FINE = ("fit", "--config", "pad_ts_fine", *TINY["pad_ts_fine"], f"--data.length={L}")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Files of series, right and wrong ones."""
    x = rows(80)
    text = table(tmp_path / "good.csv", x).read_text().splitlines()
    dated = [f"2026-01-{i + 1},{line}" if i < 28 else "" for i, line in enumerate(text[1:])]
    dated = [f"day,{text[0]}", *(line for line in dated if line)]
    uneven = [line for i, line in enumerate(dated) if i != 9]
    contents = {
        "hole.csv": [*text[:7], text[7].rpartition(",")[0] + ",", *text[8:]],
        "nan.csv": [*text[:7], "nan" + text[7][text[7].index(",") :], *text[8:]],
        "text.csv": [*text[:12], text[12].rpartition(",")[0] + ",n/k", *text[13:]],
        "short.csv": text[:L],
        "few.csv": text[: L + 4],
        "dated.csv": dated,
        "uneven.csv": uneven,
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


def said(code: int, err: str) -> str:
    """The one line of a mistake."""
    assert code in (1, 2), err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    return line


def check_fit(result: tuple[int, str, str], words: tuple[str, ...]) -> None:
    line = said(result[0], result[2])
    assert all(word in line for word in words), line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.path=hole.csv", ("row 8, column 'c' of hole.csv is missing", "--data.fill interpolate")),
        ("--data.path=nan.csv", ("row 8, column 'a' of nan.csv", "--data.fill interpolate")),
        ("--data.path=text.csv", ("row 13", "'c'", "n/k")),
        ("--data.path=short.csv", ("a window takes 6 rows", "short.csv", "5 rows", "lower length")),
        ("--data.path=few.csv", ("x",)),
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
        ("--model.task.horizon=2", ("task",)),
        ("--model.sampler.steps=2000", ("x",)),
    ],
)
def test_series_that_cannot_be_trained_on(cli: Any, files: Path, arguments: str, words: tuple[str, ...]):
    check_fit(cli(*FIT, *arguments.split()), words)


def test_x(cli, files, monkeypatch):
    def show(*a):
        code, out, err = cli(*a)
        print("=====", a[-3:], code, [l for l in err.splitlines() if l.startswith("error") or "Trace" in l], [str(p) for p in Path(".").glob("runs/**/*")][:20], file=sys.__stderr__)
        import shutil
        return code
    show(*FIT, "--data.batch_size=1")
    show(*FINE, "--model.preconditioning.label=index")
    show(*FINE, "--data.path=still.csv")
    show(*FIT, "--data.path=still.csv", "--trainer.run_dir=runs/still")
    show(*FINE, "--data.path=one.csv", "--trainer.run_dir=runs/one")
    show("test", "--config", "runs/one/config.yaml")
    show("fit", "--config", "pad_ts_fmri", *TINY["pad_ts_fmri"])
    show("fit", "--config", "pad_ts_mujoco", *TINY["pad_ts_mujoco"])
    monkeypatch.setitem(sys.modules, "arch", None)
    monkeypatch.setitem(sys.modules, "arch.data", None)
    show("fit", "--config", "pad_ts_quotes", *TINY["pad_ts_quotes"])
    show(*FIT, "--data.scaling=window", "--trainer.run_dir=runs/window")
    show("test", "--config", "runs/window/config.yaml", "--model.task=Forecast")
    assert 0
