"""Pictures of a graph model in training: graphs coming out of the noise, and at which times the loss is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sgm.methods.base import Batch, Curve

if TYPE_CHECKING:
    from lightning_sgm.methods.gdss import GDSS

_STRIPS, _FRAMES, _TIMES, _EXAMPLES = 3, 8, 24, 64
_STILL = 0.05  # sigma / alpha


def reverse_strips(module: GDSS) -> Batch:
    """The way of the first samples from noise to graph.

    Returns:
        The samples, and "adj_steps" (n, S, N, N), real-valued, at the times "t" (S,).
    """
    indices = torch.arange(_STRIPS, device=module.device)
    node_mask = module.draw_node_mask(indices)
    # Below some noise nothing moves any more, and some grids end with many such steps.
    levels: list[Any] = module.sampler.levels(module.process)[1:]
    moving = max(1, sum(float(level["adj"].ratio) > _STILL for level in levels[:-1]))
    chosen = {len(levels) - 1, *torch.linspace(0, moving - 1, min(_FRAMES - 1, moving)).round().long().tolist()}
    frames: list[Tensor] = []
    times: list[float] = []

    def keep(step: int, level: Any, state: Any) -> None:
        if step in chosen:
            frames.append(state["adj"])
            times.append(float(level["adj"].t))

    samples = module.whole(module.run(indices, node_mask, keep), node_mask)
    return {**samples, "adj_steps": torch.stack(frames, 1), "t": torch.tensor(times)}


def loss_curves(module: GDSS) -> dict[str, Batch | Curve]:
    """Mean losses of validation graphs over time, one curve per component; none without a DataModule."""
    data: Any = getattr(module.trainer, "datamodule", None)
    if data is None or not hasattr(data, "examples"):
        return {}
    batch = {name: value.to(module.device) for name, value in data.examples("val", _EXAMPLES).items()}
    state, count = {name: batch[name] for name in ("x", "adj")}, len(batch["x"])
    times = torch.linspace(0.01, 1.0, _TIMES, dtype=torch.float64)
    draw, conditions = module.evaluation_draw(batch), module.conditions(batch)
    rows = [
        module.objective.parts_at(t.expand(count).to(module.device), module.denoiser, state, draw, **conditions)
        for t in times
    ]
    return {
        f"loss_{name}_by_time": Curve(
            times, torch.stack([row[name].mean() for row in rows]).cpu(), "t", f"loss of {name}"
        )
        for name in ("x", "adj")
    }
