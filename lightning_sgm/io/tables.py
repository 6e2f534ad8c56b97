"""Numbers for the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping

_ERROR = "standard_error"


def table(numbers: Mapping[str, float]) -> str:
    """One line per number, in the order of names, with its standard error behind it where there is one.

    The error of NAME is called NAME_standard_error; a bare standard_error belongs to the nll beside it.
    """
    errors = {_owner(name): value for name, value in numbers.items() if name.endswith(_ERROR)}
    values = {name: value for name, value in sorted(numbers.items()) if not name.endswith(_ERROR)}
    values |= {name: value for name, value in numbers.items() if name.endswith(_ERROR) and _owner(name) not in values}
    width = max(map(len, values), default=0)
    return "\n".join(f"{name:<{width}}  {_shown(value, errors.get(name))}" for name, value in values.items())


def _owner(name: str) -> str:
    head = name.removesuffix(_ERROR)
    return head.removesuffix("_") if head.endswith("_") else f"{head}nll"


def _shown(value: float, error: float | None) -> str:
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:.5g}"
    digits = max(0, 1 - math.floor(math.log10(error)))  # two of the error
    return f"{value:.{digits}f} ± {error:.{digits}f}"
