"""The networks of shift-tolerant LPIPS (Ghildyal and Liu 2022, 2207.13686): strides become blurs; no weights here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

# Names of the released tensors, and ours.
_NAMES = ((r"^net\.", "stages."), (r"^lin(\d)\.model\.1\.weight$", r"weights.\1"), (r"^scaling_layer\.", ""))


class ShiftTolerant(nn.Module):
    """Distance of images: squared differences of a network's five features, weighted by channel, averaged by pixel.

    Args:
        net: the network whose features are compared.
        state: the released tensors of this network; they are taken as they are, not copied.

    Raises:
        ValueError: tensors are missing, too many, or of other shapes.
    """

    def __init__(self, net: Literal["alex", "vgg"], state: Mapping[str, Tensor]) -> None:
        super().__init__()
        with torch.device("meta"):  # without memory and without random numbers: every value comes from the state
            stages = {"alex": _alexnet, "vgg": _vgg16}[net]()
            widths = [[layer.out_channels for layer in stage if isinstance(layer, nn.Conv2d)][-1] for stage in stages]
            self.stages = nn.ModuleDict(_numbered(stages))
            self.weights = nn.ParameterList(torch.empty(1, width, 1, 1) for width in widths)
            self.register_buffer("shift", torch.empty(1, 3, 1, 1))
            self.register_buffer("scale", torch.empty(1, 3, 1, 1))
        self.shift: Tensor
        self.scale: Tensor
        try:
            self.load_state_dict({_own(name): value for name, value in state.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"these are not the weights of the shift-tolerant {net}: {error}") from error

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        """Five features (B, C, h, w), their channels of length 1 at every pixel."""
        x = (x - self.shift) / self.scale
        for stage in self.stages.values():
            x = stage(x)
            yield functional.normalize(x, dim=1, eps=1e-10)

    def forward(self, x: Tensor, truth: Tensor) -> Tensor:
        """(B,) distances of images (B, 3, H, W) in [-1, 1]."""
        pairs = zip(self._features(x), self._features(truth), self.weights, strict=True)
        return torch.stack(
            [functional.conv2d((one - other).square(), weight).mean((1, 2, 3)) for one, other, weight in pairs]
        ).sum(0)


class _Blur(nn.Module):
    """Every channel filtered by [1, 2, 1] both ways, two pixels reflected at each border, every other pixel kept.

    The filter is among the released tensors.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))
        self.filt: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(
            functional.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=len(self.filt)
        )


def _alexnet() -> list[list[nn.Module]]:
    """AlexNet's five convolutions; the stride of the first and of the pools are blurs after them."""

    def pool(channels: int) -> list[nn.Module]:
        return [nn.MaxPool2d(3, stride=1), _Blur(channels)]

    return [
        [nn.Conv2d(3, 64, 11, padding=2), _Blur(64), nn.ReLU()],
        [*pool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
        [*pool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
    ]


def _vgg16() -> list[list[nn.Module]]:
    """VGG-16's thirteen convolutions; the strides of the pools are blurs after them."""
    stages: list[list[nn.Module]] = []
    before = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        stage: list[nn.Module] = [nn.MaxPool2d(2, stride=1), _Blur(before)] if stages else []
        for one, other in pairwise([before] + [width] * convolutions):
            stage += [nn.Conv2d(one, other, 3, padding=1), nn.ReLU()]
        stages.append(stage)
        before = width
    return stages


def _numbered(stages: list[list[nn.Module]]) -> dict[str, nn.Module]:
    """The stages by their released names: slices from 1 and, through all of them, layers from 0."""
    named: dict[str, nn.Module] = {}
    first = 0
    for place, stage in enumerate(stages, 1):
        named[f"slice{place}"] = nn.Sequential()
        for number, layer in enumerate(stage, first):
            named[f"slice{place}"].add_module(str(number), layer)
        first += len(stage)
    return named


def _own(name: str) -> str:
    """Our name of a released tensor."""
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return name
