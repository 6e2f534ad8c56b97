"""Real-ESRGAN's random degradation of photographs (Wang et al. 2021, 2107.10833), with the numbers of ResShift.

blur, resize, noise, JPEG; with probability 1/2 all of it but JPEG once more; then to the small size with a sinc filter
(ringing), and JPEG before or after that. The numbers are of ResShift's configuration (Yue et al. 2023, 2307.12348),
which TAD-SR takes over. Every example draws all of its own, from its own generator, so that an example does not depend
on the batch it is in; the reference shares sizes, filters and kinds of noise in a batch and mixes batches in a pool.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Range = tuple[float, float]


class Round(NamedTuple):
    """Numbers of one round of degradation.

    Attributes:
        width: blur kernels are 3, 5, ... pixels wide and narrower than this (the reference pads them to it).
        sigma: of blur, in pixels.
        resize: probabilities to enlarge, to shrink, to keep the size.
        scale: from the strongest shrinking to the strongest enlargement.
        gaussian: standard deviation of Gaussian noise, in 8-bit levels.
        poisson: strength of Poisson noise, 1 for that of a sensor that counts 8-bit levels.
    """

    width: int
    sigma: Range
    resize: tuple[float, float, float]
    scale: Range
    gaussian: Range
    poisson: Range


FIRST = Round(21, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0))
SECOND = Round(15, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5))
SECOND_ROUND, SECOND_BLUR, LAST_SINC, LAST_JPEG = 0.5, 0.8, 0.8, 0.5  # probabilities
SINC = 0.1  # probability of a sinc kernel in place of a blur
# Kind of blur: its probability, whether it has one width, its shape.
_BLURS = (
    *((0.45, True, "gauss"), (0.25, False, "gauss"), (0.12, True, "general")),
    *((0.03, False, "general"), (0.12, True, "plateau"), (0.03, False, "plateau")),
)
_EXPONENTS = {"gauss": (1.0, 1.0), "general": (0.5, 4.0), "plateau": (1.0, 2.0)}
_GAUSSIAN = 0.5  # probability of Gaussian noise, else Poisson
_GRAY = 0.4  # probability of noise that is the same in all colours
_JPEG = (30, 95)  # qualities, both included
_LUMA = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]
_FILTERS = ("area", "bilinear", "bicubic")


def degrade(images: Tensor, factor: int, seeds: NDArray[np.uint64]) -> Tensor:
    """Low-resolution images as a camera, a network and some editing might have left them.

    Args:
        images: (B, 3, H, W) uint8, sides divisible by ``factor`` and at least ``smallest_side(factor)``.
        factor: by which the sides shrink.
        seeds: (B,) of each image.

    Returns:
        (B, 3, H / factor, W / factor) uint8, each a function of its image and its seed alone.
    """
    pairs = zip(images, seeds, strict=True)
    return torch.stack([_degrade(image, factor, np.random.default_rng(int(seed))) for image, seed in pairs])


def smallest_side(factor: int) -> int:
    """Least side of images to degrade: every blur reflects the border, also after the strongest shrinking."""
    pad = (SECOND.width - 2) // 2
    return max(math.ceil((pad + 1) / FIRST.scale[0]), (pad + 1) * factor)


def _degrade(image: Tensor, factor: int, rng: Generator) -> Tensor:
    """One image, (3, H, W) uint8."""
    height, width = image.shape[-2:]
    x = blurred(image / 255, random_kernel(FIRST, rng))
    scale = random_scale(FIRST, rng)
    x = _compressed(noisy(_resized(x, int(height * scale), int(width * scale), rng), FIRST, rng), rng)
    if rng.random() < SECOND_ROUND:
        if rng.random() < SECOND_BLUR:
            x = blurred(x, random_kernel(SECOND, rng))
        scale = random_scale(SECOND, rng) / factor
        x = noisy(_resized(x, int(height * scale), int(width * scale), rng), SECOND, rng)
    compress_last = rng.random() < LAST_JPEG
    if not compress_last:
        x = _compressed(x, rng)
    x = _resized(x, height // factor, width // factor, rng)
    if rng.random() < LAST_SINC:
        x = blurred(x, sinc_kernel(_odd_width(SECOND, rng), rng.uniform(math.pi / 3, math.pi)))
    return _bytes(_compressed(x, rng) if compress_last else x)


def random_kernel(numbers: Round, rng: Generator) -> Tensor:
    """A (k, k) blur or sinc kernel of sum 1, k odd."""
    width = _odd_width(numbers, rng)
    if rng.random() < SINC:
        return sinc_kernel(width, rng.uniform(math.pi / 3 if width < 13 else math.pi / 5, math.pi))
    _, circular, shape = _BLURS[rng.choice(len(_BLURS), p=[kind[0] for kind in _BLURS])]
    sigma = rng.uniform(*numbers.sigma, size=2)
    low, high = _EXPONENTS[shape]
    # As often below 1 as above, though the range above is the longer one.
    exponent = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    deviations = (sigma[0], sigma[0] if circular else sigma[1])
    return blur_kernel(width, deviations, rng.uniform(-math.pi, math.pi), exponent, shape == "plateau")


def blur_kernel(width: int, sigma: Range, angle: float, exponent: float, plateau: bool) -> Tensor:
    """Generalised Gaussian exp(-d^exponent / 2) or plateau 1 / (1 + d^exponent), d = (u / sigma_1)^2 + (v / sigma_2)^2.

    Args:
        width: k, odd.
        sigma: along the axes u and v, in pixels.
        angle: by which these are turned against rows and columns.
        exponent: 1 is the Gaussian.
        plateau: the second shape.

    Returns:
        (k, k) float32 of sum 1.
    """
    y, x = torch.meshgrid(*[torch.arange(width, dtype=torch.float64) - width // 2] * 2, indexing="ij")
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    distance = ((u / sigma[0]) ** 2 + (v / sigma[1]) ** 2) ** exponent
    values = 1 / (1 + distance) if plateau else (-distance / 2).exp()
    return (values / values.sum()).float()


def sinc_kernel(width: int, cutoff: float) -> Tensor:
    """The ideal low-pass filter of all directions, c J_1(c r) / (2 pi r), cut to (k, k), of sum 1.

    Args:
        width: k, odd.
        cutoff: c, in radians per pixel.
    """
    offset = torch.arange(width, dtype=torch.float64) - width // 2
    radius = torch.hypot(offset[:, None], offset)
    values = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    values[width // 2, width // 2] = cutoff**2 / (4 * math.pi)
    return (values / values.sum()).float()


def _odd_width(numbers: Round, rng: Generator) -> int:
    return int(rng.choice(np.arange(3, numbers.width, 2)))


def random_scale(numbers: Round, rng: Generator) -> float:
    """Factor by which the sides grow."""
    low, high = numbers.scale
    change = rng.choice(3, p=numbers.resize)
    return (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[change]


def blurred(x: Tensor, kernel: Tensor) -> Tensor:
    """(3, H, W) images convolved with a (k, k) kernel that equals itself turned by 180 degrees; borders reflected.

    By Fourier transforms: seven times as fast as a convolution with 19 x 19 pixels, as fast with 7 x 7.
    """
    pad = len(kernel) // 2
    x = functional.pad(x, (pad, pad, pad, pad), mode="reflect")
    height, width = x.shape[-2:]
    size = [-(-side // 8) * 8 for side in (height, width)]  # sides with large prime factors are slow
    product = torch.fft.rfft2(x, size) * torch.fft.rfft2(kernel, size)
    return torch.fft.irfft2(product, size)[..., 2 * pad : height, 2 * pad : width]


def noisy(x: Tensor, numbers: Round, rng: Generator) -> Tensor:
    """(3, H, W) with Gaussian or Poisson noise, in [0, 1]."""
    gray = rng.random() < _GRAY
    if rng.random() < _GAUSSIAN:
        shape = x.shape[1:] if gray else x.shape
        deviation = np.float32(rng.uniform(*numbers.gaussian) / 255)
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * deviation)
    else:
        strength = rng.uniform(*numbers.poisson)
        noise = strength * _shot_noise((x * _LUMA).sum(0) if gray else x, rng)
    return (x + noise).clamp(0, 1)


def _shot_noise(x: Tensor, rng: Generator) -> Tensor:
    """Poisson counts minus their mean, in units where white is 1; the count of white is the number of levels in use."""
    levels = _bytes(x)
    most = 2 ** math.ceil(math.log2(len(levels.unique())))
    mean = levels.numpy() / np.float32(255)
    return torch.from_numpy((rng.poisson(mean * most) / most - mean).astype(np.float32))


def _resized(x: Tensor, height: int, width: int, rng: Generator) -> Tensor:
    """(3, height, width) by a random filter; as in the reference, shrinking by bilinear and bicubic aliases."""
    return functional.interpolate(x[None], (height, width), mode=_FILTERS[rng.integers(3)])[0]


def _compressed(x: Tensor, rng: Generator) -> Tensor:
    """(3, H, W) after JPEG of a random quality."""
    from torchvision.transforms.v2.functional import jpeg  # type: ignore[import-untyped]

    return jpeg(_bytes(x), int(rng.integers(*_JPEG, endpoint=True))) / 255


def _bytes(x: Tensor) -> Tensor:
    """[0, 1] to 8 bits, rounded."""
    return (x * 255).round().clamp(0, 255).byte()
