"""A classifier of noisy data, which guides a generator to a class (Song et al. 2021, 2011.13456, appendix I.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_sgm.methods.base import Batch, GenerativeModule
from lightning_sgm.methods.learning_rate import Decay
from lightning_sgm.networks.base import Network, Spec, build
from lightning_sgm.objectives.denoising import Times, UniformLogSNR
from lightning_sgm.processes.gaussian import CLEAN, VE, GaussianProcess, Level, match
from lightning_sgm.random import Draw

REPORTED = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Levels sigma / alpha, for data in [-1, 1], at which ``test`` gives the accuracy beside that on clean data."""


class Classifier(GenerativeModule):
    """Estimates p(class | x_t) at every noise level, by cross-entropy on noised examples. It does not sample.

    Its network is shown x_t / sqrt(alpha^2 + sigma^2) and the label ln(sigma / alpha), as it would look under any
    process: one classifier serves generators of all of them (:class:`~lightning_sgm.guidance.ClassifierGuidance`).
    ``test`` reports the accuracy at fixed levels, with one noise draw per example.

    Args:
        network: called as network(x, label) with answers (B, K), or a factory that receives ``spec``.
        spec: of data with classes.
        process: how data become noise; it sets the range of levels, which should cover that of the generators.
        times: law of the noise levels in training; uniform in ln(sigma / alpha) by default.
        optimizer, warmup, decay, exact: see :class:`GenerativeModule`.

    Attributes:
        classes: K.
        ratios: smallest and largest sigma / alpha that it was trained on; levels beyond are taken for these.

    Raises:
        ValueError: data without classes, or levels without an end.
    """

    def __init__(
        self,
        network: Network | Callable[[Spec], Network],
        spec: dict[str, Any],
        process: GaussianProcess = VE(),
        times: Times = UniformLogSNR(),
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=2e-4),
        warmup: int = 5000,
        decay: Decay = "constant",
        exact: bool = False,
    ) -> None:
        super().__init__(spec=spec, optimizer=optimizer, warmup=warmup, decay=decay, exact=exact)
        self.record(locals())
        self.classes = int(spec.get("classes", 0))
        if self.classes < 2:
            raise ValueError("a Classifier needs data with classes: set data.labels to true")
        self.ratios = _range(process, times)
        self.network = build(network, spec)
        self.process = process
        self.times = times

    def log_probs(self, x: Tensor, level: Level) -> Tensor:
        """ln p(class | x_t = x), (B, K) float32, for x (B, *) at ``level`` (of shape () or (B,)) of any process."""
        if list(x.shape[1:]) != list(self.spec["shape"]):
            raise ValueError(
                f"the classifier was trained on data of shape {list(self.spec['shape'])}, but sees {list(x.shape[1:])}"
            )
        low, high = (math.log(ratio) for ratio in self.ratios)
        label = torch.log(level.ratio).clamp(low, high).to(x.device, torch.float32).expand(len(x))
        scale = torch.rsqrt(level.alpha**2 + level.sigma**2)
        return self.network(match(scale, x) * x, label).float().log_softmax(1)

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Cross-entropy in nats ("loss") and whether the likeliest class is right ("accuracy"), each (B,)."""
        level = self.process.level(self.times(self.process, len(batch["x"]), draw), batch["x"].device)
        log_probs = self.log_probs(self._noised(batch["x"], level, draw), level)
        loss = F.nll_loss(log_probs, batch["label"], reduction="none")
        return {"loss": loss, "accuracy": _is_right(log_probs, batch["label"])}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The mean terms over random levels, and the accuracy on clean data and at fixed levels."""
        super().test_step(batch, batch_idx)
        levels = {"clean": CLEAN}
        for ratio in REPORTED:
            if self.ratios[0] <= ratio <= self.ratios[1]:
                levels[f"sigma_{ratio:g}"] = self.process.level(self.process.t_from_ratio(ratio))
        for number, (name, level) in enumerate(levels.items()):
            x = self._noised(batch["x"], level, self.evaluation_draw(batch, 1 + number))
            self.log_terms({f"accuracy_{name}": _is_right(self.log_probs(x, level), batch["label"])}, "test")

    def _noised(self, x0: Tensor, level: Level, draw: Draw) -> Tensor:
        return self.process.perturb(x0, level, draw.normal(x0.shape, x0.dtype).to(x0.device))


def _is_right(log_probs: Tensor, label: Tensor) -> Tensor:
    return (log_probs.argmax(1) == label).float()


def _range(process: GaussianProcess, times: Times) -> tuple[float, float]:
    """Smallest and largest sigma / alpha that ``times`` draws."""
    if isinstance(times, UniformLogSNR):
        low, high = (math.exp(end) for end in times.log_range(process))
    else:
        low, high = (float(process.level(t).ratio) for t in (process.t_min, 1.0))
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"a Classifier needs levels with an end, but sigma / alpha of {type(process).__name__} goes from {low:.3g} "
            f"to {high:.3g}: choose the process VE, or times UniformLogSNR with ratio_min and ratio_max"
        )
    return low, high
