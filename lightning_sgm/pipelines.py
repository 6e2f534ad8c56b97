"""Models as pipelines in the manner of diffusers: pictures in, pictures out, nothing to set up."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from lightning_sgm.io.checkpoint import load
from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.methods.image_files import Pictures
from lightning_sgm.methods.resshift import ResShift
from lightning_sgm.random import seeded
from lightning_sgm.samplers.loop import Sampler

if TYPE_CHECKING:
    from PIL.Image import Image


class PipelineOutput(NamedTuple):
    """What a pipeline made: ``images``, in the order of what it was given."""

    images: list[Image]


class SuperResolutionPipeline:
    """Restores pictures with a ResShift model or a student distilled from one.

        pipe = SuperResolutionPipeline.from_pretrained("model.ckpt").to("cuda")
        pipe("photograph.jpg").images[0].save("restored.png")

    Args:
        model: of which the weights are used as they are.
    """

    def __init__(self, model: ResShift) -> None:
        self.model = model.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, allow: tuple[str, ...] = (), **overrides: Any) -> Self:
        """The pipeline of a checkpoint, or of a folder that ``export`` wrote; of a distillation its student.

        Args:
            path: checkpoint or folder.
            allow, overrides: see :func:`lightning_sgm.load`.

        Raises:
            FileNotFoundError, ValueError: as ``load``, or the model restores no images.
        """
        loaded = load(path, allow, **overrides)
        model = loaded.exported() if isinstance(loaded, GenerativeModule) else loaded
        if not isinstance(model, ResShift):
            raise ValueError(f"{path} holds a {type(model).__name__}, which restores no images: give a ResShift model")
        return cls(model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def to(self, device: str | torch.device) -> Self:
        """Move the model."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        images: Image | str | Path | Sequence[Image | str | Path],
        seed: int = 0,
        num_inference_steps: int | None = None,
    ) -> PipelineOutput:
        """Restored pictures, those that ``predict`` makes of the same files with ``--seed_everything seed``.

        Args:
            images: a picture of any size, as a PIL image or the path of a file, or of a folder of them; or a list of
                such. Gray ones become coloured, transparency is dropped.
            seed: of the noise; that of a picture depends on its place in the list too.
            num_inference_steps: steps of the sampler, as many as its grid can have; None for its own.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a picture that cannot be read, or a number of steps that the sampler cannot make.
        """
        model, own = self.model, self.model.sampler
        given = [images] if isinstance(images, str | Path) or not isinstance(images, Sequence) else images
        if num_inference_steps is not None:
            model.sampler = _with_steps(model, num_inference_steps)
        try:
            with seeded(seed):
                return PipelineOutput(
                    [
                        _picture(model.restore(low.to(self.device), torch.tensor([number])))
                        for number, low in enumerate(low for one in given for low in _values(one))
                    ]
                )
        finally:
            model.sampler = own


def _with_steps(model: ResShift, steps: int) -> Sampler:
    """The model's sampler with another number of steps."""
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    sampler = copy.copy(model.sampler)
    sampler.steps = steps
    sampler.levels(model.process)  # refuses what the grid cannot do
    return sampler


def _values(source: Image | str | Path) -> Iterator[Tensor]:
    """Pictures (1, 3, h, w) in [-1, 1] of a PIL image, a file or a folder."""
    if isinstance(source, str | Path):
        yield from (batch["low"] for batch in Pictures(source))
        return
    from PIL import ImageOps
    from PIL.Image import Image as PILImage

    if not isinstance(source, PILImage):
        raise ValueError(f"a pipeline takes PIL images and paths, got a {type(source).__name__}")
    if source.mode[0] in "IF":
        raise ValueError(f"the picture has more than 8 bits per channel (mode {source.mode}): convert it to RGB")
    pixels = np.array(ImageOps.exif_transpose(source).convert("RGB"))
    yield torch.from_numpy(pixels).permute(2, 0, 1)[None].float() * (2.0 / 255.0) - 1.0


def _picture(image: Tensor) -> Image:
    """A PIL image of (1, 3, H, W) in [-1, 1]."""
    from PIL.Image import fromarray

    levels = ((image[0].float().cpu() + 1.0) / 2.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return fromarray(levels.permute(1, 2, 0).contiguous().numpy())
