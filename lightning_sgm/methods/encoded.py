"""What a model makes of a batch of data before any noise comes in."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser


class Encoded(NamedTuple):
    """A batch in the space of a model.

    Attributes:
        x0: (B, *) what is modelled.
        conditions: (B, *) each, what its denoisers may ask for.
    """

    x0: Tensor
    conditions: dict[str, Tensor]


def only(conditions: dict[str, Tensor], denoiser: BaseDenoiser) -> dict[str, Any]:
    """Those conditions that the denoiser wants."""
    return {name: conditions[name] for name in denoiser.conditions}
