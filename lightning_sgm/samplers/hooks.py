"""Hooks: what happens to a state between the steps of a rule, at one noise level."""

from __future__ import annotations

from collections.abc import Callable
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

    The step is e = 2 a (snr |z| / |score|)^2. Their code's factor a is 1 for VE and 1 - beta_i for VP, and missing for
    sub-VP; here it is the squared scale of the process's transition over one step of its chain (1 / 1000 of time for
    continuous processes), which is all three. One evaluation a step; nothing where no noise is left. Before the rule,
    as in their code, or after it, as in their algorithm 1.

    A step that depends on the sample's own norms is not exactly Langevin's: the variance becomes too large by a share
    of about 4 / D for D values per sample with norm="sample", 2 / D with "dimension", and snr^2 with any.

    Args:
        snr: r of the paper, > 0; best on CIFAR-10: 0.16 for VE, 0.01 for VP.
        steps: M >= 1 steps per level.
        norm: norms of z and the score over each "sample"; averaged over the "batch" (their code: a sample then
            depends on its batch); or each sample's score against |z| = sqrt(D), "dimension".
        scale: a as above ("chain"), or alpha(t)^2 as printed in the paper ("marginal").
        noise_scale: factor of the noise alone, >= 0; below 1 it sharpens the law (scale_eps of Jo et al. 2022).
    """

    def __init__(
        self,
        snr: float = 0.16,
        steps: int = 1,
        norm: Norm = "sample",
        scale: Scale = "chain",
        noise_scale: float = 1.0,
    ) -> None:
        _check(self, snr, steps, scale)
        if noise_scale < 0:
            raise ValueError(f"noise_scale of Langevin must be at least 0, got {noise_scale}")
        if norm not in ("sample", "batch", "dimension"):
            raise ValueError(f"norm of Langevin must be sample, batch or dimension, got {norm!r}")
        self.snr, self.steps = snr, steps
        self.norm: Norm = norm
        self.scale: Scale = scale
        self.noise_scale = noise_scale

    def __call__(self, evaluate: Evaluation, x: Any, level: Levels, draw: Draw) -> Any:
        """``steps`` steps, jointly for all components; see :class:`Hook`."""
        return _repeat(self.steps, self.step, evaluate, x, level, draw)

    def step(
        self, x: Tensor, x0: Tensor, noise: Tensor, process: GaussianProcess, level: Level, count: Tensor
    ) -> Tensor:
        """One step of one component.

        Args:
            x: (B, *) state at ``level``.
            x0: what the denoiser made of it.
            noise: standard normal, like ``x``.
            process: of the component.
            level: its level.
            count: values of each sample, () or (B,).
        """
        estimate = noise_estimate(x, x0, level)
        size = estimate.reshape(len(x), -1).norm(dim=1)
        reach = count.to(size).sqrt().expand_as(size)
        if self.norm != "dimension":
            reach = noise.reshape(len(x), -1).norm(dim=1)
        if self.norm == "batch":
            size, reach = size.mean(), reach.mean()
        # In units of sigma, score = -estimate / sigma. An untrained network may answer exactly 0: no step then.
        root = torch.where(size > 0, self.snr * reach / size, 0.0) * torch.sqrt(
            2.0 * _scale(self.scale, process, level)
        )
        return _move(x, estimate, self.noise_scale * noise, level, root)


class AnnealedLangevin(Hook):
    """Langevin steps of a size that only the noise level sets: e = 2 a (snr sigma)^2 (Song and Ermon 2019).

    The "ald" corrector of Song et al.'s code, kept for completeness; alone it needs many steps (score_sde.md 2.4).

    Args:
        snr: r, > 0.
        steps: M >= 1 steps per level.
        scale: the factor a, see :class:`Langevin`.
    """

    def __init__(self, snr: float = 0.16, steps: int = 1, scale: Scale = "chain") -> None:
        _check(self, snr, steps, scale)
        self.snr, self.steps = snr, steps
        self.scale: Scale = scale

    def __call__(self, evaluate: Evaluation, x: Any, level: Levels, draw: Draw) -> Any:
        """``steps`` steps, jointly for all components; see :class:`Hook`."""
        return _repeat(self.steps, self._step, evaluate, x, level, draw)

    def _step(
        self, x: Tensor, x0: Tensor, noise: Tensor, process: GaussianProcess, level: Level, count: Tensor
    ) -> Tensor:
        root = self.snr * torch.sqrt(2.0 * _scale(self.scale, process, level))
        return _move(x, noise_estimate(x, x0, level), noise, level, root)


def _check(hook: Hook, snr: float, steps: int, scale: str) -> None:
    if snr <= 0 or steps < 1 or scale not in ("chain", "marginal"):
        raise ValueError(
            f"{type(hook).__name__} needs snr > 0, steps >= 1 and scale chain or marginal, got {snr}, {steps} and "
            f"{scale!r}"
        )


def _repeat(steps: int, step: Callable[..., Tensor], evaluate: Evaluation, x: Any, level: Levels, draw: Draw) -> Any:
    """``steps`` Langevin steps of a state and all its components; none where no noise is left."""
    if is_clean(level):
        return x
    for _ in range(steps):
        x0 = evaluate(x, level)
        x = per_component(step, x, x0, evaluate.noise_like(x, draw), evaluate.process, level, evaluate.sizes(x))
    return x


def _scale(kind: Scale, process: GaussianProcess, level: Level) -> Tensor:
    """The factor a of a Langevin step."""
    if kind == "marginal":
        return level.alpha**2
    before = process.level((level.t - process.chain_step).clamp_min(0.0))
    return process.transition(before, level)[0] ** 2


def _move(x: Tensor, estimate: Tensor, noise: Tensor, level: Level, root: Tensor) -> Tensor:
    """x + e score + sqrt(2 e) z with e = (root sigma)^2, for the estimated noise -sigma score."""
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
