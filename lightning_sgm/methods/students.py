"""Teachers and students of distillation: found in files, compared with the data, copied, described in checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning_sgm
from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.rules import Euler

_ALIKE = ("kind", "factor", "classes", "range")  # what the data of teacher and student have in common


def find_teacher(teacher: str | GenerativeModule | None, student: GenerativeModule | None) -> Any:
    """The frozen teacher; None where its file is gone but not needed, as there is a student.

    Raises:
        FileNotFoundError: no such file, and no student.
        ValueError: no teacher is named, or it cannot be distilled.
    """
    if teacher is None and student is None:
        raise ValueError(
            "a distillation needs a teacher: give --model.teacher CHECKPOINT, as `fit --config resshift` makes"
        )
    if teacher is None or (student is not None and isinstance(teacher, str) and not Path(teacher).exists()):
        return None
    found: Any = lightning_sgm.load(teacher) if isinstance(teacher, str) else teacher
    if not all(hasattr(found, name) for name in ("denoiser", "guided", "encode", "sampler")):
        raise ValueError(
            f"{teacher if isinstance(teacher, str) else 'the teacher'} is a {type(found).__name__}, which cannot be "
            "distilled: give a ResShift or ScoreSDE model"
        )
    return found.requires_grad_(False).eval()


def make_student(teacher: Any, student: GenerativeModule | None) -> Any:
    """The student given, or a copy of the teacher; both share the teacher's codec, which is never trained."""
    codec: Any = getattr(teacher, "codec", None)
    # The memo keeps the codec from being copied.
    made: Any = copy.deepcopy(teacher, {id(codec): codec}) if student is None else student
    if codec is not None:
        made.codec = codec
    made.network.requires_grad_(True)
    return made


def check_alike(model: GenerativeModule, spec: Mapping[str, Any]) -> None:
    """Raise a ValueError where a model was trained for other data than those of ``spec``."""
    for name in _ALIKE:
        if name in model.spec and name in spec and model.spec[name] != spec[name]:
            raise ValueError(
                f"the teacher was trained for data with {name} {model.spec[name]}, but these have {spec[name]}: "
                f"choose data like the teacher's"
            )
    if model.spec["shape"][0] != spec["shape"][0]:
        raise ValueError(f"the teacher's data have {model.spec['shape'][0]} channels, these {spec['shape'][0]}")


def describe(model: GenerativeModule, spec: dict[str, Any], sampler: Any) -> dict[str, Any] | None:
    """Class and arguments of a student, as a recipe has them; None for one that was built in Python.

    Args:
        model: whose own arguments name all parts.
        spec: of the data of the distillation.
        sampler: of the student, as a recipe has it; None for one step on the grid of the model.
    """
    if "_instantiator" not in model.hparams:
        return None
    arguments = {name: value for name, value in model.hparams.items() if not name.startswith("_")}
    if sampler is None:
        own = arguments.get("sampler") or {}
        grid = own.get("init_args", {}).get("grid")
        one_step = {"rule": {"class_path": _path(Euler)}, "steps": 1, **({} if grid is None else {"grid": grid})}
        sampler = {"class_path": _path(Sampler), "init_args": one_step}
    return {"class_path": _path(type(model)), "init_args": {**arguments, "spec": spec, "sampler": sampler}}


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
