"""The learning rate over a run: what an update multiplies it by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Decay = Literal["constant", "linear", "cosine", "trapezoid"] | float


def check(warmup: int, decay: Decay) -> None:
    """Raise a ValueError for what :func:`factor_of` has no meaning for."""
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    if isinstance(decay, float) and not 0 < decay <= 1:
        raise ValueError(f"a decay that is a number multiplies the learning rate: it must lie in (0, 1], got {decay}")


def factor_of(warmup: int, decay: Decay, total: float, epoch: float) -> Callable[[int], float]:
    """The factor as a function of the number of updates before.

    Args:
        warmup: number of updates over which it rises linearly to 1.
        decay: "constant"; "linear" or "cosine" down to 0 over the run; "trapezoid", constant and in the last fifth
            linearly down to 0 (Haegele et al. 2024, 2405.18392); or a number by which every epoch multiplies it.
        total: updates of the run, or infinity.
        epoch: updates of an epoch, or infinity.

    Raises:
        ValueError: the run has no end, and the decay needs one.
    """
    if total == math.inf and isinstance(decay, str) and decay != "constant":
        raise ValueError(f"decay: {decay} needs an end of the run: set trainer.max_steps or trainer.max_epochs")

    def factor(update: int) -> float:
        rising = min(1.0, (update + 1) / warmup) if warmup else 1.0
        if isinstance(decay, float):
            return rising * decay ** (update // epoch)
        if decay == "constant":
            return rising
        done = min(1.0, update / max(1.0, total))
        if decay == "cosine":
            return rising * 0.5 * (1.0 + math.cos(math.pi * done))
        return rising * min(1.0, (5.0 if decay == "trapezoid" else 1.0) * (1.0 - done))

    return factor
