"""Finished students beside files of teachers that have become something else, and the user's own classes in both."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_sgm
from lightning_sgm.io.checkpoint import allowing
from lightning_sgm.io.export import export
from lightning_sgm.io.released.model import build
from lightning_sgm.methods import Distillation
from lightning_sgm.objectives import Regression
from lightning_sgm.samplers import ChainGrid, Euler, Sampler
from tests.methods.distillations import Pairs, Points, distillation, fitting, keep, points, resshift

TERMS = [{"class_path": "Regression"}, {"class_path": "Adversarial", "init_args": {"hidden": 4}}]


def recipe(teacher: str, **more: Any) -> Distillation:
    """As the command line builds it."""
    init = {"terms": TERMS, "teacher": teacher, "spec": Pairs().spec, **more}
    module = build({"class_path": "lightning_sgm.methods.Distillation", "init_args": init})
    assert isinstance(module, Distillation)
    return module.eval()


def moved(module: Any) -> Any:
    """With a student that is no longer its teacher."""
    with torch.no_grad():
        module.student.network.last.weight.add_(0.05)
    return module


@torch.no_grad()
def restored(model: Any) -> Tensor:
    found: Tensor = model.restore(Pairs().examples("val", 2)["low"], torch.arange(2))
    return found


# Other files under the teacher's name.


def _damaged(path: Path, student: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def _other_factor(path: Path, student: Path) -> None:
    keep(resshift(spec={**Pairs().spec, "factor": 1, "low_shape": [3, 16, 16]}), path)


LATE = {
    "class_path": "Sampler",
    "init_args": {"steps": 4, "grid": {"class_path": "Karras", "init_args": {"ratio_max": 0.2}}},
}
OTHERS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "score_sde": (lambda path, student: keep(points(), path), "the teacher a ScoreSDE: make them alike"),
    "damaged": (_damaged, "is damaged"),
    "empty": (lambda path, student: path.write_bytes(b""), "is damaged"),
    "codec": (lambda path, student: keep(resshift(codec={"class_path": "Identity"}), path), "give both the same codec"),
    "itself": (lambda path, student: path.write_bytes(student.read_bytes()), "Distillation, which cannot be distilled"),
    "factor": (_other_factor, "made for data with factor 1, but these have 2"),
    "sampler": (lambda path, student: keep(resshift(sampler=LATE), path), "must begin at t = 1"),
    "features": (lambda path, student: keep(resshift(channels=16), path), "its critics judge other features"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_finished_student_does_not_depend_on_the_teachers_file(tmp_path: Path, other: str):
    change, reason = OTHERS[other]
    teacher, path = tmp_path / "teacher.ckpt", tmp_path / "student.ckpt"
    keep(resshift(), teacher)
    module = moved(recipe(str(teacher)))
    expected = restored(module.student)
    keep(module, path)
    change(teacher, path)
    with pytest.warns(UserWarning, match="no longer this student's teacher") as told:
        found: Any = lightning_sgm.load(path)
    (said,) = [str(each.message) for each in told if "no longer this student's teacher" in str(each.message)]
    assert said.startswith(f"{teacher} is no longer this student's teacher, and is left out: ")
    assert reason in said
    assert found.teacher is None
    assert "teacher" not in found.rivals
    assert torch.equal(restored(found.student), expected)
    assert not torch.equal(restored(resshift()), expected)
    with pytest.raises(FileNotFoundError, match=r"there is no teacher .*teacher\.ckpt: give --model\.teacher FILE"):
        fitting(tmp_path / "again", steps=1).fit(found, Pairs())
    if other in ("damaged", "empty", "itself", "factor", "sampler"):
        with pytest.raises(ValueError, match=r"damaged|needs a teacher|cannot be distilled|factor 1|begin at t = 1"):
            recipe(str(teacher))


def test_a_student_whose_file_is_its_own_teachers(tmp_path: Path):
    """The file that is loaded is the one it names: no endless way down."""
    path = tmp_path / "one.ckpt"
    keep(resshift(), path)
    module = moved(recipe(str(path)))
    keep(module, path)
    with pytest.warns(UserWarning, match="cannot be distilled") as told:
        found: Any = lightning_sgm.load(path)
    assert len([each for each in told if "no longer" in str(each.message)]) == 1
    assert found.teacher is None
    assert torch.equal(restored(found.student), restored(module.student))


def test_a_new_distillation_from_a_model_of_other_data(tmp_path: Path):
    with pytest.raises(ValueError, match="kind array, but these have image"):
        recipe(keep(points(), tmp_path / "teacher.ckpt", Points()))


def test_the_right_teacher_is_told_of_by_nobody(tmp_path: Path):
    path = keep(recipe(keep(resshift(), tmp_path / "teacher.ckpt")), tmp_path / "student.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found: Any = lightning_sgm.load(path)
    assert "teacher" in found.rivals


# The user's own classes.


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a network."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/mine_networks.py").write_text(
        "from lightning_sgm.networks import SRResNet\n\nclass Mine(SRResNet):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "mine_networks", raising=False)
    return "mine_networks"


def test_users_classes_are_allowed_in_the_teacher_too_and_only_meanwhile(own: str, tmp_path: Path):
    network = {"class_path": f"{own}.Mine", "init_args": {"channels": 8, "blocks": 3}}
    keep(resshift(network=network), tmp_path / "teacher.ckpt")
    with allowing([own]):
        module = recipe(str(tmp_path / "teacher.ckpt"))
    path = keep(module, tmp_path / "student.ckpt")
    found: Any = lightning_sgm.load(path, allow=(own,))
    assert [type(model.network).__name__ for model in (found.student, found.teacher)] == ["Mine", "Mine"]
    for file in (path, tmp_path / "teacher.ckpt"):
        with pytest.raises(ValueError, match=rf"asks for {own}\.Mine, which load\(\) may not import"):
            lightning_sgm.load(file)


def test_blocks_that_allow_lie_within_each_other(own: str):
    with allowing(["a"]) as outer:
        with suppress(RuntimeError), allowing(["b", "a"]) as inner:
            assert inner == ("a", "b")
            raise RuntimeError
        assert outer == ("a",)
        with allowing([]) as again:
            assert again == ("a",)
    with allowing([]) as after:
        assert after == ()


# What is kept of students.


def test_what_a_student_is_used_for_is_not_kept(tmp_path: Path):
    """Pieces and perceptual losses of a student given by a recipe."""
    teacher = keep(resshift(), tmp_path / "teacher.ckpt")
    section = {
        "class_path": "lightning_sgm.methods.ResShift",
        "init_args": {
            "network": {"class_path": "SRResNet", "init_args": {"channels": 8, "blocks": 1}},
            "codec": {"class_path": "PixelUnshuffle", "init_args": {"factor": 2}},
            "process": {"class_path": "ResidualShift", "init_args": {"steps": 4, "kappa": 0.3, "min_noise": 0.1}},
            "spec": Pairs().spec,
            "tile": 8,
            "overlap": 2,
        },
    }
    module = recipe(teacher, student=section)
    assert (module.student.tile, module.student.overlap) == (8, 2)
    assert not {"tile", "overlap", "perceptual"} & set(module.hparams["student"]["init_args"])
    found: Any = lightning_sgm.load(keep(module, tmp_path / "student.ckpt"))
    assert (found.student.tile, found.student.overlap) == (128, 16)
    assert len(found.student.network.blocks) == 1
    assert found.teacher is not None


def test_a_student_of_python_is_exported_with_its_one_step(tmp_path: Path):
    teacher = keep(resshift(), tmp_path / "teacher.ckpt")
    module = moved(distillation([Regression()], teacher)).eval()
    path = keep(module, tmp_path / "student.ckpt")
    # What is built in Python must be given again; the student's class and arguments are in the teacher's file.
    export(path, tmp_path / "folder", terms=[Regression()])
    found: Any = lightning_sgm.load(tmp_path / "folder")
    assert type(found).__name__ == "ResShift"
    assert (found.sampler.steps, type(found.sampler.rule), type(found.sampler.grid)) == (1, Euler, ChainGrid)
    assert torch.equal(restored(found), restored(module.student))


def test_a_sampler_of_python_is_in_no_file(tmp_path: Path):
    teacher = keep(resshift(), tmp_path / "teacher.ckpt")
    given = Sampler(rule=Euler(), steps=2, grid=ChainGrid())
    module = distillation([Regression()], teacher, sampler=given)
    with pytest.raises(ValueError, match="a sampler that was made in Python is in no file: leave it out, or distil by"):
        module.exported()
    # By a recipe it is.
    section = {"class_path": "Sampler", "init_args": {"rule": "Euler", "steps": 2, "grid": "ChainGrid"}}
    path = keep(recipe(teacher, sampler=section), tmp_path / "student.ckpt")
    export(path, tmp_path / "folder")
    assert lightning_sgm.load(tmp_path / "folder").sampler.steps == 2  # type: ignore[union-attr]
