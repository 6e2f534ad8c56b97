"""Sampling with a part known, as Song et al. (2021) do it: overwrite that part in every state."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from lightning_sgm.guidance.inverse import LinearOperator
from lightning_sgm.processes.gaussian import Level
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import Evaluation, Levels, is_clean, per_component
from lightning_sgm.samplers.hooks import Hook
from lightning_sgm.samplers.loop import Sampler


class Replacement(Hook):
    """Overwrites what is known of a state by a fresh draw of what it is at that noise level (Song et al. 2021, app. I).

    x becomes x + A^+ (alpha y + sigma A eps - A x), and exactly consistent with y where no noise is left. It belongs
    after every rule and every other hook: see :meth:`around`.

    Biased: the unknown part is never told what the known part will be, only what it was one step ago. For two pixels
    with correlation 0.9, one known at 0.6, 500 steps give 0.37 and 0.28 in place of mean 0.54 and standard deviation
    0.218; a Langevin corrector repairs most of it (0.54 and 0.22 with VE, 0.50 and 0.23 with VP). PosteriorMatching
    (guidance/inverse.py) has no such bias.

    Args:
        operator: A; a dict of operators for states that are dicts.
        measurement: y of each sample, taken as free of noise, (B, *), or (1, *) for all; or a dict of them.
    """

    def __init__(
        self, operator: LinearOperator | dict[str, LinearOperator], measurement: Tensor | dict[str, Tensor]
    ) -> None:
        self.operator, self.measurement = operator, measurement

    def __call__(self, evaluate: Evaluation, x: Any, level: Levels, draw: Draw) -> Any:
        """The overwritten state; see :class:`Hook`."""
        if is_clean(level):
            return per_component(lambda x, a, y: a.replace(x, y.to(x)), x, self.operator, self.measurement)

        def replace(x: Tensor, noise: Tensor, level: Level, operator: LinearOperator, y: Tensor) -> Tensor:
            known = level.alpha * y.to(x) + level.sigma * operator.measure(noise)
            return operator.replace(x, known)

        return per_component(replace, x, evaluate.noise_like(x, draw), level, self.operator, self.measurement)

    def around(self, sampler: Sampler) -> Sampler:
        """A copy of ``sampler`` that overwrites its start, and again after its rule and after each of its hooks.

        With finish "mean" the known part of the result has the noise of the last level, and the unknown part none.
        """
        replaced = copy.copy(sampler)
        replaced.before = [self, *(hook for each in sampler.before for hook in (each, self))]
        replaced.after = [self, *(hook for each in sampler.after for hook in (each, self))]
        return replaced
