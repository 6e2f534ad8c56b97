"""Teachers and students of distillation: found in files, compared with each other, copied, described in checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

import lightning_sgm
from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.samplers.evaluation import first
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.rules import Euler

_ALIKE = ("kind", "factor", "classes", "range")  # what the data of teacher and student have in common

_loading: ContextVar[tuple[str, ...]] = ContextVar("_loading", default=())


def find_teacher(
    teacher: str | GenerativeModule | None,
    student: GenerativeModule | None,
    spec: Mapping[str, Any],
    solver: Sampler | None,
    sampler: Sampler | None,
) -> Any:
    """The frozen teacher; None where it is not needed, as there is a student, and its file is gone or of another model.

    Args:
        teacher: a checkpoint, or the model.
        student: None for one that is made of the teacher.
        spec: of the data of the distillation.
        solver, sampler: of teacher and student, as for :func:`choose_samplers`.

    Raises:
        FileNotFoundError: no such file, and no student.
        ValueError: no teacher is named, or it cannot be distilled.
    """
    missing = isinstance(teacher, str) and not Path(teacher).exists()
    if student is None and (teacher is None or missing):
        alone = "; to use what was distilled in Python without it, give load(path, student=...)"
        if missing:
            raise FileNotFoundError(f"there is no teacher {teacher}: give --model.teacher CHECKPOINT{alone}")
        raise ValueError(
            "a distillation needs a teacher: give --model.teacher CHECKPOINT, as `fit --config resshift` makes" + alone
        )
    if teacher is None or missing:
        return None
    if not isinstance(teacher, str):
        return _frozen(teacher, "the teacher")
    try:
        found = _frozen(_load(teacher), teacher)
        if student is not None:
            _check_pair(found, student)
            check_alike(found, spec, "teacher")
            choose_samplers(found, solver, sampler)
    except ValueError as error:
        # A student that is finished must not depend on what has become of a file.
        if student is None:
            raise
        leave_out(teacher, error)
        return None
    return found


def leave_out(teacher: Any, reason: object) -> None:
    """Tell the user of a finished student that it goes without its teacher."""
    if not _loading.get():  # a student in the place of a teacher is refused, which says enough
        rank_zero_warn(f"{teacher} is no longer this student's teacher, and is left out: {reason}")


def _load(path: str) -> GenerativeModule:
    place = str(Path(path).resolve())
    if place in _loading.get():
        raise ValueError(f"{path} is its own teacher: give the checkpoint of another model")
    token = _loading.set((*_loading.get(), place))
    try:
        found: Any = lightning_sgm.load(path)
    finally:
        _loading.reset(token)
    return found


def _frozen(found: Any, name: str) -> Any:
    """A copy, with the same parts, which no longer learns."""
    if not all(hasattr(found, part) for part in ("denoiser", "guided", "encode", "decode", "sampler")):
        raise ValueError(
            f"{name} is a {type(found).__name__}, which cannot be distilled: give a ResShift or ScoreSDE model"
        )
    return copy.copy(found).requires_grad_(False).eval()


def make_student(teacher: Any, student: GenerativeModule | None) -> Any:
    """The student given, or a copy of the teacher; both share the teacher's codec, which is never trained.

    Raises:
        ValueError: a student of another class, or with another process.
    """
    if teacher is not None and student is not None:
        _check_pair(teacher, student)
    if student is not None:
        _own_arguments(student)
    codec: Any = getattr(teacher, "codec", None)
    # The memo keeps the codec from being copied.
    made: Any = copy.deepcopy(teacher, {id(codec): codec}) if student is None else student
    if codec is not None:
        made.codec = codec
    made.network.requires_grad_(True)
    return made.train()


def _check_pair(teacher: Any, student: Any) -> None:
    if not isinstance(student, type(teacher)):
        raise ValueError(
            f"the student is a {type(student).__name__} and the teacher a {type(teacher).__name__}: make them alike"
        )
    for t in (1.0, 0.5, teacher.process.t_min):
        ours, theirs = (model.process.level(t) for model in (student, teacher))
        if not all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(ours, theirs, strict=True)):
            raise ValueError("student and teacher have other noise at the same time: give both the same process")
    ours, theirs = (_space(model) for model in (student, teacher))
    if ours != theirs:
        raise ValueError(f"the student works on {ours}, the teacher on {theirs}: give both the same codec")


def _space(model: Any) -> str:
    """Codec and shape of what is modelled."""
    codec = getattr(model, "codec", None)
    if codec is None:
        return f"data of shape {model.spec['shape']}"
    # Sides of examples may differ, what a pixel becomes may not.
    side = 64 * codec.factor
    channels, height, _ = codec.shape([model.spec["shape"][0], side, side])
    return f"{channels} channels of {type(codec).__name__}, {side // height} pixels a side"


def _own_arguments(student: GenerativeModule) -> None:
    """Give a student that was made of a recipe its own arguments: it has those of the distillation around it."""
    inside = student.hparams.get("student")
    if isinstance(inside, Mapping) and "_instantiator" in student.hparams:
        kept = {"_class_path": _path(type(student)), "_instantiator": student.hparams["_instantiator"]}
        own = {**inside.get("init_args", {}), **kept}
        student.hparams.clear()
        student.hparams.update(own)


def check_alike(model: GenerativeModule, spec: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError where a model, the "teacher" or the "student", is for other data than those of ``spec``."""
    for entry in _ALIKE:
        if entry in model.spec and entry in spec and model.spec[entry] != spec[entry]:
            raise ValueError(
                f"the {name} was made for data with {entry} {model.spec[entry]}, but these have {spec[entry]}: "
                f"choose data like the {name}'s"
            )
    if model.spec["shape"][0] != spec["shape"][0]:
        raise ValueError(f"the {name}'s data have {model.spec['shape'][0]} channels, these {spec['shape'][0]}")
    if (codec := getattr(model, "codec", None)) is not None:
        codec.shape(spec["shape"])


