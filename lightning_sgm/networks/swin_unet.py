"""The network of ResShift (Yue et al. 2023, 2307.12348): a U-Net with attention in shifted windows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_sgm.networks.base import Network, Spec
from lightning_sgm.networks.embed import SinusoidalEmbedding
from lightning_sgm.networks.score_blocks import norm
from lightning_sgm.networks.sr_grid import LowGrid
from lightning_sgm.networks.swin_blocks import ResidualBlock, SwinLayer, zeroed


class SwinUNet(Network):
    """U-Net of Dhariwal and Nichol (2021) with Swin layers where that has attention, and the degraded image as input.

    The degraded image ``low`` is concatenated to ``x``: as it is if their grids agree (x4 super-resolution in latents
    of a quarter of the side), through convolutions that halve it again and again if it is larger (faces), enlarged if
    it is smaller. The defaults are the paper's: 118.59 million parameters for 3 + 3 channels. Other than theirs, the
    last convolution is zero at first, so that an untrained network answers 0. Small:
    ``channels=32, multipliers=[1, 2], swin_channels=32``.

    The released weights of ResShift, SinSR and TAD-SR fit by name with ``released_masks=True``. What they store
    besides, ``relative_position_index`` and ``attn_mask``, is compared with ours and not kept.

    Levels whose image is a single window at the spec's size have no shifted windows, at other sizes neither: build the
    network for released weights with the shape they were trained with, 64 x 64.

    Args:
        spec: "shape" [C, H, W] of the model's images and "low_shape" [c, h, w] of the degraded images are used. Sizes
            may differ later, not the ratio of sides.
        channels: of the first level.
        multipliers: channels of each level over ``channels``, finest first; each level but the last halves the image.
        blocks: residual blocks per level on the way down; one more on the way up. A Swin layer follows the first.
        swin_depth: blocks of a Swin layer, every second with shifted windows.
        swin_channels: of these blocks.
        head_channels: of each head of attention; divides ``swin_channels``.
        window: side of a window.
        mlp_ratio: hidden channels over ``swin_channels`` in Swin blocks.
        dropout: inside all blocks, in training.
        released_masks: keep parts of shifted windows apart as the code behind the released weights does, not as Swin
            is meant to: see :func:`~lightning_sgm.networks.swin_blocks.shift_mask`.

    Attributes:
        multiple: sides of ``x`` must be divisible by it: window times 2^(levels - 1).
        feature_channels: channels of each tensor of :meth:`features`.

    Raises:
        ValueError: data without degraded images, images whose grids or sides do not fit, or sizes that do not fit each
            other.
    """

    conditions = ("low",)

    def __init__(
        self,
        spec: Spec,
        channels: int = 160,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        blocks: int = 2,
        swin_depth: int = 2,
        swin_channels: int = 192,
        head_channels: int = 32,
        window: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        released_masks: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "blocks": blocks, "swin_depth": swin_depth, "head_channels": head_channels}
        _check({**sizes, "window": window}, channels, multipliers, swin_channels, head_channels)
        self.multiple = window * 2 ** (len(multipliers) - 1)
        self.low_grid = LowGrid(spec, "SwinUNet")
        image_channels, *sides = self.low_grid.shape
        self._check_sides(sides)
        self.label, width = SinusoidalEmbedding(channels, cosines_first=True), 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.feature_extractor, low_channels = _stem(self.low_grid)

        def residual(before: int, out: int) -> ResidualBlock:
            return ResidualBlock(before, out, width, dropout)

        def swin(count: int, level: int) -> SwinLayer:
            heads, shifted = swin_channels // head_channels, min(sides) >> level > window
            shapes = (count, swin_channels, swin_depth, heads, window)
            return SwinLayer(*shapes, shifted, released_masks, mlp_ratio, dropout)

        plan = [channels * multiplier for multiplier in multipliers]
        first = nn.Conv2d(image_channels + low_channels, plan[0], 3, padding=1)
        self.input_blocks, stack, self._halvings = _down(first, plan, blocks, residual, swin)
        self.feature_channels = (*(stack[place] for place in self._halvings), plan[-1], plan[-1])
        self.middle_block = _Stage(
            residual(plan[-1], plan[-1]), swin(plan[-1], len(plan) - 1), residual(plan[-1], plan[-1])
        )
        self.output_blocks = _up(stack, plan, blocks, residual, swin)
        last = zeroed(nn.Conv2d(plan[0], image_channels, 3, padding=1))
        self.out = nn.Sequential(norm(plan[0], eps=1e-5), nn.SiLU(), last)

    def forward(self, x: Tensor, noise: Tensor, /, low: Tensor) -> Tensor:
        """Noisy images and their level beside degraded images to images.

        Args:
            x: (B, C, H, W), sides divisible by ``multiple``.
            noise: (B,), a label that spans tens and more, as an index or 999 t.
            low: (B, c, h, w), in the ratio of the spec to x.

        Returns:
            (B, C, H, W).
        """
        embedded, states, h = self._encode(x, noise, low)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, states.pop()], 1), embedded)
        return self.out(h)

    def features(self, x: Tensor, noise: Tensor, /, low: Tensor) -> list[Tensor]:
        """What the encoder makes of the arguments of :meth:`forward`: each halved image, the last and the middle."""
        _, states, middle = self._encode(x, noise, low)
        return [*(states[place] for place in self._halvings), states[-1], middle]

    def _encode(self, x: Tensor, noise: Tensor, low: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Embedded labels (B, F), what each stage down answers and what the middle does."""
        self._check_sides(x.shape[2:])
        embedded = self.time_embed(self.label(noise.float()).to(self.time_embed[0].weight.dtype))
        h, states = torch.cat([x, self._condition(low, x.shape[2:]).to(x.dtype)], 1), list[Tensor]()
        for stage in self.input_blocks:
            h = stage(h, embedded)
            states.append(h)
        return embedded, states, self.middle_block(h, embedded)

    def _condition(self, low: Tensor, sides: Sequence[int]) -> Tensor:
        """Degraded images on the grid of the model's."""
        if self.low_grid.ratio >= 1:
            return self.low_grid(low, sides)
        self.low_grid.check(low, sides)
        return self.feature_extractor(low)

    def _check_sides(self, sides: Sequence[int]) -> None:
        if any(side % self.multiple for side in sides):
            raise ValueError(
                f"this SwinUNet needs images whose sides are multiples of {self.multiple} (its window times 2 for each "
                f"level but the last), got {list(sides)}: pad or crop them, or give it fewer multipliers or a smaller "
                f"window"
            )


