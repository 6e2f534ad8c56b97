"""A two-sample test of windows that sees what recurrent classifiers miss: boosted trees on descriptive statistics."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sgm.metrics.correlations import correlations
from lightning_sgm.metrics.series import autocorrelations
from lightning_sgm.metrics.windows import WindowMetric, first_half
from lightning_sgm.random import Draw

FOLDS = 5
_LAGS = (1, 2, 3, 5)
_PAIRS = 150  # of dimensions: trees on all 1225 pairs of 50 dimensions would take minutes


class ClassifierTwoSample(WindowMetric):
    """|accuracy - 1/2| of gradient-boosted trees that tell real from generated windows (Lopez-Paz and Oquab 2017).

    On statistics of windows (see ``features``), as many real as generated ones, cross-validated. 0 is best, 1/2 the
    worst. Far stronger than the discriminative score and faster: on Sines with white noise of 0.001 of the range it is
    1/2, where that of noise of 0.03 is about 0. So it says early that samples are not the data, and little about how
    far off they are: an exact relation among the data, as between two equal columns, gives any sample away.

    Args:
        limit: windows of each side that are used at most, drawn at random.
        halves: whether two random disjoint halves of the real windows are told apart too, as the floor.
        seed: of folds, draws and halves.

    Attributes:
        name: "two_sample", for tables and logs.
    """

    name = "two_sample"

    def __init__(self, limit: int = 2000, halves: bool = True, seed: int = 0) -> None:
        super().__init__()
        if limit < 2 * FOLDS:
            raise ValueError(f"limit of {self.name} must be at least {2 * FOLDS}, got {limit}")
        self.limit, self.halves, self.seed = limit, halves, seed

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars: two_sample, two_sample_standard_error (binomial, of the accuracy), and halves if wanted.

        NaN where a window is not finite.

        Raises:
            ValueError: fewer than 10 windows on a side, or windows of fewer than 3 time steps.
        """
        real, generated = self.gathered(2 * FOLDS)
        device = real.device
        rank_zero_info(f"{self.name}: telling {len(generated)} windows from {len(real)} by boosted trees")
        value, error = self._accuracy(real, generated)
        found = {self.name: abs(value - 0.5), f"{self.name}_standard_error": error}
        if self.halves:
            first = first_half(real, self.seed)
            found["halves"] = abs(self._accuracy(real[first], real[~first])[0] - 0.5)
        return {key: torch.tensor(entry, dtype=torch.float64, device=device) for key, entry in found.items()}

    def _accuracy(self, real: Tensor, generated: Tensor) -> tuple[float, float]:
        """Share of windows called right by trees grown on other folds, and its standard error."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        sides = real, generated
        count = min(self.limit, *map(len, sides))
        if count < FOLDS or not all(bool(side.isfinite().all()) for side in sides):
            return float("nan"), float("nan")
        draw = Draw(self.seed)
        chosen = [side[draw.uniform((len(side),), torch.float64).argsort()[:count].to(side.device)] for side in sides]
        found = torch.cat([features(side) for side in chosen]).cpu()
        label = torch.arange(2 * count) < count
        fold = torch.arange(2 * count) % count % FOLDS
        right = 0
        for held_out in range(FOLDS):
            test = fold == held_out
            trees = HistGradientBoostingClassifier(early_stopping=False, random_state=self.seed)
            trees.fit(found[~test].numpy(), label[~test].numpy())
            right += int((torch.from_numpy(trees.predict(found[test].numpy())) == label[test]).sum())
        accuracy = right / (2 * count)
        return accuracy, (accuracy * (1 - accuracy) / (2 * count)) ** 0.5


def features(windows: Tensor) -> Tensor:
    """Descriptive statistics of windows, for a classifier.

    Args:
        windows: (B, L, D) floats, L >= 3.

    Returns:
        (B, F) float64: correlations of dimensions and of their steps, of the first 150 pairs in an order drawn once; of
        each dimension mean, least, largest, standard deviations of values, of first and of second differences, and
        autocorrelations at lags 1, 2, 3 and 5.

    Raises:
        ValueError: fewer than 3 time steps.
    """
    length = windows.shape[1]
    if length < 3:
        raise ValueError(f"second differences need windows of at least 3 time steps, got {length}")
    windows = windows.double()
    steps = windows.diff(dim=1)
    deviations = [part.std(1, correction=0) for part in (windows, steps, steps.diff(dim=1))]
    lags = [lag - 1 for lag in _LAGS if lag < length]
    shape = autocorrelations(windows)[:, lags].flatten(1)
    levels = windows.mean(1), windows.amin(1), windows.amax(1)
    together = [correlations(part) for part in (windows, steps)]
    pairs = Draw(0).uniform((together[0].shape[1],), torch.float64).argsort()[:_PAIRS].to(windows.device)
    return torch.cat([*(part[:, pairs] for part in together), *levels, *deviations, shape], 1)
