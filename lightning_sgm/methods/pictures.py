"""Pictures of a denoising model in training: samples coming out of the noise, and where the loss is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sgm.methods.base import Batch, Curve
from lightning_sgm.processes.gaussian import Level, as_time, match

if TYPE_CHECKING:
    from lightning_sgm.methods.pad_ts import PaDTS
    from lightning_sgm.methods.resshift import ResShift
    from lightning_sgm.methods.score_sde import ScoreSDE

_STRIPS, _FRAMES, _TILE, _NOISY = 6, 10, 64, 5.0
_LEVELS, _EXAMPLES, _VALUES = 24, 64, 8192


def denoising_strips(module: ScoreSDE) -> Batch:
    """The way of the first samples from noise to data as one image of rows; states are scaled to the data's variance.

    With guidance if there is any, and of the model's classes; without the task, which is for ``predict``.
    """
    frames: list[Tensor] = []

    def keep(step: int, level: Level, x: Tensor) -> None:
        if not frames or level.ratio < _NOISY:  # before that, all states look alike
            frames.append(x / match(torch.sqrt(level.alpha**2 + level.sigma**2), x))

    indices = torch.arange(_STRIPS, device=module.device)
    shape = (_STRIPS, *module.spec["shape"])
    conditions = module.with_label(indices, {})
    module.sampler(module.guided, shape, module.sample_draw(indices), on_step=keep, **conditions)
    chosen = torch.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().long()
    images = torch.stack([frames[i] for i in chosen.tolist()], 1)  # (rows, frames, C, H, W)
    scale = max(1, -(-_TILE // max(images.shape[3:])))
    images = images.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    tiles = F.pad(images, (2, 2, 2, 2)).movedim(2, 0)  # (C, rows, frames, H, W)
    rows = tiles.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2, 3)
    return {"x": rows[None]}


def loss_curve(module: ScoreSDE | ResShift | PaDTS) -> Curve | None:
    """Mean loss of validation examples at levels spread evenly in ln(sigma / alpha); None without a DataModule."""
    data: Any = getattr(module.trainer, "datamodule", None)
    if data is None or not hasattr(data, "examples"):
        return None
    count = max(_EXAMPLES, _VALUES // math.prod(module.spec["shape"]))  # small examples are many, or the curve is rough
    batch = {name: value.to(module.device) for name, value in data.examples("val", count).items()}
    x, conditions = module.encode(batch)
    count = len(x)
    ends = [float(-0.5 * module.process.log_snr(as_time(t))) for t in (module.process.t_min, 1.0 - 1e-3)]
    log_ratio = torch.linspace(max(ends[0], -8.0), min(ends[1], 8.0), _LEVELS, dtype=torch.float64)
    times = module.process.t_from_log_snr(-2.0 * log_ratio).to(module.device)
    draw = module.evaluation_draw(batch)
    conditions = {name: conditions[name] for name in module.denoiser.conditions}
    losses = [module.objective.at(t.expand(count), module.denoiser, x, draw, **conditions).mean() for t in times]
    return Curve(log_ratio.exp(), torch.stack(losses).cpu(), "sigma / alpha", "loss", log_x=True)