class _Stage(nn.Sequential):
    """Layers of which residual blocks are also told the label."""

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedded) if isinstance(layer, ResidualBlock) else layer(x)
        return x


def _down(
    first: nn.Module,
    plan: Sequence[int],
    blocks: int,
    residual: Callable[[int, int], nn.Module],
    swin: Callable[[int, int], nn.Module],
) -> tuple[nn.ModuleList, list[int], list[int]]:
    """Stages on the way down from the channels of each level; channels of their answers; which of them halve."""
    stages, stack, halvings = nn.ModuleList([_Stage(first)]), [plan[0]], list[int]()
    for level, out in enumerate(plan):
        for block in range(blocks):
            attention = [] if block else [swin(out, level)]
            stages.append(_Stage(residual(stack[-1], out), *attention))
            stack.append(out)
        if level < len(plan) - 1:
            halvings.append(len(stages))
            stages.append(_Stage(_halve(out, out)))
            stack.append(out)
    return stages, stack, halvings


def _up(
    stack: Sequence[int],
    plan: Sequence[int],
    blocks: int,
    residual: Callable[[int, int], nn.Module],
    swin: Callable[[int, int], nn.Module],
) -> nn.ModuleList:
    """Stages on the way up, each of which is also shown what one on the way down answered, the last first."""
    stages, left, now = nn.ModuleList(), list(stack), plan[-1]
    for level, out in reversed(list(enumerate(plan))):
        for block in range(blocks + 1):
            layers = [residual(now + left.pop(), out)]
            now = out
            if block == 0:
                layers.append(swin(now, level))
            if level and block == blocks:
                layers.append(_double(now))
            stages.append(_Stage(*layers))
    return stages


def _halve(channels: int, out: int) -> nn.Module:
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, out, 3, stride=2, padding=1)))


def _double(channels: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(grow=nn.Upsample(scale_factor=2, mode="nearest"), conv=nn.Conv2d(channels, channels, 3, padding=1))
    )


def _stem(grid: LowGrid) -> tuple[nn.Module, int]:
    """What brings larger degraded images down to the model's grid, and its channels."""
    if grid.ratio >= 1:
        return nn.Identity(), grid.channels
    larger = grid.ratio.denominator
    if larger & (larger - 1):
        raise ValueError(
            f"SwinUNet halves degraded images until they are as large as its own, but their sides are {larger} times "
            f"as long, no power of 2: choose another scale of the data or another codec"
        )
    layers, before, now = list[nn.Module](), grid.low_channels, 16
    for _ in range(larger.bit_length() - 1):
        layers += [nn.Conv2d(before, now, 3, padding=1), nn.SiLU(), _halve(now, 2 * now)]
        before = now = 2 * now
    return nn.Sequential(*layers), now


def _check(
    sizes: dict[str, int], channels: int, multipliers: Sequence[int], swin_channels: int, head_channels: int
) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} of SwinUNet must be at least 1, got {size}")
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"SwinUNet needs at least one of multipliers, all of them 1 or more, got {list(multipliers)}")
    if channels % 2:
        raise ValueError(f"channels of SwinUNet must be even, got {channels}")
    if swin_channels < 1 or swin_channels % head_channels:
        raise ValueError(f"swin_channels {swin_channels} of SwinUNet cannot be split into heads of {head_channels}")
