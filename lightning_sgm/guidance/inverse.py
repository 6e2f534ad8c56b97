"""Inverse problems y = A x_0 + noise: linear measurements, and the denoiser of what they leave open."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.gaussian import Time, match


class LinearOperator:
    """Base of all linear measurements y = A x of examples x (B, *).

    A subclass gives :meth:`measure`, its :meth:`adjoint` and its :meth:`inverse`. Measurements are in the units of the
    data (a mean of pixels, not their sum), so that they can be looked at and their noise is that of a pixel.
    """

    def measure(self, x: Tensor) -> Tensor:
        """A x.

        Raises:
            ValueError: ``x`` has a shape that A does not take.
        """
        raise NotImplementedError

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, shaped like x."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """A^+ y, the shortest x with A x = y (pseudo-inverse), shaped like x."""
        raise NotImplementedError

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """y - A x for measurements y of each example, or (1, *) for all.

        Raises:
            ValueError: ``y`` has another shape than A x.
        """
        measured = self.measure(x)
        if y.ndim != measured.ndim or y.shape[1:] != measured.shape[1:] or len(y) not in (1, len(x)):
            raise ValueError(
                f"{type(self).__name__} gives measurements of shape {tuple(measured.shape)} for examples of shape "
                f"{tuple(x.shape)}, got {tuple(y.shape)}: give one for each example, or one with first size 1 for all"
            )
        return y - measured

    def replace(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` with what A sees of it replaced by ``y``, everything else kept: x + A^+ (y - A x)."""
        return x + self.inverse(self.residual(x, y))


