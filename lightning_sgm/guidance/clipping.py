"""Estimates of x_0 kept in the range of the data: the "clip_denoised" of many samplers."""

from __future__ import annotations

from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.gaussian import Time
from lightning_sgm.residual_denoiser import origin_of, with_origin


class InRange(BaseDenoiser):
    """A denoiser whose estimate of x_0 is clipped; noise, score and velocity are those that the clipped one implies.

    For sampling, not for training, which would get no gradient from what is clipped.

    Args:
        denoiser: whose answer is clipped.
        low: smallest value of x_0.
        high: largest.
    """

    def __init__(self, denoiser: BaseDenoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(denoiser.process)
        if low >= high:
            raise ValueError(f"{type(self).__name__} needs low < high, got {low} and {high}")
        self.denoiser, self.low, self.high = denoiser, low, high
        self.conditions, self.classes = denoiser.conditions, denoiser.classes

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """E[x_0 | x_t] in range; see :class:`~lightning_sgm.denoiser.BaseDenoiser`."""
        x0 = self.denoiser.x0(x, t, **conditions)
        self.cost = self.denoiser.cost
        return x0.clamp(self.low, self.high)


class ResidualInRange(InRange):
    """The same of a denoiser of residuals: the image, y + x0, is clipped. Wants the condition ``origin``, y.

    Args:
        denoiser: whose answer is clipped.
        low: smallest value of an image.
        high: largest.
    """

    def __init__(self, denoiser: BaseDenoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(denoiser, low, high)
        self.conditions = with_origin(denoiser.conditions)

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """E[x_0 - y | x_t], with the image in range; see :class:`~lightning_sgm.denoiser.BaseDenoiser`."""
        origin = origin_of(conditions, "ResidualInRange")
        wanted = {name: conditions[name] for name in self.denoiser.conditions if name in conditions}
        residual = self.denoiser.x0(x, t, **wanted)
        self.cost = self.denoiser.cost
        return (origin + residual).clamp(self.low, self.high) - origin
