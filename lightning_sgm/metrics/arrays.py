"""Distances between sets of arrays of any shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

LARGEST = 20000


class EnergyDistance(Metric):
    """Energy distance between the laws of real and generated arrays, on their values as the batch has them.

    sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|) (Szekely and Rizzo 2013), with Euclidean norms over all values of an
    example. It is 0 only for equal laws, unlike a Frechet distance, which sees two moments. Pairs of an example with
    itself are left out, so the square is unbiased and may come out below 0, which is given as a negative root. Compare
    values with equal counts, and know the floor (real against real).

    Attributes:
        name: "energy_distance", for tables and logs.
        inputs: the batch entries passed to ``update``.
    """

    higher_is_better = False
    full_state_update = False
    is_differentiable = False
    name = "energy_distance"
    inputs: tuple[str, ...] = ("x",)
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for side in ("real", "generated"):
            self.add_state(side, [], dist_reduce_fx="cat")

    def update(self, x: Tensor, real: bool) -> None:
        """Add examples.

        Args:
            x: (B, *) floats.
            real: whether they are data or samples.

        Raises:
            ValueError: another shape than before.
        """
        found = x.detach().flatten(1)
        side = self.real if real else self.generated
        for before in (self.real, self.generated):
            if before and before[0].shape[1] != found.shape[1]:
                raise ValueError(
                    f"energy_distance began with {before[0].shape[1]} values per example and now got {found.shape[1]}"
                )
        side.append(found.float())

    def compute(self) -> Tensor:
        """The distance, a float64 scalar, in the units of the values.

        Raises:
            ValueError: fewer than 2 examples on a side, or more than 20000 (all pairs are compared).
        """
        real, generated = (_joined(side) for side in (self.real, self.generated))
        if min(len(real), len(generated)) < 2 or max(len(real), len(generated)) > LARGEST:
            raise ValueError(
                f"energy_distance needs 2 to {LARGEST} real and generated examples, got {len(real)} and "
                f"{len(generated)}: change test_samples or the number of test examples"
            )
        square = 2.0 * _mean_distance(real, generated, same=False)
        square = square - _mean_distance(real, real, same=True) - _mean_distance(generated, generated, same=True)
        return square.sign() * square.abs().sqrt()


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    """(N, D), however many processes were gathered."""
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.zeros(0, 1)


def _mean_distance(a: Tensor, b: Tensor, same: bool) -> Tensor:
    """Mean |a_i - b_j|, float64; without the pairs i = j if they are the ``same``."""
    # Exact differences: the matrix product that cdist would use loses digits between near points.
    exact = "donot_use_mm_for_euclid_dist"
    total = sum(torch.cdist(piece, b, compute_mode=exact).sum(dtype=torch.float64) for piece in a.split(1024))
    return torch.as_tensor(total) / (len(a) * (len(b) - int(same)))
