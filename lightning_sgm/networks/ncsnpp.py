"""NCSN++ and DDPM++, the U-Nets of Song et al. 2021 (2011.13456, app. H), with the reference's parameter names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.base import Network, Spec, attended, class_count, entry, image_sides
from lightning_sgm.networks.embed import EmbeddingKind, SinusoidalEmbedding, sin_cos
from lightning_sgm.networks.resample import down, down_with_weights, up, up_with_weights
from lightning_sgm.networks.score_blocks import (
    VANISHING,
    ResidualBlock,
    SelfAttention,
    convolution,
    linear,
    merge,
    norm,
)


class NCSNpp(Network):
    """The U-Net family of Song et al. 2021; an untrained network answers 1e-5 or less.

    On the way down every level has ``layers_per_block`` residual blocks, each followed by attention at the heights
    named, and on the way up one block more and a single attention; the middle has a block, attention and a block.
    Attention has one head, group norms have min(C / 4, 32) groups. State dict entries are ``all_modules.<i>.<name>`` in
    the order of execution, as in the reference's checkpoints (without "module."); the class embedding is the only other
    entry.

    The networks of the paper, with their parameters (the fixed Fourier frequencies included; the spec is CIFAR-10's,
    3 x 32 x 32, but for the last two, 256 and 1024 pixels wide):

    * DDPM++: ``channels=[128, 256, 256, 256], layers_per_block=4, attention=[16], dropout=0.1``, 61,804,419; with
      ``layers_per_block=8`` ("deep") 106,632,579;
    * NCSN++: the same with ``fir=True, input_pyramid="residual"``, 62,693,251 (deep 107,521,411); trained with a
      continuous VE SDE also ``embedding="fourier"``, 62,758,915 (deep 107,587,075);
    * NCSN++ at 256: ``channels=[128, 128, 256, 256, 256, 256, 256], layers_per_block=2, attention=[16], fir=True,
      input_pyramid="input_skip", output_pyramid="output_skip", embedding="fourier"``, 65,574,549;
    * at 1024 the same with ``channels=[16, 32, 64, 128, 256, 512, 512, 512], layers_per_block=1``, 105,785,896.

    The reference's networks also map data in [0, 1] to [-1, 1], take the logarithm of sigma and divide by sigma; here
    the range is that of the data and the rest is the denoiser's.

    Args:
        spec: of image data; ``shape`` and ``classes`` are used. The sides must be divisible by 2^(levels - 1).
        channels: channels of each level, finest first; each level but the last halves the image. The embedded label
            has 4 * channels[0] features.
        layers_per_block: residual blocks per level.
        attention: heights of the images (such as 16) at which there is attention.
        dropout: inside residual blocks, in training.
        conditional: take the batch's class as condition ``label``, (B,) int64 in 0 .. K; K, or no label, is the null
            class of unconditional answers.
        embedding: of the noise label. "positional" for labels that span hundreds (999 t); "fourier" for labels of a
            few units, such as ln(sigma / 2).
        fourier_scale: spread of the Fourier frequencies, in cycles per unit of the label; None is the paper's 16.
        fir: resample with the filter [1, 3, 3, 1] rather than by means and copies of pixels.
        block: "biggan" resamples inside residual blocks, "ddpm" by a convolution between them.
        input_pyramid: "input_skip" adds the input, made smaller, to each coarser level through a 1 x 1 convolution;
            "residual" makes a pyramid by convolutions, to which each coarser level is added.
        output_pyramid: "output_skip" makes the answer by adding up images of all levels, from coarse to fine.
        rescale: divide the sums of shortcuts and branches by sqrt(2).
    """

    def __init__(
        self,
        spec: Spec,
        channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        conditional: bool = False,
        embedding: EmbeddingKind = "positional",
        fourier_scale: float | None = None,
        fir: bool = False,
        block: Literal["biggan", "ddpm"] = "biggan",
        input_pyramid: Literal["none", "input_skip", "residual"] = "none",
        output_pyramid: Literal["none", "output_skip"] = "none",
        rescale: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sides = image_sides(spec, len(channels), name)
        self.classes = class_count(spec, conditional)
        _check(name, channels, embedding, block, input_pyramid, output_pyramid)
        self.attend = attended(sides, attention, name)
        self.layers_per_block, self.rescale, self.fir, self.block = layers_per_block, rescale, fir, block
        self.input_pyramid, self.output_pyramid = input_pyramid, output_pyramid
        width = channels[0]
        self.positional = SinusoidalEmbedding(width, shift=1) if embedding == "positional" else None
        self.shrink = down(fir) if input_pyramid == "input_skip" else None
        self.grow = up(fir) if output_pyramid == "output_skip" else None
        image = entry(spec, "shape", name)[0]
        residual = partial(ResidualBlock, embedded=4 * width, dropout=dropout, rescale=rescale, nin=block == "ddpm")
        skips: list[int] = []
        modules = [
            *([] if self.positional else [_Fourier(width, 16.0 if fourier_scale is None else fourier_scale)]),
            *[linear(width if self.positional else 2 * width, 4 * width), linear(4 * width, 4 * width)],
            *self._down_modules(image, channels, residual, skips),
            *[residual(channels[-1], channels[-1]), SelfAttention(channels[-1], rescale)],
            *[residual(channels[-1], channels[-1])],
            *self._up_modules(image, channels, residual, skips),
        ]
        self.all_modules = nn.ModuleList(modules)
        self.conditions = ("label",) if conditional else ()
        self.label_embedding = nn.Embedding(self.classes + 1, 4 * width) if conditional else None

    def forward(self, x: Tensor, noise: Tensor, /, label: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), noise labels (B,) and classes (B,) to images (B, C, H, W)."""
        modules = iter(self.all_modules)
        embedded = self._embed(modules, noise, label)
        h, skips = self._down(modules, x, embedded)
        h = next(modules)(h, embedded)
        h = next(modules)(h)
        h = next(modules)(h, embedded)
        return self._up(modules, h, skips, embedded)

    def _embed(self, modules: Iterator[nn.Module], noise: Tensor, label: Tensor | None) -> Tensor:
        """(B, 4 width), behind the nonlinearity that the reference repeats in every block."""
        features = self.positional(noise) if self.positional is not None else next(modules)(noise)
        first, second = next(modules), next(modules)
        embedded = second(F.silu(first(features.to(first.weight.dtype))))
        if self.label_embedding is not None:
            embedded = embedded + (
                self.label_embedding(label) if label is not None else self.label_embedding.weight[self.classes]
            )
        return F.silu(embedded)

    def _down(self, modules: Iterator[nn.Module], x: Tensor, embedded: Tensor) -> tuple[Tensor, list[Tensor]]:
        pyramid, h = x, next(modules)(x)
        skips = [h]
        for level, attend in enumerate(self.attend):
            for _ in range(self.layers_per_block):
                h = next(modules)(h, embedded)
                h = next(modules)(h) if attend else h
                skips.append(h)
            if level < len(self.attend) - 1:
                h = self._resample(next(modules), h, embedded)
                if self.shrink is not None:
                    pyramid = self.shrink(pyramid)
                    h = h + next(modules)(pyramid)
                elif self.input_pyramid == "residual":
                    h = pyramid = merge(next(modules)(pyramid), h, self.rescale)
                skips.append(h)
        return h, skips

    def _up(self, modules: Iterator[nn.Module], h: Tensor, skips: list[Tensor], embedded: Tensor) -> Tensor:
        answer: Tensor | None = None
        for level in reversed(range(len(self.attend))):
            for _ in range(self.layers_per_block + 1):
                h = next(modules)(torch.cat([h, skips.pop()], 1), embedded)
            h = next(modules)(h) if self.attend[level] else h
            if self.grow is not None:
                image = self._image(modules, h)
                answer = image if answer is None else self.grow(answer) + image
            if level:
                h = self._resample(next(modules), h, embedded)
        return self._image(modules, h) if answer is None else answer

    def _resample(self, module: nn.Module, h: Tensor, embedded: Tensor) -> Tensor:
        return module(h, embedded) if self.block == "biggan" else module(h)

    def _image(self, modules: Iterator[nn.Module], h: Tensor) -> Tensor:
        h = F.silu(next(modules)(h))
        return next(modules)(h)

    def _down_modules(
        self, image: int, channels: Sequence[int], residual: partial[ResidualBlock], skips: list[int]
    ) -> Iterator[nn.Module]:
        """Modules of the way down; appends the channels of its outputs to ``skips``."""
        h, pyramid = channels[0], image
        yield convolution(image, h)
        skips.append(h)
        for level, (out, attend) in enumerate(zip(channels, self.attend, strict=True)):
            for _ in range(self.layers_per_block):
                yield residual(h, out)
                h = out
                if attend:
                    yield SelfAttention(h, self.rescale)
                skips.append(h)
            if level < len(channels) - 1:
                biggan = self.block == "biggan"
                yield residual(h, h, resample=down(self.fir)) if biggan else down_with_weights(h, h, self.fir)
                if self.input_pyramid == "input_skip":
                    yield _Combine(image, h)
                elif self.input_pyramid == "residual":
                    yield down_with_weights(pyramid, h, self.fir)
                    pyramid = h
                skips.append(h)

    def _up_modules(
        self, image: int, channels: Sequence[int], residual: partial[ResidualBlock], skips: list[int]
    ) -> Iterator[nn.Module]:
        """Modules of the way up; empties ``skips``."""
        h = channels[-1]
        for level in reversed(range(len(channels))):
            for _ in range(self.layers_per_block + 1):
                yield residual(h + skips.pop(), channels[level])
                h = channels[level]
            if self.attend[level]:
                yield SelfAttention(h, self.rescale)
            if self.output_pyramid == "output_skip" or level == 0:
                yield norm(h)
                yield convolution(h, image, scale=VANISHING)
            if level:
                biggan = self.block == "biggan"
                yield residual(h, h, resample=up(self.fir)) if biggan else up_with_weights(h, h, self.fir)


