"""Hooks: what happens to a state between the steps of a rule, at one noise level."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sgm.processes.gaussian import GaussianProcess, Level, match
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import Evaluation, Levels, is_clean, per_component
from lightning_sgm.samplers.rules import noise_estimate

Norm = Literal["sample", "batch", "dimension"]
Scale = Literal["chain", "marginal"]


class Hook:
    """Base of all hooks."""

    def __call__(self, evaluate: Evaluation, x: Any, level: Levels, draw: Draw) -> Any:
        """A new state for ``x``, a tensor (B, *) or a dict of them, at the same ``level``; never changed in place."""
        raise NotImplementedError


class Langevin(Hook):
    """Langevin corrector: steps x + e score + sqrt(2 e) z at a fixed level (Song et al. 2021, algorithms 4 and 5).

    The step is e = 2 a (snr |z| / |score|)^2. Their code's factor a is 1 for VE and 1 - beta(t) / 1000 for VP, and
    missing for sub-VP; here it is the squared scale of the process's transition over 1 / 1000 of time, which is all
    three. One evaluation a step; nothing where no noise is left. Before the rule, as in their code, or after it, as in
    their algorithm 1.

    A step that depends on the sample's own norms is not exactly Langevin's: the variance becomes too large by a share
    of about 4 / D for D values per sample with norm="sample", 2 / D with "dimension", and snr^2 with any.

    Args:
        snr: r of the paper, > 0; best on CIFAR-10: 0.16 for VE, 0.01 for VP.
        steps: M >= 1 steps per level.
        norm: norms of z and the score over each "sample"; averaged over the "batch" (their code: a sample then
            depends on its batch); or each sample's score against |z| = sqrt(D), "dimension".
        scale: a as above ("chain"), or alpha(t)^2 as printed in the paper ("marginal").
    """

    def __init__(self, snr: float = 0.16, steps: int = 1, norm: Norm = "sample", scale: Scale = "chain") -> None:
        if snr <= 0 or steps < 1:
            raise ValueError(f"Langevin needs snr > 0 and steps >= 1, got {snr} and {steps}")
        if norm not in ("sample", "batch", "dimension") or scale not in ("chain", "marginal"):
            raise ValueError(
                f"norm of Langevin must be sample, batch or dimension and scale chain or marginal, "
                f"got {norm!r} and {scale!r}"
            )
        self.snr, self.steps = snr, steps
        self.norm: Norm = norm
        self.scale: Scale = scale

    def __call__(self, evaluate: Evaluation, x: Any, level: Levels, draw: Draw) -> Any:
        """``steps`` steps, jointly for all components; see :class:`Hook`."""
        if is_clean(level):
            return x
        for _ in range(self.steps):
            x0 = evaluate(x, level)
            x = per_component(self._step, x, x0, evaluate.noise_like(x, draw), evaluate.process, level)
        return x

    def _step(self, x: Tensor, x0: Tensor, noise: Tensor, process: GaussianProcess, level: Level) -> Tensor:
        if self.scale == "chain":
            factor = process.transition(process.level((level.t - 1e-3).clamp_min(0.0)), level)[0] ** 2
        else:
            factor = level.alpha**2
        estimate = noise_estimate(x, x0, level)
        size = estimate.reshape(len(x), -1).norm(dim=1)
        reach = torch.full_like(size, (x[0].numel()) ** 0.5)
        if self.norm != "dimension":
            reach = noise.reshape(len(x), -1).norm(dim=1)
        if self.norm == "batch":
            size, reach = size.mean(), reach.mean()
        # In units of sigma, score = -estimate / sigma. An untrained network may answer exactly 0: no step then.
        root = torch.where(size > 0, self.snr * reach / size, 0.0) * torch.sqrt(2.0 * factor)
        return x - match(root**2, x) * level.sigma * estimate + match(2.0**0.5 * root, x) * level.sigma * noise


class Clamp(Hook):
    """Keeps every value in [alpha low - width sigma, alpha high + width sigma], where noisy data can be.

    A guard against values that a solver or an imperfect network sends astray; without any noise left it is [low, high].

    Args:
        low: smallest value of the data.
        high: largest value of the data.
        width: standard deviations of noise to leave on both sides, >= 0.
    """

    def __init__(self, low: float = -1.0, high: float = 1.0, width: float = 5.0) -> None:
        if low >= high or width < 0:
            raise ValueError(f"Clamp needs low < high and width >= 0, got {low}, {high} and {width}")
        self.low, self.high, self.width = low, high, width

    def __call__(self, evaluate: Evaluation, x: Any, level: Levels, draw: Draw) -> Any:
        """The clamped state; see :class:`Hook`."""
        return per_component(self._clamp, x, level)

    def _clamp(self, x: Tensor, level: Level) -> Tensor:
        margin = self.width * level.sigma
        return x.clamp(float(level.alpha * self.low - margin), float(level.alpha * self.high + margin))
