"""Maximum mean discrepancies of numbers by histograms: no pairs, constant memory, added over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The evaluation kernel of PaD-TS, K(d) = sum over a of exp(-d^2 / (2 a)); K(0) = 9.
VARIANCES = (0.01, 0.05, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0)
_PIECE = 1 << 18  # numbers that are binned at a time: what they need stays in the cache


@dataclass(frozen=True)
class Grid:
    """Evenly spaced points on which numbers are binned: spread over the four nearest by cubic interpolation.

    The kernel between two numbers then becomes the kernel interpolated between points, with an error of at most
    3 / 128 spacing^4 max|K''''| a side, together 2e-9 for the spacing 2^-10 and VARIANCES. (With linear binning it is
    3e-7 on 8 times as many points.)

    Attributes:
        low, high: the range, a whole number of spacings.
        spacing: between points.
    """

    low: float
    high: float
    spacing: float = 2.0**-10

    @property
    def size(self) -> int:
        """Number of points M: the range, and one more point behind each end."""
        return round((self.high - self.low) / self.spacing) + 3

    def add(self, histograms: Tensor, values: Tensor) -> None:
        """Add numbers to histograms, in place.

        Args:
            histograms: (V, M) float64.
            values: (N, V) floats. Those outside the range count as its ends; NaN makes its histogram NaN.
        """
        for piece in values.split(max(1, _PIECE // max(1, values.shape[1]))):
            place = (piece.T.contiguous().double().clamp(self.low, self.high) - self.low) / self.spacing
            cell = place.floor().nan_to_num().clamp(max=self.size - 4)
            f = place - cell
            a, b, c, d = f + 1, f, f - 1, f - 2
            weights = (b * c * d / -6, a * c * d / 2, a * b * d / -2, a * b * c / 6)
            index = cell.long()
            for point, weight in enumerate(weights):
                histograms.scatter_add_(1, index + point, weight)

    def mmd(self, p: Tensor, q: Tensor, variances: Sequence[float] = VARIANCES) -> Tensor:
        """Biased squared MMDs (V-statistics) between the numbers of two sets of histograms.

        Args:
            p: (V, M) from ``add``; need not be normalised.
            q: likewise.
            variances: of the Gaussians of the kernel.

        Returns:
            (V,) float64 in [0, 2 K(0)]; NaN where a histogram is empty or NaN.
        """
        return self._form(_shares(p) - _shares(q), variances)

    def unbiased(self, p: Tensor, q: Tensor, variances: Sequence[float] = VARIANCES) -> Tensor:
        """As ``mmd``, without the pairs of a number with itself (U-statistics): may be below 0, but not for long."""
        value = self.mmd(p, q, variances)
        for histograms in (p, q):
            own = len(variances) - self._form(_shares(histograms), variances)
            value = value - own / (histograms.sum(1) - 1)
        return value

    def _form(self, w: Tensor, variances: Sequence[float]) -> Tensor:
        """w^T K w for (V, M): the kernel matrix is Toeplitz, so a circulant one of twice the size does it by FFT."""
        length = 1 << (2 * self.size - 1).bit_length()
        lag = torch.arange(length, dtype=torch.float64, device=w.device)
        distance = torch.minimum(lag, length - lag) * self.spacing
        kernel = sum((-distance.square() / (2 * a)).exp() for a in variances)
        spectrum = torch.fft.rfft(torch.as_tensor(kernel)).real
        spectrum[1:-1] *= 2  # each of them stands for two of the whole circle
        forms = [torch.fft.rfft(piece, length).abs().square() @ spectrum for piece in w.split(64)]
        return (torch.cat(forms) / length).clamp(min=0)


def _shares(histograms: Tensor) -> Tensor:
    return histograms / histograms.sum(1, keepdim=True)
