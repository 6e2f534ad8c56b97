"""Pictures of a masked model in training: a text while it is unmasked, and where the loss is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sgm.methods.base import Batch

if TYPE_CHECKING:
    from lightning_sgm.methods.radd import RADD

_STAGES = 8


def unmasking(module: RADD) -> Batch:
    """Sample 0 at evenly spread numbers of network evaluations, from all masks to the text."""
    stages: list[Tensor] = []
    x = torch.full((1, module.spec["length"]), module.denoiser.mask_id, device=module.device)
    draw = module.sample_draw(torch.zeros(1, dtype=torch.int64))

    def keep(done: int, total: int, x: Tensor) -> None:
        stages.append(x[0].clone())

    module.sampler(module.denoiser, x, draw, on_event=keep)
    states = torch.stack([x[0], *stages])
    chosen = torch.linspace(0, len(stages), min(_STAGES, len(states))).round().long()
    return {"x": states[chosen.to(x.device)], "evaluations": chosen}
