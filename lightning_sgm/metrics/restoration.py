"""How near restored images are to the true ones, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sgm.metrics.base import DoubleMetric

_STUDIO = (65.481, 128.553, 24.966)  # weights of red, green and blue in luma that runs from 16 to 235 (ITU-R BT.601)
_WINDOW, _WINDOW_DEVIATION = 11, 1.5  # of SSIM
_STABILIZERS = (0.01**2, 0.03**2)


class Fidelity(DoubleMetric):
    """PSNR and SSIM of restored images, in colour and in luma.

    The usual protocol of super-resolution: 8-bit images, no border left out, luma Y = 16 + 65.481 R + 128.553 G
    + 24.966 B of colours in [0, 1], over 255. PSNR is 10 log10 (1 / mean squared error) decibels with values in [0, 1];
    SSIM (Wang et al. 2004) has a Gaussian window of 11 pixels with deviation 1.5 inside the image, averaged over
    channels. Both are means over images. The pooled PSNR is of the mean squared error of all pixels: flat images, which
    are easy, rule the mean, and hard ones the pooled value. Images of one channel have no luma entries.

    Metrics of restoration compare every sample with its own truth (``paired``): they see no real data by themselves,
    and training data give no floor.

    Args:
        rounded: round both images to 8 bits first, as files would hold them.
        most: decibels that an image without error counts.

    Attributes:
        inputs: the batch entries passed to ``update``.

    """

    higher_is_better = True
    paired = True
    floor = False
    inputs: tuple[str, ...] = ("x", "truth")
    name = "fidelity"
    color_images: Tensor

    def __init__(self, rounded: bool = True, most: float = 100.0) -> None:
        super().__init__()
        self.rounded = rounded
        self.most = most
        for kind in ("color", "luma"):
            for name in ("images", "psnr", "ssim", "error", "values"):
                self.add_sum(f"{kind}_{name}")

    def update(self, x: Tensor, truth: Tensor, real: bool = False) -> None:
        """Add images.

        Args:
            x: (B, 1 or 3, H, W) restored, in [-1, 1].
            truth: like x.
            real: has no effect, a pair is always a sample and its truth.

        Raises:
            ValueError: other shapes, or sides below 11 pixels.
        """
        check_pair(x, truth)
        if min(x.shape[-2:]) < _WINDOW:
            raise ValueError(f"SSIM needs images of at least {_WINDOW} x {_WINDOW} pixels, got {tuple(x.shape[-2:])}")
        found, wanted = (unit(side, self.rounded) for side in (x, truth))
        self._compare("color", found, wanted)
        if x.shape[1] == 3:
            self._compare("luma", luma(found), luma(wanted))

    def _compare(self, kind: str, found: Tensor, wanted: Tensor) -> None:
        """Add images with values in [0, 1]."""
        error = (found - wanted).square().flatten(1)
        self.add(f"{kind}_images", float(len(error)))
        self.add(f"{kind}_error", error.sum())
        self.add(f"{kind}_values", float(error.numel()))
        self.add(f"{kind}_psnr", _decibels(error.mean(1)).clamp(max=self.most).sum())
        self.add(f"{kind}_ssim", similarity(found, wanted).sum())

    def compute(self) -> dict[str, Tensor]:
        """psnr, ssim, psnr_pooled, and in luma psnr_y, ssim_y, psnr_y_pooled; float64 scalars.

        Raises:
            ValueError: there was no image.
        """
        if not self.color_images:
            raise ValueError(f"{self.name} has seen no image")
        values: dict[str, Tensor] = {}
        for kind, ending in (("color", ""), ("luma", "_y")):
            total = {name: getattr(self, f"{kind}_{name}") for name in ("images", "psnr", "ssim", "error", "values")}
            if total["images"]:
                values |= {f"{name}{ending}": total[name] / total["images"] for name in ("psnr", "ssim")}
                pooled = _decibels(total["error"] / total["values"]).clamp(max=self.most)
                values[f"psnr{ending}_pooled"] = pooled
        return values


def check_pair(x: Tensor, truth: Tensor) -> None:
    """Raise a ValueError unless both are gray or coloured images of the same shape."""
    if x.shape != truth.shape or x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"restored images {tuple(x.shape)} and true ones {tuple(truth.shape)} must have the same shape "
            f"(B, 1 or 3, H, W)"
        )


def unit(x: Tensor, rounded: bool) -> Tensor:
    """Images in [-1, 1] as float64 in [0, 1], cut to that, and perhaps rounded to 8 bits."""
    x = ((x.double() + 1) / 2).clamp(0, 1)
    return (x * 255).round() / 255 if rounded else x


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to (B, 1, H, W) in [16, 235] / 255."""
    weights = x.new_tensor(_STUDIO)[:, None, None]
    return ((x * weights).sum(1, keepdim=True) + 16) / 255


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, eq. 13) of each pair of images, over all places where the whole window is inside.

    In float64 and one direction after the other: variances are small differences of large numbers, which tensor cores
    (TF32) would round away, and a window of 11 x 11 costs ten times as much.

    Args:
        x: (B, C, H, W) float64 in [0, 1].
        y: like x.

    Returns:
        (B,), mean over channels and places, at most 1.
    """
    offset = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    window = torch.softmax(-(offset**2) / (2 * _WINDOW_DEVIATION**2), 0)
    stacked = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]
    means = functional.conv2d(functional.conv2d(stacked, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mean_x, mean_y, square_x, square_y, product = means.view(5, *x.shape[:2], *means.shape[-2:])
    small, large = _STABILIZERS
    alike = (2 * mean_x * mean_y + small) * (2 * (product - mean_x * mean_y) + large)
    squares = mean_x.square() + mean_y.square()
    return (alike / ((squares + small) * (square_x + square_y - squares + large))).mean((1, 2, 3))


def _decibels(error: Tensor) -> Tensor:
    """PSNR of mean squared errors of values in [0, 1]."""
    return -10 * error.log10()
