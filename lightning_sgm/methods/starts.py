"""Where a student starts, and what its teacher makes of the same start: solved for, or kept from an earlier time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sgm.methods.encoded import Encoded, only
from lightning_sgm.methods.solutions import SolutionCache, Solutions, fingerprint_of, outline
from lightning_sgm.objectives.distillation import Solve
from lightning_sgm.random import Draw, run_seed
from lightning_sgm.samplers.loop import Sampler

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Batch


class Known(NamedTuple):
    """What the phases of a step know of a part of its batch; see :class:`~lightning_sgm.objectives.Phase`."""

    start: Tensor
    data: Tensor
    conditions: dict[str, Tensor]
    draw: Draw
    solve: Solve


def know(
    model: Any,
    solver: Sampler,
    encoded: Encoded,
    draw: Draw,
    source: Draw,
    batch: Batch | None = None,
    cache: SolutionCache | None = None,
) -> Known:
    """A start at t = 1 from ``source``, and how to solve from there.

    Args:
        model: the teacher.
        solver: its deterministic sampler.
        encoded: the batch in the space of the model.
        draw: source of all other noise.
        source: of the start.
        batch: its "solution" (B, *) is taken for that from this start, and put there if it is missing; None: it is
            solved for.
        cache: where what is put into the batch is kept too.
    """
    data, conditions = encoded
    solved: Batch = {} if batch is None else batch
    start = solver.prior(model.process, tuple(data.shape), source).to(data)

    def solve(start: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        if "solution" not in solved:
            found = solver(model.guided, None, draw, start=start, **only(conditions, model.guided))
            solved["solution"] = found if cache is None else cache.put(solved["index"], found)
        return solved["solution"].to(data)

    return Known(start, data, conditions, draw, solve)


def open_cache(
    solutions: Solutions, teacher: Any, solver: Sampler, trainer: Trainer, device: torch.device
) -> SolutionCache:
    """The store of the solutions for the training examples of the trainer's datamodule.

    Raises:
        ValueError: data that differ from epoch to epoch; the folder holds solutions of something else.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if data is None or not data.spec.get("fixed"):
        raise ValueError(
            "solutions are kept of the examples of a datamodule that stay the same: set data.fixed to true, or "
            "solutions to null"
        )
    example = {name: value.to(device) for name, value in data.examples("train", 1).items()}
    fingerprint = fingerprint_of(
        teacher.state_dict(),
        solver.levels(teacher.process),
        solver=repr((outline(solver), outline(teacher.guided), str(trainer.precision))),
        data=data.fingerprint,
        seed=run_seed(),
    )
    return solutions.open(data.count("train"), teacher.encode(example).x0.shape[1:], fingerprint)
