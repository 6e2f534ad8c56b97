"""What distillation keeps: checkpoints without the teacher, and runs that go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_sgm
from lightning_sgm.codecs import PixelUnshuffle
from lightning_sgm.io.checkpoint import read_checkpoint
from lightning_sgm.io.released.model import build
from lightning_sgm.methods import Distillation
from lightning_sgm.methods.solutions import Solutions
from lightning_sgm.objectives import Adversarial, HighFrequencyScore, Regression
from lightning_sgm.random import Draw
from tests.callbacks.test_resume import Interrupt, differences, final
from tests.callbacks.tiny import trainer
from tests.methods.distillations import (
    BATCH,
    EXAMPLES,
    Pairs,
    Recorded,
    distillation,
    fitting,
    keep,
    resshift,
)

TERMS = [
    {"class_path": "Regression"},
    {"class_path": "HighFrequencyScore"},
    {"class_path": "Adversarial", "init_args": {"hidden": 4}},
]
STEPS, EPOCH = 7, EXAMPLES // BATCH


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def recipe(teacher: str | None, **more: Any) -> Distillation:
    """As the command line builds it."""
    init = {"terms": TERMS, "teacher": teacher, "spec": Pairs().spec, "warmup": 3, **more}
    module = build({"class_path": "lightning_sgm.methods.Distillation", "init_args": init})
    assert isinstance(module, Distillation)
    return module


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return keep(resshift(), tmp_path / "teacher.ckpt")


@pytest.fixture
def distilled(teacher: str, tmp_path: Path) -> tuple[Distillation, Path]:
    """A trained model of a recipe, and its checkpoint."""
    module = recipe(teacher)
    fitting(tmp_path / "fit", steps=2).fit(module, Pairs())
    return module.eval(), tmp_path / "fit" / "last.ckpt"


# Checkpoints.


def test_a_checkpoint_has_student_and_critics_but_no_teacher(distilled: Any):
    module, path = distilled
    names = set(read_checkpoint(path)["state_dict"])
    assert names == {name for name in module.state_dict() if not name.startswith("teacher.")}
    assert {name.split(".")[0] for name in names} == {"student", "terms"}


class Learnt(PixelUnshuffle):
    """A codec with weights, which it finds itself unless they are ``stored``."""

    def __init__(self, stored: bool = False) -> None:
        super().__init__(2)
        self.stored = stored
        self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)


@pytest.mark.parametrize("stored", [True, False])
def test_a_codec_is_in_the_checkpoint_once_or_not_at_all(stored: bool):
    codec = {"class_path": f"{__name__}.Learnt", "init_args": {"stored": stored}}
    module = distillation([Regression()], resshift(codec=codec))
    assert module.student.codec is module.teacher.codec
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert [name for name in checkpoint["state_dict"] if "codec" in name] == ["student.codec.scale"] * stored
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)


def test_a_model_is_used_without_its_teacher(distilled: Any, teacher: str, tmp_path: Path):
    module, path = distilled
    low = Pairs().examples("val", 2)["low"]
    with torch.no_grad():
        expected = module.student.restore(low, torch.arange(2))
    both: Any = lightning_sgm.load(path)
    assert "teacher" in both.rivals
    Path(teacher).unlink()
    alone: Any = lightning_sgm.load(path)
    assert alone.teacher is None
    for loaded in (both, alone):
        with torch.no_grad():
            assert torch.equal(loaded.student.restore(low, torch.arange(2)), expected)
        loaded.sample_draw(torch.arange(2))
        assert loaded.student.sampler.steps == 1
        assert loaded.scale == module.scale
    assert "teacher" not in alone.rivals
    assert set(alone.losses(Pairs().examples("val", 2), Draw(0))) == {"to_data"}
    (found,) = trainer(tmp_path).test(alone, Pairs(), verbose=False)
    assert found["test/to_data"] > 0
    with pytest.raises(FileNotFoundError, match=r"there is no teacher .*teacher\.ckpt: give --model\.teacher FILE"):
        fitting(tmp_path / "again").fit(alone, Pairs())


def test_a_teacher_that_moved_is_given_again(distilled: Any, teacher: str, tmp_path: Path):
    _, path = distilled
    moved = Path(teacher).rename(tmp_path / "moved.ckpt")
    loaded: Any = lightning_sgm.load(path, teacher=str(moved))
    assert loaded.teacher is not None
    fitting(tmp_path / "again", steps=1).fit(loaded, Pairs())


@pytest.mark.parametrize("where", ["student.network.last.bias", "terms.2.heads.heads.0.film.bias"])
@pytest.mark.parametrize("how", ["missing", "unexpected"])
def test_loading_stays_strict(distilled: Any, where: str, how: str, tmp_path: Path):
    _, path = distilled
    checkpoint = read_checkpoint(path)
    value = checkpoint["state_dict"].pop(where)
    if how == "unexpected":
        checkpoint["state_dict"] |= {where: value, f"{where}_more": value}
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    with pytest.raises(ValueError, match=f"do not fit .*{how.capitalize()}.*{where}"):
        lightning_sgm.load(tmp_path / "wrong.ckpt")


def test_a_teacher_of_python_and_what_its_checkpoint_needs(tmp_path: Path):
    module = distillation([Regression()])
    fitting(tmp_path, steps=1).fit(module, Pairs())
    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match=r"terms.*built in Python are not in the file, give them: load\(path, "):
        lightning_sgm.load(path)
    with pytest.raises(ValueError, match=r"distilled in Python without it, give load\(path, student=\.\.\.\)"):
        lightning_sgm.load(path, terms=[Regression()])
    low = Pairs().examples("val", 2)["low"]
    with torch.no_grad():
        expected = module.eval().student.restore(low, torch.arange(2))
        loaded: Any = lightning_sgm.load(path, terms=[Regression()], student=resshift(seed=4))
        assert torch.equal(loaded.student.restore(low, torch.arange(2)), expected)


# Going on.


@pytest.mark.parametrize(
    ("kept", "at"), [("nothing", EPOCH + 1), ("memory", 2), ("memory", EPOCH + 2), ("disk", EPOCH + 2)]
)
def test_a_run_that_goes_on_ends_where_one_that_did_not_stop_ends(tmp_path: Path, at: int, kept: str):
    """Weights, averages, both optimisers, spectral norms and what is logged, bit by bit."""

    def run(name: str, *callbacks: Any, resume: bool = False) -> tuple[dict[str, Any], Recorded]:
        folder, logger = tmp_path / name, Recorded()
        store = {"memory": Solutions(), "disk": Solutions(str(tmp_path / f"solutions {name}")), "nothing": None}[kept]
        torch.manual_seed(9)
        terms = [Regression(), HighFrequencyScore(), Adversarial(0.5, hidden=4)]
        module = distillation(
            terms, optimizer=adam, critic_optimizer=adam, critic_steps=2, warmup=5, decay="cosine", solutions=store
        )
        options: Any = {"logger": logger, "limit_val_batches": 1, "val_check_interval": 2}
        path = str(folder / "last.ckpt") if resume else None
        fitting(folder, *callbacks, steps=STEPS, **options).fit(module, Pairs(), ckpt_path=path)
        return final(folder), logger

    straight, whole = run("straight")
    with pytest.raises(RuntimeError, match="on purpose"):
        run("broken", Interrupt("error", at))
    broken, rest = run("broken", resume=True)
    assert differences(straight, broken) == []
    assert any("_u" in name for name in straight["state_dict"])
    assert len(straight["optimizer_states"]) == 2
    logged = {step: row for step, row in whole.rows if "train/loss" in row}
    again = {step: row for step, row in rest.rows if "train/loss" in row}
    assert [*again] == [*range(at, STEPS + 1)]
    assert all(row == logged[step] for step, row in again.items())
