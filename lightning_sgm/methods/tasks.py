"""Tasks: what an unconditional model is asked to complete, and the images that say what is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.guidance.inverse import Gray, LinearOperator, Mask, PosteriorMatching
from lightning_sgm.methods.image_files import read_mask, read_pictures
from lightning_sgm.networks.base import Spec
from lightning_sgm.random import Draw
from lightning_sgm.samplers.known import Replacement
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.ode import ODESampler

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Batch

Way = Literal["posterior", "replacement"]
_MASK, _NOISE, _SAMPLE = 1, 2, 3  # purposes of random numbers


class Task:
    """Base of all tasks: samples of p(x | y) for measurements y = A x + noise of given images.

    A subclass gives :meth:`operator`. Images shaped like the model's are measured first, and are the truth to compare
    with; images shaped like measurements are y. Sample number i completes image i modulo their number.

    Args:
        images: a picture, a folder of pictures (those directly in it in the order of their names, without the
            ``samples.png`` that ``predict`` writes), or from Python a tensor (N, *) in the range of the data.
        method: "posterior": the denoiser is told y (PosteriorMatching), under any sampler; unbiased where p(x_0 | x_t)
            is nearly Gaussian. "replacement": Song et al.'s own (2021, app. I), which needs no further evaluations of
            the network but a sampler with Langevin correctors, or it is biased.
        iterations: of "posterior"; each costs as much as an evaluation of the network. A few: with many, the errors of
            a learned network's derivatives add up.
        noise: standard deviation of the noise in y; it is added where y is made from whole images.
    """

    def __init__(
        self, images: str | Tensor, method: Way = "posterior", iterations: int = 3, noise: float = 0.0
    ) -> None:
        if method not in ("posterior", "replacement"):
            raise ValueError(f"method of a task must be posterior or replacement, got {method!r}")
        if iterations < 1 or noise < 0:
            raise ValueError(f"a task needs iterations >= 1 and noise >= 0, got {iterations} and {noise}")
        if noise and method == "replacement":
            raise ValueError("method replacement takes measurements as exact: set noise to 0, or method to posterior")
        self.images = images
        self.method: Way = method
        self.iterations, self.noise = iterations, noise
        self._read: Tensor | None = None

    def operator(self, shape: tuple[int, ...], indices: Tensor, draw: Draw) -> LinearOperator:
        """What is measured of samples of ``shape`` (n, *), numbered ``indices`` (n,).

        ``draw`` is for what is random and differs from sample to sample.
        """
        raise NotImplementedError

    def solve(
        self,
        denoiser: BaseDenoiser,
        sampler: Sampler | ODESampler,
        spec: Spec,
        indices: Tensor,
        draw: Draw,
        **conditions: Any,
    ) -> Batch:
        """Samples (n, *) of the posterior as "x".

        Args:
            denoiser: of the model.
            sampler: how its time is run backwards; "replacement" puts itself between its hooks.
            spec: of the data.
            indices: (n,) numbers of the samples.
            draw: their noise.
            conditions: for the denoiser.

        Returns:
            Also "before" like x: what is known, the rest in the middle of the range. And "truth" like x where the
            images are whole.

        Raises:
            FileNotFoundError: no such picture or mask.
            ValueError: pictures or masks of the wrong size or number of channels.
        """
        shape = (len(indices), *spec["shape"])
        low, high = spec.get("range", (-1.0, 1.0))
        middle = torch.full(shape, 0.5 * (low + high), device=draw.device)
        operator = self.operator(shape, indices, draw.fork(_MASK))
        measured = operator.measure(middle).shape
        y = self._images([shape[1:], measured[1:]], indices, low, high).to(draw.device)
        truth = {}
        if y.shape == shape:
            truth = {"truth": y}
            if self.noise:
                y = y + operator.inverse(self.noise * draw.fork(_NOISE).normal(measured))
            y = operator.measure(y)
        # Not the noise of samples from scratch: they may be what is completed, and would come out again.
        x = self._run(denoiser, sampler, operator, y, shape, draw.fork(_SAMPLE), conditions)
        return {"x": x, "before": operator.replace(middle, y), **truth}

    def _run(
        self,
        denoiser: BaseDenoiser,
        sampler: Sampler | ODESampler,
        operator: LinearOperator,
        y: Tensor,
        shape: tuple[int, ...],
        draw: Draw,
        conditions: dict[str, Any],
    ) -> Tensor:
        """Samples (n, *); where y is exact and they are finished, they agree with it to the last digit."""
        if self.method == "posterior":
            guided = PosteriorMatching(denoiser, operator, y, self.noise, self.iterations)
            x: Tensor = sampler(guided, shape, draw, **conditions)
        elif not isinstance(sampler, Sampler):
            raise ValueError(
                f"replacement works between the steps of a Sampler, {type(sampler).__name__} has none: "
                "set method to posterior"
            )
        else:
            around = Replacement(operator, y).around(sampler)
            x = around(denoiser, shape, draw, **conditions)
            sampler.evaluations = around.evaluations
        return x if self.noise or sampler.finish == "state" else operator.replace(x, y)

    def _images(self, shapes: list[tuple[int, ...]], indices: Tensor, low: float, high: float) -> Tensor:
        """The images of samples ``indices``, (n, *) with one of ``shapes`` (*)."""
        if isinstance(self.images, Tensor):
            images = self.images
            if not images.is_floating_point():
                raise ValueError(f"images of a task are floats in the range [{low:g}, {high:g}], got {images.dtype}")
            if not len(images) or images.shape[1:] not in shapes:
                wanted = " or ".join(dict.fromkeys(f"(N, {', '.join(map(str, shape))})" for shape in shapes))
                raise ValueError(f"images of a task must have the shape {wanted}, got {tuple(images.shape)}")
            return images[indices.to(images.device) % len(images)].float()
        if self._read is None:
            self._read = read_pictures(self.images, shapes)
        return low + (high - low) / 255.0 * self._read[indices.cpu() % len(self._read)]


class Inpaint(Task):
    """Completes images of which some pixels are known.

    Args:
        images: see :class:`Task`; whole images, of which the unknown pixels are not looked at.
        mask: a picture, white where pixels are known; or what is known by name: "left", "right", "top", "bottom",
            "center" (all but a box in the center), "random" (other pixels for every sample); or from Python a tensor:
            one mask as :class:`~lightning_sgm.guidance.Mask` takes it, or (N, *) with mask i modulo N for sample i.
        share: known part of the image, in (0, 1), for masks given by name.
        method, iterations: see :class:`Task`.
    """

    def __init__(
        self,
        images: str | Tensor,
        mask: str | Tensor = "left",
        share: float = 0.5,
        method: Way = "posterior",
        iterations: int = 3,
    ) -> None:
        super().__init__(images, method, iterations)
        if not 0 < share < 1:
            raise ValueError(f"share of the known pixels must lie strictly between 0 and 1, got {share}")
        self.mask, self.share = mask, share

    def operator(self, shape: tuple[int, ...], indices: Tensor, draw: Draw) -> LinearOperator:
        """The mask."""
        if isinstance(self.mask, Tensor):
            each = self.mask.ndim == len(shape)
            return Mask(self.mask[indices.to(self.mask.device) % len(self.mask)] if each else self.mask)
        if len(shape) != 4:
            raise ValueError(f"the mask {self.mask!r} is for images (C, H, W): give a tensor for shape {shape[1:]}")
        height, width = shape[2:]
        if self.mask == "random":
            return Mask(draw.uniform((shape[0], 1, height, width)) < self.share)
        known = _named_mask(self.mask, height, width, self.share)
        if known is not None:
            return Mask(known)
        if not Path(self.mask).is_file():
            raise FileNotFoundError(
                f"there is no mask {self.mask}: give a picture, or left, right, top, bottom, center or random"
            )
        return Mask(read_mask(self.mask, height, width))


class Colourise(Task):
    """Colours gray pictures: gray is the mean of the channels (Song et al. 2021, app. I.3).

    Args:
        images: see :class:`Task`; gray pictures, or coloured ones, which are turned gray first.
        method, iterations: see :class:`Task`.
    """

    def __init__(self, images: str | Tensor, method: Way = "posterior", iterations: int = 3) -> None:
        super().__init__(images, method, iterations)

    def operator(self, shape: tuple[int, ...], indices: Tensor, draw: Draw) -> LinearOperator:
        """The mean of the channels."""
        return Gray(shape[1])


class Restore(Task):
    """Undoes any linear measurement, such as :class:`~lightning_sgm.guidance.Average` (super-resolution).

    Args:
        images: see :class:`Task`; measurements (low-resolution pictures), or whole images, which are measured first.
        operator: the measurement A.
        noise, method, iterations: see :class:`Task`.
    """

    def __init__(
        self,
        images: str | Tensor,
        operator: LinearOperator,
        noise: float = 0.0,
        method: Way = "posterior",
        iterations: int = 3,
    ) -> None:
        super().__init__(images, method, iterations, noise)
        self._operator = operator

    def operator(self, shape: tuple[int, ...], indices: Tensor, draw: Draw) -> LinearOperator:
        """The measurement."""
        return self._operator


def _named_mask(name: str, height: int, width: int, share: float) -> Tensor | None:
    """(H, W) bool with about ``share`` of the pixels known, None for a name that is none."""
    rows, columns = torch.arange(height)[:, None].expand(-1, width), torch.arange(width).expand(height, -1)
    box_height, box_width = (round((1.0 - share) ** 0.5 * side) for side in (height, width))
    above, before = (height - box_height) // 2, (width - box_width) // 2
    masks = {
        "left": columns < round(share * width),
        "right": columns >= width - round(share * width),
        "top": rows < round(share * height),
        "bottom": rows >= height - round(share * height),
        "center": (rows < above) | (rows >= above + box_height) | (columns < before) | (columns >= before + box_width),
    }
    return masks.get(name)