class _Fourier(nn.Module):
    """Fourier features as :class:`~lightning_sgm.networks.embed.FourierEmbedding` has them, under the reference's name.

    The frequencies ``W`` are a parameter there, which is never trained.
    """

    def __init__(self, frequencies: int, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(frequencies) * scale, requires_grad=False)

    def forward(self, label: Tensor) -> Tensor:
        """(B,) to (B, 2 * frequencies)."""
        return sin_cos(label, 2 * torch.pi * self.W)


class _Combine(nn.Module):
    """Channels of an image to those of a level."""

    def __init__(self, image: int, channels: int) -> None:
        super().__init__()
        self.Conv_0 = convolution(image, channels, kernel=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.Conv_0(image)


def _check(
    name: str, channels: Sequence[int], embedding: str, block: str, input_pyramid: str, output_pyramid: str
) -> None:
    choices = {
        "embedding": (embedding, ("positional", "fourier")),
        "block": (block, ("biggan", "ddpm")),
        "input_pyramid": (input_pyramid, ("none", "input_skip", "residual")),
        "output_pyramid": (output_pyramid, ("none", "output_skip")),
    }
    for option, (given, known) in choices.items():
        if given not in known:
            raise ValueError(f"{option} of a {name} is one of {', '.join(known)}, got {given!r}")