class Mask(LinearOperator):
    """Known entries. Measurements keep the shape of x and are 0 where nothing is known.

    Args:
        known: nonzero where x is known: one mask (*), without the channels of an image if they share it (H, W), or
            one for each example of the batch (B, *); sizes of 1 stand for all channels or examples.
    """

    def __init__(self, known: Tensor) -> None:
        self.known = known != 0

    def measure(self, x: Tensor) -> Tensor:
        """x, 0 where unknown."""
        return torch.where(self._known(x), x, 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        """y, 0 where unknown."""
        return self.measure(y)

    def inverse(self, y: Tensor) -> Tensor:
        """y, 0 where unknown."""
        return self.measure(y)

    def replace(self, x: Tensor, y: Tensor) -> Tensor:
        """Bit by bit: y where known, x elsewhere."""
        self.residual(x, y)  # refuses a wrong shape
        return torch.where(self._known(x), y, x)

    def _known(self, x: Tensor) -> Tensor:
        """The mask, ready to be broadcast over ``x``."""
        mine = self.known.shape
        theirs = x.shape[x.ndim - len(mine) :] if len(mine) <= x.ndim else ()
        # Of an image's sizes, that of the batch and the channels may be 1; never its sides.
        free = 2 if x.ndim > 2 else 1
        places = range(x.ndim - len(mine), x.ndim)
        if len(theirs) != len(mine) or any(
            m != s and not (m == 1 and place < free) for m, s, place in zip(mine, theirs, places, strict=True)
        ):
            raise ValueError(
                f"a mask of shape {tuple(mine)} does not fit examples of shape {tuple(x.shape[1:])}: it must have "
                "their shape, with or without channels"
            )
        return self.known.to(x.device)


class Gray(LinearOperator):
    """Mean of the channels of images (B, C, H, W): what a gray picture tells of a coloured one.

    Up to a factor sqrt(C) this is the first axis of the rotated colours in Song et al. (2021, appendix I.3). Replacing
    it moves all channels by the same amount, so the axes of colour never have to be computed.

    Args:
        channels: C >= 2.
    """

    def __init__(self, channels: int = 3) -> None:
        if channels < 2:
            raise ValueError(f"colours need at least 2 channels, got {channels}: images with one are gray already")
        self.channels = channels

    def measure(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 1, H, W)."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"Gray needs images (B, {self.channels}, H, W), got shape {tuple(x.shape)}")
        return x.mean(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """y / C in every channel."""
        return self.inverse(y) / self.channels

    def inverse(self, y: Tensor) -> Tensor:
        """y in every channel."""
        return y.expand(-1, self.channels, -1, -1)


class Average(LinearOperator):
    """Means over blocks of size x size pixels of images (B, C, H, W): what is left of them in low resolution.

    Args:
        size: side of a block, >= 1; it must divide H and W.
    """

    def __init__(self, size: int = 2) -> None:
        if size < 1:
            raise ValueError(f"size of the averaged blocks must be at least 1, got {size}")
        self.size = size

    def measure(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / size, W / size)."""
        if x.ndim != 4 or x.shape[2] % self.size or x.shape[3] % self.size:
            raise ValueError(
                f"Average needs images (B, C, H, W) whose sides {self.size} divides, got shape {tuple(x.shape)}"
            )
        return functional.avg_pool2d(x, self.size)

    def adjoint(self, y: Tensor) -> Tensor:
        """y / size^2 in every pixel of a block."""
        return self.inverse(y) / self.size**2

    def inverse(self, y: Tensor) -> Tensor:
        """y in every pixel of a block."""
        return y.repeat_interleave(self.size, dim=2).repeat_interleave(self.size, dim=3)


class Matrix(LinearOperator):
    """Any matrix on flattened examples, through its singular values.

    Args:
        matrix: (M, D) for examples of D values; measurements are (B, M).
        shape: of an example where it is no vector, with D values in all.
    """

    def __init__(self, matrix: Sequence[Sequence[float]] | Tensor, shape: Sequence[int] | None = None) -> None:
        self.matrix = torch.as_tensor(matrix, dtype=torch.float64)
        if self.matrix.ndim != 2:
            raise ValueError(f"a matrix has the shape (M, D), got {tuple(self.matrix.shape)}")
        self.shape = tuple(shape or self.matrix.shape[1:])
        if math.prod(self.shape) != self.matrix.shape[1]:
            raise ValueError(
                f"a matrix of shape {tuple(self.matrix.shape)} takes examples of {self.matrix.shape[1]} values, "
                f"which shape {self.shape} has not"
            )
        self._inverse = torch.linalg.pinv(self.matrix)

    def measure(self, x: Tensor) -> Tensor:
        """(B, *) to (B, M)."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"a matrix of shape {tuple(self.matrix.shape)} measures examples of shape {self.shape}, "
                f"got {tuple(x.shape[1:])}"
            )
        return x.flatten(1) @ self.matrix.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        """(B, M) to (B, *)."""
        return (y @ self.matrix.to(y)).reshape(-1, *self.shape)

    def inverse(self, y: Tensor) -> Tensor:
        """(B, M) to (B, *)."""
        return (y @ self._inverse.to(y).T).reshape(-1, *self.shape)


class PosteriorMatching(BaseDenoiser):
    """E[x_0 | x_t, y] for y = A x_0 + noise, from a denoiser that knows nothing of y.

    p(x_0 | x_t) is taken as the Gaussian of its mean x0 and covariance C = (sigma^2 / alpha) d x0 / d x_t (both exact
    for an exact denoiser: Tweedie's formulas), so that the answer is x0 + C A^T (A C A^T + noise^2)^-1 (y - A x0)
    (Boys et al. 2023, 2310.06721; Rozet et al. 2024, 2405.13712). Exact for Gaussian data. C is never formed: each of a
    few conjugate-gradient iterations, by themselves for every example, is one product of a vector with the Jacobian,
    which counts as one evaluation of the network in ``cost``.

    Args:
        denoiser: what it knows of the data.
        operator: A.
        measurement: y of each example, (B, *), or (1, *) for all.
        noise: its standard deviation, >= 0. With 0, A times the answer is y, however few the iterations.
        iterations: of the conjugate gradients, >= 1; as many as there are numbers in y are exact.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        operator: LinearOperator,
        measurement: Tensor,
        noise: float = 0.0,
        iterations: int = 3,
    ) -> None:
        super().__init__(denoiser.process)
        if noise < 0 or iterations < 1:
            raise ValueError(f"posterior matching needs noise >= 0 and iterations >= 1, got {noise} and {iterations}")
        self.denoiser, self.operator, self.measurement = denoiser, operator, measurement
        self.noise_std, self.iterations = noise, iterations
        self.conditions, self.classes = denoiser.conditions, denoiser.classes

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """E[x_0 | x_t, y] for x of shape (B, *); works in every grad mode.

        Raises:
            ValueError: where alpha = 0, x_t and x_0 share nothing.
        """
        level = self.process.level(t)
        if not level.alpha.all():
            raise ValueError(
                f"nothing of the data is left at t = 1 under {type(self.process).__name__}, so posterior matching "
                "cannot start there: use a Sampler on the grid LogUniform or Karras"
            )
        y = self.measurement.to(x)
        # vjp, not autograd: predict runs in inference mode, where autograd refuses to work.
        answer = torch.func.vjp(lambda x: self.denoiser.x0(x, t, **conditions), x)
        x0, pull = answer[0], answer[1]
        self.cost = (1 + self.iterations) * self.denoiser.cost
        scale = match(level.sigma**2 / level.alpha, x)
        # A A^+: what no x could explain of y (values where a mask knows nothing) would only mislead the iterations.
        residual = self.operator.measure(self.operator.inverse(self.operator.residual(x0, y)))
        largest = torch.as_tensor((level.sigma / level.alpha) ** 2).to(x)
        x0 = x0 + self._correction(lambda v: scale * pull(v)[0], residual, largest)
        return x0 if self.noise_std else self.operator.replace(x0, y)

    def _correction(self, covariance: Callable[[Tensor], Tensor], residual: Tensor, largest: Tensor) -> Tensor:
        """C A^T (A C A^T + noise^2)^-1 residual, by conjugate gradients in the space of y.

        A learned Jacobian is no covariance: it may show a curvature v C v near 0 beside a large C v, and a step without
        bounds would follow. v C v >= |C v|^2 / ``largest``, which holds for all covariances up to (sigma / alpha)^2
        (those of Gaussian data among them), is therefore imposed.
        """
        correction: Tensor | float = 0.0
        direction, size = residual, _dot(residual, residual)
        for _ in range(self.iterations):
            spread = covariance(self.operator.adjoint(direction))
            image = self.operator.measure(spread) + self.noise_std**2 * direction
            curvature = _dot(direction, image)
            least = _dot(spread, spread) / largest + self.noise_std**2 * _dot(direction, direction)
            # It need not be positive either, and nothing is left to do once the residual is 0.
            step = _ratio(size, torch.where(curvature > 0, torch.maximum(curvature, least), 0.0))
            correction = correction + match(step, spread) * spread
            residual = residual - match(step, residual) * image
            last, size = size, _dot(residual, residual)
            direction = residual + match(_ratio(size, last), residual) * direction
        assert isinstance(correction, Tensor)
        return correction


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each example, (B,)."""
    return (a * b).flatten(1).sum(1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is not positive; gradients are finite there too."""
    positive = b > 0
    return torch.where(positive, a / torch.where(positive, b, 1.0), 0.0)
