"""Gaps of files filled, futures forecast and their errors on held-out windows, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from tests.methods.series_models import L, rows, table

ROWS = 150
RUN = Path("runs/a/version_0")
OPTIONS = (
    *("--data.path=mine.csv", f"--data.length={L}", "--model.process.steps=20"),
    *("--model.preconditioning=LinearPreconditioning", "--model.clip=false"),
    *("--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"),
)
CONFIG = ("--config", "runs/a/version_0/config.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny model of a file, whose network corrects the best linear denoiser."""
    from lightning_sgm.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning_sgm"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("SGM_RUN_DIR", "")
        table(Path("mine.csv"), rows(ROWS))
        assert main(["fit", "--config", "pad_ts", *TINY["pad_ts"], *OPTIONS, f"--trainer.run_dir={RUN}"]) == 0
    return folder


@pytest.fixture
def user(cli, trained: Path, tmp_path: Path):
    """The command line beside that run, with two files: one with gaps, one whole."""
    (tmp_path / "runs").symlink_to(trained / "runs")
    (tmp_path / "mine.csv").symlink_to(trained / "mine.csv")
    x = rows(15, seed=3)
    table(tmp_path / "whole.csv", x)
    x[3, 1] = x[12, 0] = x[13, 0] = torch.nan
    table(tmp_path / "gaps.csv", x)
    for old in RUN.glob("restored/**/*.*"):
        old.unlink()
    return cli


def arrays() -> dict[str, np.ndarray]:
    with np.load(RUN / "restored" / "samples.npz", allow_pickle=False) as found:
        return dict(found)


@pytest.mark.parametrize("method", ["posterior", "replacement"])
def test_gaps_of_a_file(user, method: str):
    code, _, err = user(
        "predict", *CONFIG, "--data.path=gaps.csv", "--model.task=Impute", "--model.task.samples=4",
        f"--model.task.method={method}",
    )  # fmt: skip
    assert code == 0, err
    found, x = arrays(), rows(15, seed=3).numpy()
    assert found["window"].tolist() == [0] * 4 + [9] * 4
    assert found["x"].shape == (8, L, 3)
    assert "truth" not in found
    for start, window, known in zip(found["window"], found["x"], found["known"], strict=True):
        np.testing.assert_allclose(window[known], x[start : start + L][known], rtol=2e-5, atol=1e-5)
        assert np.isfinite(window).all()
    assert (~found["known"])[0].nonzero()[0].tolist() == [3]
    assert np.argwhere(~found["known"][4]).tolist() == [[3, 0], [4, 0]]
    assert np.ptp(found["x"][:4, 3, 1]) > 0
    names = {path.name for path in (RUN / "restored").iterdir()}
    assert {"samples.csv", "samples.npz", "samples.png"} <= names


def test_the_future_of_a_file(user):
    code, _, err = user(
        "predict", *CONFIG, "--data.path=whole.csv", "--model.task=Forecast", "--model.task.horizon=2",
        "--model.task.samples=3",
    )  # fmt: skip
    assert code == 0, err
    found = arrays()
    assert found["window"].tolist() == [11] * 3
    assert found["known"][:, :4].all()
    assert not found["known"][:, 4:].any()
    last = rows(15, seed=3).numpy()[11:]
    np.testing.assert_allclose(found["x"][:, :4], np.broadcast_to(last, (3, 4, 3)), rtol=2e-5, atol=1e-5)
    assert np.isfinite(found["x"]).all()


def test_errors_on_held_out_windows(user):
    forecast = ("--model.task=Forecast", "--model.task.horizon=2", "--model.task.samples=3")
    code, out, err = user("test", *CONFIG, *forecast)
    assert code == 0, err
    for name in ("completion/mae", "completion/rmse", "completion/crps", "completion/coverage_80"):
        assert name in out
    assert "interpolation/mae" in out
    assert "FDDS" not in out
    written = [json.loads(path.read_text()) for path in RUN.rglob("*.json")]
    assert any("completion/crps" in json.dumps(each) for each in written)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data.path=gaps.csv", ("--model.task Impute", "--model.task Forecast")),
        ("--data.path=whole.csv --model.task=Impute", ("nothing is missing", "whole.csv")),
        ("--data.path=gaps.csv --model.task=Forecast --model.task.horizon=3", ("cells are missing", "Impute")),
        ("--data.path=whole.csv --model.task=Forecast --model.task.horizon=6", ("horizon 6", "lower it")),
        ("--data.path=other.csv --model.task=Impute", ("other.csv",)),
        ("--data.path=names.csv --model.task=Impute", ("names.csv", "'b'")),
        ("--model.task=Impute --model.task.share=2", ("share", "between 0 and 1")),
        ("--model.task=Impute", ("give some: --data.path",)),
    ],
)
def test_mistakes_are_named(user, options: str, words: tuple[str, ...]):
    table(Path("names.csv"), rows(15), ["a", "y", "c"])
    code, _, err = user("predict", *CONFIG, *options.split())
    assert code in (1, 2), err
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("error:")]
    for word in words:
        assert word in message
