"""Judging samples: one sampling pass feeds every metric, and training data in place of samples give the floor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Batch, GenerativeModule

_PIECE = 256  # examples fed to a metric at once


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
    without ``floor`` no metric has, nor where the data hold nothing out. Metrics with ``against_train = True`` also
    compare the samples with the training examples: there a model that learns by heart is better than the floor.

    Returns:
        "samples/NAME", "floor/NAME" (where the data can give examples) and "against_train/NAME", scalars, and
        "samples/evaluations".
    """
    results: dict[str, Tensor] = {}
    examples = _training_examples(module, count) if floor else None
    against: list[Metric] = []
    if examples is not None:
        for metric in (metric for metric in metrics if getattr(metric, "floor", True)):
            judged = copy.deepcopy(metric)
            if hasattr(judged, "halves"):
                judged.halves = False  # those of the real data, which the metric itself says
            _feed_pieces(judged, examples, real=False)
            results |= {name: value for name, value in _named(judged, "floor").items() if not name.endswith("/halves")}
        against = [copy.deepcopy(metric) for metric in metrics if getattr(metric, "against_train", False)]
        for metric in against:
            metric.reset()
            _feed_pieces(metric, examples, real=True)
    evaluations, drawn = 0.0, 0
    for indices in module.sample_batches(count):
        samples = module.sample(indices.to(module.device))
        evaluations += module.sampler_evaluations * len(indices)
        drawn += len(indices)
        for metric in (*metrics, *against):
            feed(metric, samples, real=False)
    for metric in against:
        results |= {
            name: value for name, value in _named(metric, "against_train").items() if not name.endswith("/halves")
        }
    for metric in metrics:
        results |= _named(metric, "samples")
        metric.reset()
    return results | {"samples/evaluations": _mean_over_processes(module, evaluations, drawn)}


class Rivalry:
    """What several ways make of the same data, judged side by side: a copy of every metric for each of them.

    Args:
        metrics: what judges them.
        names: of the ways; the same on every process.
    """

    def __init__(self, metrics: list[Metric], names: Sequence[str]) -> None:
        # Frozen networks are not copied with the sums.
        frozen = {id(part): part for metric in metrics for part in getattr(metric, "frozen", ())}
        self._judges = {name: [copy.deepcopy(metric, dict(frozen)) for metric in metrics] for name in names}
        self._evaluations, self._seen = 0.0, 0

    def update(self, found: dict[str, Tensor], truth: Tensor, evaluations: float) -> None:
        """Add images or the like, (B, *) each, made of the data whose ``truth`` (B, *) is known.

        ``evaluations`` is what one of the "samples" cost.
        """
        for name, metrics in self._judges.items():
            for metric in metrics:
                feed(metric, {"x": truth}, real=True)
                feed(metric, {"x": found[name], "truth": truth}, real=False)
        self._evaluations, self._seen = self._evaluations + evaluations * len(truth), self._seen + len(truth)

    def compute(self, module: GenerativeModule) -> dict[str, Tensor]:
        """Scalars of all processes together, as WAY/METRIC, and samples/evaluations."""
        results: dict[str, Tensor] = {}
        for name, metrics in self._judges.items():
            for metric in metrics:
                results |= _named(metric, name)
        return results | {"samples/evaluations": _mean_over_processes(module, self._evaluations, self._seen)}


def _mean_over_processes(module: GenerativeModule, total: float, count: int) -> Tensor:
    totals = torch.tensor([total, count], dtype=torch.float64, device=module.device)
    totals = module.trainer.strategy.reduce(totals, reduce_op="sum")
    return (totals[0] / totals[1]).float()


def _feed_pieces(metric: Metric, examples: Batch, real: bool) -> None:
    """Feed many examples in pieces of the size in which samples come."""
    pieces = [value.split(_PIECE) for value in examples.values()]
    for piece in zip(*pieces, strict=True):
        feed(metric, dict(zip(examples, piece, strict=True)), real)


def _training_examples(module: GenerativeModule, count: int) -> Batch | None:
    data: Any = getattr(module.trainer, "datamodule", None)
    if data is None or not hasattr(data, "examples") or not getattr(data, "held_out", True):
        return None
    rank, world = module.global_rank, module.trainer.world_size
    return {key: value[rank::world].to(module.device) for key, value in data.examples("train", count).items()}


def _named(metric: Metric, group: str) -> dict[str, Tensor]:
    value = metric.compute()
    name = str(getattr(metric, "name", type(metric).__name__))
    if not isinstance(value, dict):
        return {f"{group}/{name}": torch.as_tensor(value).float()}
    # What a metric is named after, and its error, need no second name.
    own = {key: key == name or key.startswith(f"{name}_") for key in value}
    return {
        f"{group}/{key}" if own[key] else f"{group}/{name}/{key}": torch.as_tensor(entry).float()
        for key, entry in value.items()
    }
