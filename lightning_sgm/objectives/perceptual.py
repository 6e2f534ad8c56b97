"""A term of distillation that looks at images as people do."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_sgm.metrics.perceptual import PerceptualDistance
from lightning_sgm.objectives.distillation import Phase, Term


class Perceptual(Term):
    """Distance of the student's decoded sample from an image, by the features of a network (Zhang et al. 2018).

    The loss that distillation to few steps often has in place of, or beside, squared errors (Song et al. 2023,
    2303.01469), and ResShift's journal version in training (Yue et al. 2024, 2403.07319). A distance that trained a
    model no longer judges it fairly: report another one beside it.

    Args:
        weight: see :class:`~lightning_sgm.objectives.Term`.
        distance: such as :class:`~lightning_sgm.metrics.LPIPS` or :class:`~lightning_sgm.metrics.STLPIPS`.
        reference: the "data", or the teacher's "solution".
    """

    def __init__(
        self,
        distance: PerceptualDistance,
        weight: float = 1.0,
        reference: Literal["data", "solution"] = "data",
    ) -> None:
        super().__init__(weight)
        if reference not in ("data", "solution"):
            raise ValueError(f"reference must be data or solution, got {reference!r}")
        self._distance = [distance]  # inside a list: its weights belong in no checkpoint
        self.reference: Literal["data", "solution"] = reference

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,)."""
        wanted = phase.data if self.reference == "data" else phase.solution
        return self._distance[0].distances(phase.decode(phase.sample), phase.decode(wanted).detach())
