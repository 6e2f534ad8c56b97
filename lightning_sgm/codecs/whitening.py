"""Whitening: data turned and stretched so that no direction is small beside the noise of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_sgm.codecs.base import Codec


class Whitening(Codec):
    """z = C^(-power / 2) (x - m) for examples of mean m and covariance C: a linear map, and exactly invertible.

    Among windows of a series the within-window movements may be a thousand times smaller than the level, and the
    differences between dimensions smaller still; a model that knows one noise level for all of them blurs the small
    ones. Behind this map every direction has unit variance. The root is the symmetric one (ZCA, Bell and Sejnowski
    1997): z stays as near to x as a white vector can, so that times and dimensions keep their places. The inverse is
    in float64, as small directions are differences of large numbers.

    Its numbers come from training data (:meth:`fit`) and are stored in checkpoints.

    Args:
        power: 1 for unit variance in all directions; below 1, large directions stay larger than small ones.
        floor: variances are raised by so much of their mean, > 0: directions that the data do not have stay small.

    Attributes:
        fitted: whether the map is known.

    Raises:
        ValueError: power outside (0, 1], or a floor that is not positive.
    """

    stored = True
    of_pixels = False
    mean: Tensor
    forward_map: Tensor
    backward_map: Tensor

    def __init__(self, power: float = 1.0, floor: float = 1e-6) -> None:
        super().__init__()
        if not 0 < power <= 1 or floor <= 0:
            raise ValueError(f"Whitening needs a power in (0, 1] and a floor > 0, got {power} and {floor}")
        self.power, self.floor = power, floor
        self._fitted = False
        for name in ("mean", "forward_map", "backward_map"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))

    def shape(self, data: Sequence[int]) -> tuple[int, ...]:
        """The same; makes room for the map of data of this shape."""
        size = math.prod(data)
        if len(self.mean) != size:
            self._fitted = False
            self.mean = self.mean.new_zeros(size)
            self.forward_map = self.mean.new_zeros(size, size)
            self.backward_map = self.mean.new_zeros(size, size)
        return tuple(data)

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` has been called, now or before the checkpoint was written."""
        # Asked at every step: the device is waited for only until the answer is yes.
        self._fitted = self._fitted or bool(self.forward_map.any())
        return self._fitted

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Learn the map from examples (N, *), N >= 2.

        Raises:
            ValueError: the examples are fewer than two, do not vary, or are not finite.
        """
        self.shape(x.shape[1:])
        values = x.flatten(1).to(self.mean)
        # The sum too, as one number that is not finite makes it so.
        if len(values) < 2 or not (values.var(0).sum() > 0 and values.sum().isfinite()):
            raise ValueError(f"Whitening needs finite examples that vary, got {len(values)} that do not")
        covariance = torch.cov(values.T).reshape(len(self.mean), -1)
        variances, basis = torch.linalg.eigh(covariance)
        total = variances.clamp_min(0.0).mean()
        roots = (variances.clamp_min(0.0) + self.floor * total) ** (0.5 * self.power)
        # With a power below 1 the scale is free: unit variance on average.
        roots = roots * torch.sqrt((variances.clamp_min(0.0) / roots**2).mean())
        self.mean.copy_(values.mean(0))
        self.forward_map.copy_(basis / roots @ basis.T)
        self.backward_map.copy_(basis * roots @ basis.T)

    def encode(self, x: Tensor) -> Tensor:
        """(B, *) to white (B, *), in the type of ``x``.

        Raises:
            RuntimeError: the map is not known.
        """
        if not self.fitted:
            raise RuntimeError("Whitening does not know the data yet: fit first, or load a checkpoint")
        return ((x.flatten(1).double() - self.mean) @ self.forward_map).view(x.shape).to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse, in float64."""
        return (z.flatten(1).double() @ self.backward_map + self.mean).view(z.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Whitening:
        # bf16-true and .half() would round the map; only the device may change.
        kept = {name: getattr(self, name) for name in ("mean", "forward_map", "backward_map")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self