def choose_samplers(model: Any, solver: Sampler | None, sampler: Sampler | None) -> tuple[Sampler, Sampler]:
    """The teacher's deterministic sampler and the student's, by default on the grid of the ``model``'s own.

    Raises:
        ValueError: one that does not begin at t = 1; nothing is given and the model has no grid.
    """
    own = model.sampler
    if not isinstance(own, Sampler) and (solver is None or sampler is None):
        raise ValueError(f"the teacher samples by {type(own).__name__}, which has no grid: give solver and sampler")
    chosen = (
        copy.copy(solver) if solver else Sampler(rule=Euler(), steps=own.steps, grid=own.grid),
        copy.copy(sampler) if sampler else Sampler(rule=Euler(), steps=1, grid=own.grid),
    )
    for part in chosen:
        # Grids in the log-SNR come back to 1 within rounding.
        if (start := float(first(part.levels(model.process)[0]).t)) < 1.0 - 1e-6:
            raise ValueError(
                f"solver and sampler must begin at t = 1, where the student learns, not at {start:.3g}: give them "
                "other grids, such as UniformTime"
            )
    return chosen


def describe(model: GenerativeModule, spec: dict[str, Any], sampler: Any) -> dict[str, Any] | None:
    """Class and arguments of a student, as a recipe has them; None for one that was built in Python.

    Args:
        model: whose own arguments name all parts.
        spec: of the data of the distillation.
        sampler: of the student, as a recipe has it; None for one step on the grid of the model.
    """
    if "_instantiator" not in model.hparams:
        return None
    left_out = getattr(model, "forgotten", ())
    arguments = {name: v for name, v in model.hparams.items() if not name.startswith("_") and name not in left_out}
    if sampler is None:
        own = arguments.get("sampler") or {}
        grid = own.get("init_args", {}).get("grid")
        one_step = {"rule": {"class_path": _path(Euler)}, "steps": 1, **({} if grid is None else {"grid": grid})}
        sampler = {"class_path": _path(Sampler), "init_args": one_step}
    return {"class_path": _path(type(model)), "init_args": {**arguments, "spec": spec, "sampler": sampler}}


def _path(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
