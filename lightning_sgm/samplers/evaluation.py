"""What grids, rules and hooks share: states, levels and the counted evaluation of a denoiser.

A state is x_t itself: a tensor of shape (B, *), or a dict of tensors that diffuse together under one time (a graph's
nodes and adjacency). Levels follow: a :class:`Level`, or a dict of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.gaussian import GaussianProcess, Level
from lightning_sgm.random import Draw

State = Tensor | dict[str, Tensor]
Levels = Level | dict[str, Level]
Processes = GaussianProcess | dict[str, GaussianProcess]
Part = TypeVar("Part")


def per_component(function: Callable[..., Any], *parts: Any) -> Any:
    """``function`` of plain ``parts``, or of the parts of each component where they are dicts.

    With it a step is written once, for one tensor. A function that returns a tuple gives a tuple of dicts.
    """
    if not isinstance(parts[0], dict):
        return function(*parts)
    results = {name: function(*(part[name] for part in parts)) for name in parts[0]}
    example = next(iter(results.values()))
    if type(example) is tuple:
        return tuple({name: result[i] for name, result in results.items()} for i in range(len(example)))
    return results


def first(parts: Part | dict[str, Part]) -> Part:
    """The part itself, or that of the first component."""
    return next(iter(parts.values())) if isinstance(parts, dict) else parts


def level_at(process: Processes, t: Tensor) -> Any:
    """Level of every component at the time ``t``."""
    return per_component(lambda part: part.level(t), process)


def is_clean(level: Levels) -> bool:
    """Whether no noise is left at ``level``."""
    return not first(level).sigma.any()


class Evaluation:
    """``evaluate(x, level) -> x0`` for one run: one joint answer of the denoiser, its network evaluations counted.

    The last answer is remembered: asking again about the same state object at the same level is free, so whoever
    changes a state makes a new tensor.

    Args:
        denoiser: whose ``x0`` is asked; its ``process`` is a dict where the state is one.
        conditions: passed to the denoiser every time.

    Attributes:
        process: the denoiser's process, for rules and hooks that need its drift, transition or posterior.
        count: network evaluations so far, per sample: the denoiser's ``cost`` for each answer, 1 where it has none.
    """

    def __init__(self, denoiser: BaseDenoiser, conditions: Mapping[str, Tensor] | None = None) -> None:
        self.process: Any = denoiser.process
        self.count = 0
        self._denoiser = denoiser
        self._conditions = dict(conditions or {})
        self._last: tuple[State, float, State] | None = None

    def __call__(self, x: Any, level: Levels) -> Any:
        """E[x_0 | x_t = x], like ``x``."""
        t = first(level).t
        if self._last is None or self._last[0] is not x or self._last[1] != float(t):
            self._last = (x, float(t), self._denoiser.x0(x, t, **self._conditions))
            self.count += getattr(self._denoiser, "cost", 1)
        return self._last[2]

    def noise_like(self, x: Any, draw: Draw) -> Any:
        """Standard normal noise of the state's shape, of the process's own law if it has one.

        It is the only noise of rules and hooks.
        """
        own = getattr(self.process, "noise_like", None)
        if own is not None:
            return own(x, draw, self._conditions)
        return per_component(lambda part: draw.normal(part.shape, part.dtype), x)

    def sizes(self, x: Any) -> Any:
        """Number of values of each sample in each component, () or (B,): padding of the process's is not counted."""
        own = getattr(self.process, "sizes", None)
        if own is not None:
            return own(x, self._conditions)
        return per_component(lambda part: torch.tensor(part[0].numel()), x)
