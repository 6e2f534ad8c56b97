"""Maximum mean discrepancies of sets of histograms under the two families of kernels that graph papers use."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_sgm.random import Draw

KernelName = Literal["emd", "tv"]
Feature = Literal["degree", "cluster", "orbit", "spectral"]

# Width of the Gaussian, and how many bins make one unit of the distance that is moved.
_SCALES: dict[str, tuple[float, float]] = {
    "degree": (1.0, 1.0),
    "cluster": (0.1, 100.0),
    "orbit": (30.0, 1.0),
    "spectral": (1.0, 1.0),
}
_PIECE = 1 << 22  # entries of the kernel matrix that exist at a time


def embed(values: Tensor, feature: Feature, kernel: KernelName) -> tuple[Tensor, float]:
    """Points whose p-norm distances d make the published kernel exp(-d^2 / 2).

    "emd": d is the earth mover's distance of normalized histograms over the width of the Gaussian, which in one
    dimension is the L1 distance of the cumulative histograms (You et al. 2018, as GDSS has it: degrees move in units
    of degree, clustering coefficients in units of 1, eigenvalues in bins); orbits have the Euclidean distance. "tv":
    half of the L1 distance of the histograms, orbits included (GRAN, Liao et al. 2019; DiGress).

    Args:
        values: (G, W) float64: histograms in counts or, for "orbit", mean counts per node.
        feature: what they are of.
        kernel: which family.

    Returns:
        (G, W) float64, and p.
    """
    width, bins = _SCALES[feature]
    if feature != "orbit":
        values = values / values.sum(-1, keepdim=True)
    if kernel == "tv":
        return values / (2 * width), 1.0
    if feature == "orbit":
        return values / width, 2.0
    return values.cumsum(-1) / (width * bins), 1.0


def squared_mmd(real: Tensor, generated: Tensor, p: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    """MMD^2 = mean k(R, R) + sum w w k(G, G) - 2 sum w mean k(R, G), with k = exp(-d^2 / 2).

    With equal weights it is the biased estimate (V-statistic, Gretton et al. 2012), pairs of a graph with itself
    included. With an earth mover's distance k need not be positive definite: values slightly below 0 are right.

    Args:
        real: (R, W) points.
        generated: (G, W) points.
        p: norm of the distance.
        weights: (S, G) float64; each row sums to 1 and gives one result.

    Returns:
        (S,) float64 results, and (S,) float64 sums w w k(G, G), a part of them.
    """
    equal = torch.full((1, len(real)), 1.0 / len(real), dtype=torch.float64, device=real.device)
    within = (weights * _kernel_sums(generated, generated, p, weights)).sum(-1)
    across = weights @ _kernel_sums(generated, real, p, equal)[0]
    return _kernel_sums(real, real, p, equal).mean() + within - 2 * across, within


def mmd_with_interval(real: Tensor, generated: Tensor, p: float, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The biased MMD^2 and a bootstrap interval for it: the middle 95 % over resampled generated graphs.

    A resample holds some graphs twice, which raises k(G, G) by (1 - mean k(G, G)) / G on average, exactly; that is
    taken off, so the interval lies around the value and not above it.

    Args:
        real: (R, W) points, which are not resampled.
        generated: (G, W) points.
        p: norm of the distance.
        weights: (S, G) from ``bootstrap_weights``.

    Returns:
        Value, lower end and upper end, float64 scalars.
    """
    count = len(generated)
    equal = torch.full((1, count), 1.0 / count, dtype=torch.float64, device=generated.device)
    values, within = squared_mmd(real, generated, p, torch.cat([equal, weights]))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device=values.device)
    low, high = torch.quantile(values[1:] - (1.0 - within[0]) / count, ends)
    return values[0], low, high


def bootstrap_weights(repeats: int, count: int, seed: int) -> Tensor:
    """Shares of ``count`` graphs in ``repeats`` draws of ``count`` of them with replacement.

    Returns:
        (repeats, count) float64; rows sum to 1.
    """
    drawn = Draw(seed).integers(count, (repeats, count))
    drawn_times = torch.zeros(repeats, count, dtype=torch.float64)
    return drawn_times.scatter_add_(1, drawn, torch.ones_like(drawn_times)) / count


def _kernel_sums(a: Tensor, b: Tensor, p: float, weights: Tensor) -> Tensor:
    """(S, A) sums over j of k(a_i, b_j) w_j for each row w of (S, B) weights; k is made in pieces and not kept."""
    sums = []
    for piece in a.split(max(1, _PIECE // len(b))):
        # Exact differences: a matrix product loses the digits of near points.
        distance = torch.cdist(piece, b, p, compute_mode="donot_use_mm_for_euclid_dist")
        sums.append(weights @ distance.square().mul_(-0.5).exp_().T)
    return torch.cat(sums, 1)
