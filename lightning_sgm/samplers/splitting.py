"""Symmetric splitting of the reverse SDE: its linear part solved exactly, its score frozen over a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_sgm.processes.gaussian import GaussianProcess, Level
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import Evaluation, Levels, Processes, is_clean, level_at, per_component
from lightning_sgm.samplers.hooks import Langevin
from lightning_sgm.samplers.rules import Rule, diffusion_table, refuse_pure_noise


class S4(Rule):
    """Score-based Sampling for the System of SDEs by Symmetric Splitting (Jo et al. 2022, 2202.02514, algorithm 1).

    Half a step of the linear part dx = f x dt + g dw backwards, a full step of the score -g^2 score dt, and half a
    step again. The corrector, if there is one, and the score step share one evaluation, that of the step's start: half
    the cost of a hook before the rule. The linear part is exact for every process: its variance is that of the flow
    itself, e^I - 1 where the authors' code has 1 - e^-I for VP (I is the integral of beta, 5e-4 there).

    Args:
        corrector: one Langevin step in front of each step, with its own settings; None for none.
    """

    def __init__(self, corrector: Langevin | None = None) -> None:
        if corrector is not None and corrector.steps != 1:
            raise ValueError(f"the corrector of S4 shares its one evaluation: give it 1 step, not {corrector.steps}")
        self.corrector = corrector

    def start(self, process: Processes, levels: list[Levels]) -> Any:
        """{t: (f, g^2)} of all levels."""
        return per_component(diffusion_table, process, *levels[:-1])

    def __call__(
        self, evaluate: Evaluation, x: Any, level: Levels, target: Levels, draw: Draw, memory: Any
    ) -> tuple[Any, Any, Any]:
        """One step; see :class:`Rule`."""
        x0 = evaluate(x, level)
        if is_clean(target):
            return x0, x0, memory
        start = x
        if self.corrector is not None:
            noise, sizes = evaluate.noise_like(x, draw), evaluate.sizes(x)
            x = per_component(self.corrector.step, x, x0, noise, evaluate.process, level, sizes)
        middle = per_component(_middle, evaluate.process, level, target)
        x = per_component(_linear, x, evaluate.noise_like(x, draw), evaluate.process, middle, level)
        x = per_component(self._score, x, start, x0, level, target, memory)
        mean = per_component(_scaled, x, evaluate.process, target, middle)
        x = per_component(_linear, x, evaluate.noise_like(x, draw), evaluate.process, target, middle)
        return x, mean, memory

    def _score(
        self,
        x: Tensor,
        start: Tensor,
        x0: Tensor,
        level: Level,
        target: Level,
        table: dict[float, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """x + g^2 score dt, the score that of the step's start."""
        refuse_pure_noise(self, level)
        factor = table[float(level.t)][1] * (level.t - target.t) / level.sigma**2
        return x - factor * (start - level.alpha * x0)


def _middle(process: GaussianProcess, level: Level, target: Level) -> Level:
    return level_at(process, 0.5 * (level.t + target.t))


def _scaled(x: Tensor, process: GaussianProcess, cleaner: Level, level: Level) -> Tensor:
    """Back from ``level`` to ``cleaner`` along the drift."""
    return x / process.transition(cleaner, level)[0]


def _linear(x: Tensor, noise: Tensor, process: GaussianProcess, cleaner: Level, level: Level) -> Tensor:
    """As :func:`_scaled`, with the noise that g dw adds on the way."""
    scale, std = process.transition(cleaner, level)
    return (x + std * noise) / scale
