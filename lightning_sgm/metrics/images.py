"""Distances between sets of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_sgm.metrics.base import DoubleMetric

LARGEST = 4096


class FrechetDistance(DoubleMetric):
    """Frechet distance between Gaussians fitted to real and to generated images.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau 1982; on features: Heusel et al. 2017), with the
    covariances' unbiased estimates, in float64. Without ``features`` it compares raw pixels, as values in [0, 1]:
    cheap, needs no weights, and good for small images. With ``features`` it is "FID with that network". The value
    falls with the number of images: compare only values with equal counts, and know the floor (real against real).

    The size of the sums comes with the first batch: under DDP every process must see an image.

    Args:
        features: network from images (B, C, H, W), float32 in the data's range [-1, 1] as the batch has them, to
            (B, F); frozen here and always used in eval mode. A network that wants uint8 or [0, 1] images converts
            itself.

    Attributes:
        name: "frechet_pixels" or "frechet_<class of features>", for tables and logs.
        inputs: the batch entries passed to ``update``.

    """

    higher_is_better = False
    inputs: tuple[str, ...] = ("x",)
    real_count: Tensor
    real_sum: Tensor
    real_outer: Tensor
    generated_count: Tensor
    generated_sum: Tensor
    generated_outer: Tensor

    def __init__(self, features: nn.Module | None = None) -> None:
        super().__init__()
        self.name = "frechet_pixels" if features is None else f"frechet_{type(features).__name__}"
        self.features = features
        if features is not None:
            features.requires_grad_(False)

    def update(self, x: Tensor, real: bool) -> None:
        """Add images.

        Args:
            x: (B, C, H, W), float in [-1, 1].
            real: whether they are data or samples.

        Raises:
            ValueError: more than 4096 numbers per image (the covariances would be too large), or other sizes than
                before, or features that are not (B, F).
        """
        vectors = self._vectors(x)
        self._make_room(vectors.shape[1])
        side = "real" if real else "generated"
        self.add(f"{side}_count", len(vectors))
        self.add(f"{side}_sum", vectors.sum(0))
        self.add(f"{side}_outer", vectors.T @ vectors)

    def _make_room(self, size: int) -> None:
        """Add the states for ``size`` numbers per image, once."""
        if "real_sum" in self._defaults:
            if size != len(self.real_sum):
                raise ValueError(f"{self.name} began with {len(self.real_sum)} numbers per image and now got {size}")
            return
        if size > LARGEST:
            raise ValueError(
                f"a Frechet distance on {size} numbers per image needs {size} x {size} covariances: give a feature "
                f"network with at most {LARGEST} outputs as features="
            )
        for side in ("real", "generated"):
            self.add_sum(f"{side}_count")
            self.add_sum(f"{side}_sum", size)
            self.add_sum(f"{side}_outer", size, size)

    def compute(self) -> Tensor:
        """The squared distance, a float64 scalar >= 0, in squared units of pixels (black 0, white 1) or features."""
        seen = [int(getattr(self, f"{side}_count", 0)) for side in ("real", "generated")]
        if min(seen) < 2:
            raise ValueError(f"{self.name} needs at least 2 real and 2 generated images, got {seen[0]} and {seen[1]}")
        real_mean, real_covariance = moments(self.real_count, self.real_sum, self.real_outer)
        mean, covariance = moments(self.generated_count, self.generated_sum, self.generated_outer)
        return frechet(real_mean, real_covariance, mean, covariance)

    @torch.no_grad()
    def _vectors(self, x: Tensor) -> Tensor:
        """(B, D) float64: pixels in [0, 1], or features computed in float32 whatever the autocast."""
        if self.features is None:
            return (x.double().flatten(1) + 1) / 2
        self.features.eval()
        with torch.autocast(x.device.type, enabled=False):
            vectors = self.features(x.float())
        if vectors.dim() != 2 or len(vectors) != len(x):
            raise ValueError(
                f"{type(self.features).__name__} made {tuple(vectors.shape)} of {len(x)} images: "
                f"a feature network must give ({len(x)}, features)"
            )
        return vectors.double()


def moments(count: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D)."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def frechet(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> Tensor:
    """The squared Frechet distance of two Gaussians.

    tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2 with symmetric roots R: nothing leaves the real
    numbers, and singular covariances (constant pixels) cost no digits, unlike roots of eigenvalues of S1 S2.
    """
    cross = torch.linalg.svdvals(_root(covariance_1) @ _root(covariance_2)).sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross
    return distance.clamp(min=0)


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
