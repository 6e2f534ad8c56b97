"""The learning rate over a run: what an update multiplies it by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

Shape = Literal["constant", "linear", "cosine", "trapezoid"]
Decay = Shape | float


def check(warmup: int, decay: Decay) -> None:
    """Raise a ValueError for what :func:`factor_of` has no meaning for."""
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    if isinstance(decay, str) and decay not in get_args(Shape):
        raise ValueError(f"decay is a number or one of {', '.join(get_args(Shape))}, got {decay!r}")
    if not isinstance(decay, str) and not 0 < decay <= 1:
        raise ValueError(f"a decay that is a number multiplies the learning rate: it must lie in (0, 1], got {decay}")


def check_end(decay: Decay) -> None:
    """Raise a ValueError for a decay that cannot do without an end of the run."""
    if isinstance(decay, str) and decay != "constant":
        raise ValueError(f"decay: {decay} needs an end of the run: set trainer.max_steps or trainer.max_epochs")


def factor_of(
    warmup: int, decay: Decay, total: Callable[[], float], epoch: Callable[[], float]
) -> Callable[[int], float]:
    """The factor as a function of the number of updates before.

    Args:
        warmup: number of updates over which it rises linearly to 1.
        decay: "constant"; "linear" or "cosine" down to 0 over the run; "trapezoid", constant and in the last fifth
            linearly down to 0 (Haegele et al. 2024, 2405.18392); or a number by which every epoch multiplies it.
        total: gives the updates of the run, or infinity. It and ``epoch`` are asked from the second update on: before
            the first one Lightning may not know yet where in an epoch a resumed run is.
        epoch: gives the updates of an epoch, or infinity.
    """

    def factor(update: int) -> float:
        rising = min(1.0, (update + 1) / warmup) if warmup else 1.0
        if decay == "constant" or update == 0:
            return rising
        if not isinstance(decay, str):
            return rising * float(decay) ** (update // epoch())
        done = min(1.0, update / max(1.0, total()))
        if decay == "cosine":
            return rising * 0.5 * (1.0 + math.cos(math.pi * done))
        return rising * min(1.0, (5.0 if decay == "trapezoid" else 1.0) * (1.0 - done))

    return factor
