"""Checkpoints of PaD-TS and data: other units are refused, their own go on; completions may leave the range."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_sgm
from datamodules import SeriesDataModule
from lightning_sgm.linear_denoiser import LinearPreconditioning
from lightning_sgm.methods import Forecast
from lightning_sgm.networks.base import Network
from lightning_sgm.processes import CosineChain
from lightning_sgm.random import Draw
from lightning_sgm.trainer import Trainer
from tests.conftest import TINY
from tests.methods.series_models import L, model, rows, table

CHAIN = CosineChain(steps=20)
RUN = Path("runs/a/version_0")
LAST = ("--ckpt_path", str(RUN / "checkpoints" / "last.ckpt"))
SHORT = ("--trainer.limit_val_batches=1", "--model.process.steps=20")


def wider(column: int) -> torch.Tensor:
    """The rows of the training file, of which those of one column are three times as large."""
    x = rows(120)
    x[:, column] *= 3
    return x


# As a user types it.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny model of a file."""
    from lightning_sgm.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning_sgm"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("SGM_RUN_DIR", "")
        table(Path("mine.csv"), rows(120))
        options = ("--data.path=mine.csv", f"--data.length={L}", f"--trainer.run_dir={RUN}", "--trainer.max_steps=2")
        assert main(["fit", "--config", "pad_ts", *TINY["pad_ts"], *SHORT, *options]) == 0
    return folder


@pytest.fixture
def user(cli: Any, trained: Path, tmp_path: Path) -> Any:
    """The command line beside a copy of that run, its file and one with a wider column."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.copy(trained / "mine.csv", tmp_path / "mine.csv")
    table(tmp_path / "wide.csv", wider(1))
    return cli


def files() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        ("test", *LAST, "--data.path=wide.csv"),
        ("validate", *LAST, "--data.path=wide.csv"),
        ("fit", *LAST, "--data.path=wide.csv", "--trainer.max_steps=4", "--trainer.run_dir=runs/b"),
    ],
    ids=["test", "validate", "fit"],
)
def test_data_in_other_units_are_refused_before_any_result_is_written(user: Any, command: tuple[str, ...]):
    before = files()
    code, _, err = user(*command)
    assert code in (1, 2), err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "trained on windows in other units: column 'b' from " in line
    assert "in the model, from " in line
    assert "train anew" in line
    changed = {Path(name).name for name in dict(files().items() - before.items())}
    assert {name for name in changed if name != "config.yaml" and not name.startswith("events.")} == set()


def test_its_own_data_are_welcome(user: Any):
    code, out, err = user("test", *LAST)
    assert code == 0, err
    assert "samples/evaluations" in out
    code, _, err = user("fit", *LAST, "--trainer.max_steps=3")
    assert code == 0, err


def test_prediction_needs_no_data(user: Any):
    Path("mine.csv").unlink()
    code, _, err = user("predict", *LAST)
    assert code == 0, err
    assert any(path.name == "samples.npz" for path in RUN.rglob("*"))


# In Python.


class Silent(Network):
    """Answers 0: under LinearPreconditioning the best linear estimate is left."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, label, /):
        return 0 * self.weight * x


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(**{
        "run_dir": str(folder), "max_steps": 1, "enable_progress_bar": False, "limit_val_batches": 0,
        "log_every_n_steps": 1, **options,
    })  # fmt: skip


def linear(of: dict[str, Any], **options: Any) -> Any:
    return model(of, Silent, process=CHAIN, preconditioning=LinearPreconditioning(), test_samples=20, **options)


def own(path: Path, x: torch.Tensor, **options: Any) -> SeriesDataModule:
    return SeriesDataModule(path=str(table(path, x)), length=L, batch_size=16, **options)


def checkpoint(folder: Path, of: SeriesDataModule) -> str:
    trainer(folder).fit(linear(of.spec), of)
    return str(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("way", ["fit", "validate", "test"])
def test_what_differs_is_named(way: str, tmp_path: Path):
    path = checkpoint(tmp_path / "one", own(tmp_path / "a.csv", rows(120)))
    for other, words in (
        (own(tmp_path / "b.csv", wider(2)), "column 'c' from .* in the model, from .* in the data"),
        (own(tmp_path / "c.csv", rows(120), scaling="standard"), "kind minmax in the model, standard in the data"),
        (own(tmp_path / "d.csv", rows(120), log=["b"]), r"log \[False, False, False\] in the model, \[False, True"),
        (own(tmp_path / "e.csv", rows(120), columns=["a", "b"]), "3 dimensions in the model, 2 in the data"),
    ):
        again = linear(other.spec)
        before = {name: value.clone() for name, value in again.state_dict().items()}
        with pytest.raises(ValueError, match=f"trained on windows in other units: {words}"):
            getattr(trainer(tmp_path / "two", max_steps=2), way)(again, other, ckpt_path=path)
        for name, value in before.items():
            assert torch.equal(again.state_dict()[name], value)


def test_a_loaded_model_goes_on_with_its_own_data(tmp_path: Path):
    data = own(tmp_path / "a.csv", rows(120))
    path = checkpoint(tmp_path / "one", data)
    trainer(tmp_path / "two", max_steps=2).fit(linear(data.spec), own(tmp_path / "a.csv", rows(120)), ckpt_path=path)
    loaded = lightning_sgm.load(path, network=Silent, process=CHAIN, preconditioning=LinearPreconditioning())
    assert isinstance(loaded, type(linear(data.spec)))
    assert loaded.generate(2)["x"].shape == (2, L, 3)
    with pytest.raises(ValueError, match="trained on windows in other units: column 'c' from"):
        trainer(tmp_path / "three").test(loaded, own(tmp_path / "b.csv", wider(2)))


# Completions.


def walk(count: int, seed: int = 0) -> torch.Tensor:
    """A random walk with drift: its future lies beyond its past."""
    return (Draw(seed).normal((count, 2), torch.float64) + 0.5).cumsum(0)


@pytest.mark.parametrize("clip", [None, True])
def test_futures_leave_the_range_of_training_and_samples_from_scratch_do_not(clip: bool | None, tmp_path: Path):
    data = own(tmp_path / "a.csv", walk(400))
    module = linear(data.spec, clip=clip)
    trainer(tmp_path / "one").fit(module, data)
    module.eval()
    scratch = module.generate(300)["x"]
    assert scratch.abs().max() <= 1
    module.task = Forecast(2, samples=8)
    index = torch.arange(data.count("test"))
    run = trainer(tmp_path / "two", logger=False)
    run.test(module, data, verbose=False)  # gives it the data
    found = module.sample(index)
    x = found["x"].view(len(index), 8, L, 2)
    truth = found["truth"].view_as(x)
    assert torch.equal(x[:, :, :-2], truth[:, :, :-2])
    future = x[:, :, -2:]
    assert (truth[:, :, -2:] > 1).double().mean() > 0.9  # the end of time is new
    assert (future > 1).double().mean() > 0.9
    # Clipped to 1 they would be off by as much as the walk has gone on.
    error = (future.mean(1) - truth[:, 0, -2:]).abs().mean()
    assert error < 0.3 * (truth[:, 0, -2:] - 1).abs().mean()
