"""What graph models refuse before they train or sample, rather than when it is met."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_sgm.methods.judging import feed, prepare

if TYPE_CHECKING:
    from lightning_sgm.methods.gdss import GDSS

# Each process holds pieces of the parameters, so it knows no network's norm.
_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def require_clipping(trainer: Trainer) -> None:
    """Raise a ValueError if gradients are to be clipped in a way that is not the norm of each network."""
    if not trainer.gradient_clip_val:
        return
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise ValueError("GDSS clips the norm of each network's gradient: leave out gradient_clip_algorithm")
    if isinstance(trainer.strategy, _SHARDED):
        raise ValueError(
            f"GDSS cannot clip each network's gradient under {type(trainer.strategy).__name__}, which spreads the "
            "parameters over the processes: leave out gradient_clip_val, or use strategy: ddp"
        )


def require_judges(module: GDSS) -> None:
    """Raise a ValueError if validations would feed samples to a metric that cannot judge such data.

    Each metric is shown two training graphs as data and as samples, and forgets them.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    if not module.val_samples or data is None or not hasattr(data, "examples"):
        return
    batch = {name: value.to(module.device) for name, value in data.examples("train", 2).items()}
    for metric in module.metrics:
        try:
            prepare(module, [metric])
            for real in (True, False):
                feed(metric, batch, real)
        except Exception as error:  # metrics of other kinds of data fail in many ways
            raise ValueError(
                f"the metric {type(metric).__name__} cannot judge these data, of kind {data.spec['kind']!r}: {error}"
            ) from error
        metric.reset()


def require_node_mask(node_mask: Tensor, samples: int, nodes: int) -> None:
    """Raise a ValueError unless ``node_mask`` is (samples, N) bool, N <= ``nodes``, each row some true, then false."""
    shape = tuple(node_mask.shape)
    if node_mask.dtype != torch.bool or len(shape) != 2 or shape[0] != samples or shape[1] > nodes:
        raise ValueError(
            f"node_mask must be bool of shape ({samples}, N), one row for each sample and N at most {nodes}, the nodes "
            f"of the data's largest graph, got {node_mask.dtype} of shape {shape}"
        )
    count = node_mask.sum(1, keepdim=True)
    wrong = (node_mask != (torch.arange(shape[1], device=node_mask.device) < count)).any(1) | (count[:, 0] == 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"node_mask must have one node or more in each row, and the nodes first: row {row} is "
            f"{node_mask[row].int().tolist()}"
        )
