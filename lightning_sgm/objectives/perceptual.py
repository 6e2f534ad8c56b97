"""A term of distillation that looks at images as people do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lightning_sgm.metrics.perceptual import LPIPS, STLPIPS, PerceptualDistance
from lightning_sgm.objectives.distillation import Phase, Term

DistanceName = Literal["st_lpips", "st_lpips_vgg", "lpips", "lpips_vgg"]
_DISTANCES: dict[str, Callable[[], PerceptualDistance]] = {
    "st_lpips": STLPIPS,
    "st_lpips_vgg": lambda: STLPIPS(net="vgg"),
    "lpips": LPIPS,
    "lpips_vgg": lambda: LPIPS(net="vgg"),
}


class Perceptual(Term):
    """Distance of the student's decoded sample from an image, by the features of a network (Zhang et al. 2018).

    The loss that distillation to few steps often has in place of, or beside, squared errors (Song et al. 2023,
    2303.01469), and ResShift's journal version in training (Yue et al. 2024, 2403.07319). A distance that trained a
    model no longer judges it fairly: report another one beside it.

    Args:
        distance: by name, "st_lpips" on AlexNet (of the package stlpips-pytorch), "st_lpips_vgg", "lpips" on AlexNet
            or "lpips_vgg" (downloaded), or in Python a distance. It is made when it is first asked for: what was
            trained with it does without.
        weight: see :class:`~lightning_sgm.objectives.Term`.
        reference: the "data" as the codec gives them back, or the teacher's "solution".
    """

    def __init__(
        self,
        distance: DistanceName | PerceptualDistance = "st_lpips",
        weight: float = 1.0,
        reference: Literal["data", "solution"] = "data",
    ) -> None:
        super().__init__(weight)
        if reference not in ("data", "solution"):
            raise ValueError(f"reference must be data or solution, got {reference!r}")
        if isinstance(distance, str) and distance not in _DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(_DISTANCES)}, got {distance!r}")
        # Inside a list: its weights belong in no checkpoint.
        self._distance: list[PerceptualDistance] = [] if isinstance(distance, str) else [distance]
        self._name = distance if isinstance(distance, str) else ""
        self.reference: Literal["data", "solution"] = reference

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,)."""
        if not self._distance:
            self._distance = [_DISTANCES[self._name]()]
        wanted = phase.data if self.reference == "data" else phase.solution
        return self._distance[0].distances(phase.decode(phase.sample), phase.decode(wanted).detach())
