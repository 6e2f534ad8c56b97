"""The one loop of all samplers of Gaussian processes: a grid, a rule, and hooks around it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.gaussian import CLEAN
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import Evaluation, Levels, Processes, per_component
from lightning_sgm.samplers.grids import Grid, Karras
from lightning_sgm.samplers.hooks import Hook
from lightning_sgm.samplers.rules import Heun, Rule

Finish = Literal["clean", "mean", "state"]
Shape = tuple[int, ...] | dict[str, tuple[int, ...]]


class Sampler:
    """Runs time backwards from noise to data. The default is Karras et al.'s (2022) with 35 evaluations.

    Gradients are left as the caller has them.

    Args:
        rule: how to go from one level to the next.
        steps: N >= 1 steps.
        grid: the levels.
        before: hooks at a step's first level, in front of the rule (Langevin correctors, as in Song et al.'s code).
        after: hooks at the level that a step reached.
        finish: "clean": the last of the N steps removes all noise, by x_0 itself unless the rule knows better
            (Tweedie's formula, what the last step of Song et al.'s code is for VE). "mean": all steps are among noisy
            levels, and the last adds no noise; that of the grid's last level stays. "state": the same with noise, a
            sample of the process at that level.

    Attributes:
        evaluations: network evaluations in the last call, per sample (guidance counts what it asks).
    """

    def __init__(
        self,
        rule: Rule = Heun(),
        steps: int = 18,
        grid: Grid = Karras(),
        before: list[Hook] | None = None,
        after: list[Hook] | None = None,
        finish: Finish = "clean",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps of a sampler must be at least 1, got {steps}")
        if finish not in ("clean", "mean", "state"):
            raise ValueError(f"finish of a sampler must be clean, mean or state, got {finish!r}")
        self.rule, self.steps, self.grid = rule, steps, grid
        self.before, self.after = before or [], after or []
        self.finish: Finish = finish
        self.evaluations = 0

    def __call__(
        self,
        denoiser: BaseDenoiser,
        shape: Shape | None,
        draw: Draw,
        *,
        start: Any = None,
        on_step: Callable[[int, Any, Any], None] | None = None,
        **conditions: Tensor,
    ) -> Any:
        """Draw samples.

        Args:
            denoiser: the model; a dict of shapes or tensors needs one whose process is a dict too.
            shape: (B, *) of the samples, or a dict of shapes; may be None with ``start``.
            draw: source of all noise. With keys a sample does not depend on its batch.
            start: state at the first level instead of noise drawn from ``draw``, see :meth:`prior`.
            on_step: called as on_step(step, level, state) with the state reached by each step, from 0.
            conditions: passed to the denoiser.

        Returns:
            Samples of ``shape``, float32 (or the dtype of ``start``).
        """
        levels = self.levels(denoiser.process)
        evaluate = Evaluation(denoiser, conditions)
        x = self.prior(denoiser.process, shape, draw) if start is None else start
        memory = self.rule.start(denoiser.process, levels)
        for step, (level, target) in enumerate(pairwise(levels)):
            for hook in self.before:
                x = hook(evaluate, x, level, draw)
            x, mean, memory = self.rule(evaluate, x, level, target, draw, memory)
            if self.finish == "mean" and step == self.steps - 1:
                x = mean
            for hook in self.after:
                x = hook(evaluate, x, target, draw)
            if on_step is not None:
                on_step(step, target, x)
        self.evaluations = evaluate.count
        return x

    def levels(self, process: Processes) -> list[Any]:
        """The ``steps`` + 1 levels of a run, as the grid gives them."""
        if self.finish != "clean":
            return self.grid(process, self.steps)
        return [*self.grid(process, self.steps - 1), per_component(lambda part: CLEAN, process)]

    def prior(self, process: Processes, shape: Shape | None, draw: Draw) -> Any:
        """Start noise N(0, sigma^2 I) at the first level, to be given as ``start`` where it has a source of its own."""
        return start_noise(self.levels(process)[0], shape, draw)


def start_noise(level: Levels, shape: Shape | None, draw: Draw) -> Any:
    """Noise N(0, sigma^2 I) of ``shape`` at ``level``, or a dict of it."""
    if shape is None:
        raise ValueError("a sampler needs the shape of its samples, or their start")
    return per_component(lambda shape, level: level.sigma * draw.normal(shape), shape, level)
