"""Steps by hand: batches in parts, terms by name, means over parts, gradients at what all terms look at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sgm.objectives.distillation import Term

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Batch


def parts_of(batch: Batch, number: int) -> list[Batch]:
    """The batch in at most ``number`` parts of one size, the last perhaps smaller."""
    size = -(-len(batch["index"]) // number)
    pieces = {name: value.split(size) for name, value in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(len(pieces["index"]))]


def by_name(terms: Sequence[Term]) -> dict[str, Term]:
    """Terms by the name of their class, as ``high_frequency_score``, with a number where that is taken.

    Those with critics come first: critics and student then draw their noise in the same order, and a phase that is made
    again for the student has that of the critics.
    """
    names: dict[str, Term] = {}
    for term in sorted(terms, key=lambda term: not term.has_critic):
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(term).__name__).lower()
        names[name if name not in names else f"{name}_{len(names) + 1}"] = term
    return names


def add_means(means: dict[str, Tensor], values: dict[str, Tensor], share: float) -> None:
    """Add to the means of a step those of the ``values`` (B,) of a part, which is a ``share`` of it."""
    for name, value in values.items():
        mean = share * value.detach().mean()
        means[name] = means[name] + mean if name in means else mean


def gradient_norms(terms: dict[str, Term], losses: dict[str, Tensor], sample: Tensor) -> dict[str, Tensor]:
    """Norms of the gradients of the weighted means of ``losses`` (B,) at the student's ``sample``, "NAME_gradient"."""
    found = {}
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(losses[name].mean(), sample, retain_graph=True, allow_unused=True)
        if gradient is not None:
            found[f"{name}_gradient"] = term.weight * torch.linalg.vector_norm(gradient.float())
    return found


def require_manual(trainer: Trainer) -> None:
    """Raise a ValueError for options of a Trainer that have no meaning where a method makes its steps by hand."""
    if trainer.gradient_clip_val:
        raise ValueError(
            f"trainer.gradient_clip_val has no effect in a distillation: leave it out, and set model.clip to "
            f"{trainer.gradient_clip_val}"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "trainer.accumulate_grad_batches has no effect in a distillation: leave it out, make data.batch_size "
            f"{trainer.accumulate_grad_batches} times as large, and set model.micro_batches to that number"
        )


def add_norms(norms: dict[str, Tensor], values: dict[str, Tensor], share: float) -> None:
    """Add to the norms of a step those of a part, which is a ``share`` of it; gradients of parts are orthogonal."""
    for name, value in values.items():
        norms[name] = torch.hypot(norms[name], share * value) if name in norms else share * value
