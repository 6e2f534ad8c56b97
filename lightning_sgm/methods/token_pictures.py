"""Pictures of a masked model in training: a text while it is unmasked, and where the loss is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sgm.methods.base import Batch, Curve
from lightning_sgm.objectives.masked import nll_by_masked_fraction

if TYPE_CHECKING:
    from lightning_sgm.methods.radd import RADD

_STAGES, _FRACTIONS, _TOKENS = 8, 16, 8192


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


def masking_curve(module: RADD) -> Curve | None:
    """Mean loss of a masked token of validation texts by how much of them is masked; None without a DataModule."""
    data: Any = getattr(module.trainer, "datamodule", None)
    if data is None or not hasattr(data, "examples"):
        return None
    batch = data.examples("val", max(4, _TOKENS // module.spec["length"]))
    batch = {name: value.to(module.device) for name, value in batch.items()}
    fractions = torch.arange(1, _FRACTIONS + 1, dtype=torch.float64) / _FRACTIONS
    draw, conditions = module.evaluation_draw(batch), module.conditions(batch)
    nll = nll_by_masked_fraction(module.denoiser, batch["x"], draw, fractions, **conditions)
    return Curve(fractions, nll.cpu(), "masked fraction", "nats per masked token")
