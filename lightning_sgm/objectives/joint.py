"""Denoising of states of several components under one time: the partial-score objective of Jo et al. 2022."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.objectives.denoising import DenoisingObjective
from lightning_sgm.random import Draw

State = dict[str, Tensor]


class JointObjective(DenoisingObjective):
    """The denoising error of every component, at one time per example (Jo et al. 2022, 2202.02514, eq. 5).

    The times are those of the first component's process. Arguments are those of :class:`DenoisingObjective`; reduction
    "half_sum" is the paper's, "mean" is over the values that the process counts (padding is not among them), so that
    large graphs do not weigh more than small ones.
    """

    def __call__(self, denoiser: BaseDenoiser, x0: Any, draw: Draw, **conditions: Tensor) -> dict[str, Tensor]:
        """Losses per example.

        Args:
            denoiser: what is trained, a :class:`~lightning_sgm.joint_denoiser.JointDenoiser`.
            x0: dict of (B, *) clean components.
            draw: source of times and noise.
            conditions: passed on to the network, and to the process for its noise.

        Returns:
            "loss" (B,), the sum of "loss_NAME" (B,) of all components.
        """
        process: Any = denoiser.process
        first = next(iter(x0))
        times = self.times(process[first], len(x0[first]), draw)
        parts = self.parts_at(times, denoiser, x0, draw, **conditions)
        return {"loss": torch.stack(list(parts.values())).sum(0)} | {
            f"loss_{name}": part for name, part in parts.items()
        }

    def at(self, times: Tensor, denoiser: BaseDenoiser, x0: Any, draw: Draw, **conditions: Tensor) -> Tensor:
        """Losses (B,) at given times (B,), summed over the components."""
        return torch.stack(list(self.parts_at(times, denoiser, x0, draw, **conditions).values())).sum(0)

    def parts_at(
        self, times: Tensor, denoiser: BaseDenoiser, x0: State, draw: Draw, **conditions: Tensor
    ) -> dict[str, Tensor]:
        """Losses (B,) of each component at given times (B,)."""
        process: Any = denoiser.process
        device = next(iter(x0.values())).device
        levels = {name: part.level(times, device) for name, part in process.items()}
        noise = process.noise_like(x0, draw, conditions)
        x = {name: process[name].perturb(part, levels[name], noise[name]) for name, part in x0.items()}
        answer: Any = getattr(denoiser, self.weight.of)(x, times, **conditions)
        sizes = process.sizes(x0, conditions)
        losses = {}
        for name, part in x0.items():
            total = self.squared(answer[name], part, noise[name], levels[name], process[name]).sum(1)
            losses[name] = 0.5 * total if self.reduction == "half_sum" else total / sizes[name].clamp_min(1)
        return losses
