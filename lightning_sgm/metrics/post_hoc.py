"""TimeGAN's post-hoc scores of generated series: can a recurrent network tell them, and are they good to train on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence

from lightning_sgm.metrics.recurrent import RecurrentNetworks, sequences, train
from lightning_sgm.metrics.windows import WindowMetric, first_half
from lightning_sgm.random import Draw

_PIECE = 512  # windows that are judged at a time


class PostHocScore(WindowMetric):
    """A score of networks trained after the fact, several times at once from different initial values and batches.

    For the floor, as many networks are trained in the same batched products on two random disjoint halves of the real
    windows: "halves" is the score of the one against the other.

    Subclasses give ``scores``.

    Args:
        repeats: networks trained; the paper's 5. The interval holds for any number, from 2 on.
        iterations: Adam steps of each.
        halves: whether the floor is wanted too; about twice the work, but not twice the time.
        seed: of initial values, batches and splits; equal windows then give equal scores on any number of processes.

    Attributes:
        name: for tables and logs.
    """

    name = "post_hoc"

    def __init__(self, repeats: int, iterations: int, halves: bool, seed: int) -> None:
        super().__init__()
        if repeats < 1 or iterations < 1:
            raise ValueError(f"{self.name} needs at least 1 repeat and 1 iteration, got {repeats} and {iterations}")
        self.repeats, self.iterations, self.halves, self.seed = repeats, iterations, halves, seed

    @abstractmethod
    def scores(self, windows: Tensor, duels: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Scores (duels, repeats), float64: of each pair of index tensors, the second judged against the first."""

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars: NAME, the mean over repeats, and NAME_standard_error, its standard error.

        And NAME_interval, half the width of its 95 % confidence interval over repeats (Student's t), and, if wanted,
        halves (the floor). Error and interval are NaN for one repeat, all is NaN where a window is not finite.

        Raises:
            ValueError: fewer than 10 windows on a side (20 real ones with ``halves``).
        """
        real, generated = self.gathered(least=10)
        if self.halves and len(real) < 20:
            raise ValueError(f"{self.name} needs 20 real windows to halve them, got {len(real)}: set halves to false")
        # Out of inference_mode, which test runs in: networks are trained here.
        with torch.inference_mode(False), torch.enable_grad():
            windows = torch.cat([real, generated])
            every = torch.arange(len(windows))
            duels = [(every[: len(real)], every[len(real) :])]
            if self.halves:
                first = first_half(real, self.seed).cpu()
                duels.append((every[: len(real)][first], every[: len(real)][~first]))
            rank_zero_info(
                f"{self.name}: training {len(duels) * self.repeats} networks at once, {self.iterations} iterations"
            )
            finite = bool(windows.isfinite().all())
            found = self.scores(windows, duels) if finite else torch.full((len(duels), self.repeats), torch.nan)
        return self._summary(found.detach().double().to(self.device))

    def _summary(self, found: Tensor) -> dict[str, Tensor]:
        from scipy.stats import t

        nan = torch.tensor(torch.nan, dtype=torch.float64, device=found.device)
        error = found[0].std() / self.repeats**0.5 if self.repeats > 1 else nan
        factor = float(t.ppf(0.975, self.repeats - 1)) if self.repeats > 1 else 1.0
        values = {
            self.name: found[0].mean(),
            f"{self.name}_standard_error": error,
            f"{self.name}_interval": factor * error,
        }
        return values | ({"halves": found[1].mean()} if self.halves else {})


class DiscriminativeAccuracy(PostHocScore):
    """Discriminative score of TimeGAN (Yoon et al. 2019): |accuracy - 1/2| of a recurrent classifier.

    0 is best, 1/2 the worst. A GRU (TensorFlow's cell) with D // 2 states, at least one, and a linear layer on its last
    state; 2000 Adam steps on 128 real and 128 generated windows of the random 80 % that are not held out. The accuracy
    on the other 20 % is that of both sides with equal weight, which is the reference's where there are equally many. It
    misses much: small noise on smooth series for one. See ``ClassifierTwoSample``.

    Args:
        repeats: networks trained, each with its own split.
        iterations: Adam steps of each.
        halves: whether two halves of the real windows are told apart too.
        seed: of initial values, batches and splits.
    """

    name = "discriminative"

    def __init__(self, repeats: int = 5, iterations: int = 2000, halves: bool = True, seed: int = 0) -> None:
        super().__init__(repeats, iterations, halves, seed)

    def scores(self, windows: Tensor, duels: list[tuple[Tensor, Tensor]]) -> Tensor:
        """|accuracy - 1/2| (duels, repeats) of classifiers on the windows they were not trained on."""
        draw = Draw(self.seed)
        dimensions = windows.shape[2]
        splits = [[_split(side, draw) for side in sides] for sides in duels for _ in range(self.repeats)]
        networks = RecurrentNetworks(len(splits), dimensions, max(1, dimensions // 2), draw, windows.device)

        def logits(rows: Tensor) -> Tensor:
            return networks.outputs(networks.states(sequences(windows, rows))[-1])

        def loss(batches: list[Tensor]) -> Tensor:
            real, generated = logits(torch.cat(batches, 1)).split([rows.shape[1] for rows in batches], 1)
            # Binary cross-entropy of both sides.
            return softplus(-real).mean(1).sum() + softplus(generated).mean(1).sum()

        pools = [[split[side][0] for split in splits] for side in (0, 1)]
        train(networks.parameters, loss, pools, self.iterations, draw, self.name)
        called_real, falsely = (
            _means(lambda rows: logits(rows) > 0, [split[side][1] for split in splits]) for side in (0, 1)
        )
        return ((called_real + 1 - falsely) / 2 - 0.5).abs().view(len(duels), self.repeats)


class PredictiveScore(PostHocScore):
    """Predictive score of TimeGAN (Yoon et al. 2019): error on REAL windows of a predictor trained on generated ones.

    A GRU (TensorFlow's cell) with D // 2 states reads the dimensions but the last at times 1 to L - 1, and a linear
    layer and a sigmoid predict the last dimension one step later; 5000 Adam steps on the mean absolute error of 128
    generated windows. The score is the mean absolute error on all real windows, in units of the training range. It is
    not 0 for perfect samples: compare it with "halves", where the predictor is trained on half of the real windows and
    judged on the other half. A single dimension is predicted from its own past.

    Args:
        repeats: predictors trained.
        iterations: Adam steps of each.
        halves: whether predictors are trained on real windows too.
        seed: of initial values and batches.
    """

    name = "predictive"

    def __init__(self, repeats: int = 5, iterations: int = 5000, halves: bool = True, seed: int = 0) -> None:
        super().__init__(repeats, iterations, halves, seed)

    def update(self, x: Tensor, real: bool) -> None:
        """As for any metric of windows.

        Raises:
            ValueError: not windows, another size than before, or a single time step.
        """
        super().update(x, real)
        if self.units.shape is not None and self.units.shape[0] < 2:
            raise ValueError("predictive predicts the next time step, and these windows have one")

    def scores(self, windows: Tensor, duels: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Mean absolute errors (duels, repeats) on the first of each pair of predictors trained on the second."""
        draw = Draw(self.seed)
        dimensions = windows.shape[2]
        inputs = max(1, dimensions - 1)
        networks = RecurrentNetworks(len(duels) * self.repeats, inputs, max(1, dimensions // 2), draw, windows.device)

        def errors(rows: Tensor) -> Tensor:
            """(R, B), mean over time."""
            x = sequences(windows, rows)
            predicted = networks.outputs(networks.states(x[:-1, :, :inputs])).sigmoid()
            return (predicted - x[1:, :, -1]).abs().mean(0)

        pools = [[generated for _, generated in duels for _ in range(self.repeats)]]
        train(networks.parameters, lambda rows: errors(rows[0]).mean(1).sum(), pools, self.iterations, draw, self.name)
        found = _means(errors, [real for real, _ in duels for _ in range(self.repeats)])
        return found.view(len(duels), self.repeats)


def _split(rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """A random 80 % of some indices, and the others."""
    order = draw.uniform((len(rows),), torch.float64).argsort()
    cut = int(len(rows) * 0.8)
    return rows[order[:cut]], rows[order[cut:]]


@torch.no_grad()
def _means(score: Callable[[Tensor], Tensor], pools: list[Tensor]) -> Tensor:
    """(R,) float64 means of ``score``, which gives (R, B) for the indices (R, B), over the pool of each network."""
    rows = pad_sequence(pools, batch_first=True)
    sizes = torch.tensor([[len(pool)] for pool in pools])
    inside = (torch.arange(rows.shape[1]) < sizes).double()
    pieces = zip(rows.split(_PIECE, 1), inside.split(_PIECE, 1), strict=True)
    return torch.stack([(score(piece).double().cpu() * mask).sum(1) for piece, mask in pieces]).sum(0) / sizes[:, 0]
