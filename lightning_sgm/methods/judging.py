"""Judging samples: one sampling pass feeds every metric, and training data in place of samples give the floor."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Batch, GenerativeModule


def feed(metric: Metric, batch: Batch, real: bool) -> None:
    """Give a metric the entries of the batch that it reads (its ``inputs``, "x" by default).

    A ``paired`` metric compares each sample with its own "truth" and has no use for other real data.
    """
    if real and getattr(metric, "paired", False):
        return
    metric.update(**{name: batch[name] for name in getattr(metric, "inputs", ("x",))}, real=real)


def prepare(module: GenerativeModule, metrics: list[Metric]) -> None:
    """Put metrics on the module's device, and show the data to those that learn from them (``prepare(data)``)."""
    for metric in metrics:
        metric.to(module.device)
        learn: Any = getattr(metric, "prepare", None)
        if learn is not None:
            learn(getattr(module.trainer, "datamodule", None))


def judge(module: GenerativeModule, metrics: list[Metric], count: int, floor: bool = True) -> dict[str, Tensor]:
    """Values of ``metrics``, which have seen the real data, for ``count`` samples and for as many training examples.

    Every process takes its share of both and all get the same values. A metric that is better than its floor by
    more than the floor's own scatter says nothing more about the samples. Metrics with ``floor = False`` have none, and
    without ``floor`` no metric has.

    Returns:
        "samples/NAME" and "floor/NAME" (where the data can give examples), scalars, and "samples/evaluations".
    """
    results: dict[str, Tensor] = {}
    examples = _training_examples(module, count) if floor else None
    if examples is not None:
        for metric in (metric for metric in metrics if getattr(metric, "floor", True)):
            judged = copy.deepcopy(metric)
            feed(judged, examples, real=False)
            results |= _named(judged, "floor")
    evaluations, drawn = 0.0, 0
    for indices in module.sample_batches(count):
        samples = module.sample(indices.to(module.device))
        evaluations += module.sampler_evaluations * len(indices)
        drawn += len(indices)
        for metric in metrics:
            feed(metric, samples, real=False)
    for metric in metrics:
        results |= _named(metric, "samples")
        metric.reset()
    totals = torch.tensor([evaluations, drawn], dtype=torch.float64, device=module.device)
    totals = module.trainer.strategy.reduce(totals, reduce_op="sum")
    return results | {"samples/evaluations": (totals[0] / totals[1]).float()}


def _training_examples(module: GenerativeModule, count: int) -> Batch | None:
    data: Any = getattr(module.trainer, "datamodule", None)
    if data is None or not hasattr(data, "examples"):
        return None
    rank, world = module.global_rank, module.trainer.world_size
    return {key: value[rank::world].to(module.device) for key, value in data.examples("train", count).items()}


def _named(metric: Metric, group: str) -> dict[str, Tensor]:
    value = metric.compute()
    name = str(getattr(metric, "name", type(metric).__name__))
    if isinstance(value, dict):
        return {f"{group}/{name}/{key}": torch.as_tensor(entry).float() for key, entry in value.items()}
    return {f"{group}/{name}": torch.as_tensor(value).float()}
