"""Likelihoods of held-out data with an honest error bar: of tokens by a bound, of images in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from lightning_sgm.metrics.base import DoubleMetric

_ENOUGH = 10  # repeated passes of batches for a regression


class TokenLikelihood(DoubleMetric):
    """Negative log-likelihood per token, perplexity, bits per token and per byte, with Monte-Carlo standard errors.

    The estimate of one example is noisy (masks are drawn), so a data set is passed several times: call ``update``
    once per batch and pass. The mean is over tokens and passes: sum of ``tokens * nll`` / sum of ``tokens``. With
    masked losses it estimates an upper bound of the NLL (Ou et al. 2025, eq. 3.5 and below).

    ``standard_error`` is that of the Monte-Carlo estimate of *this data set's* NLL. The unit is a batch: the total
    NLL S_g of the examples given in one call is compared with the totals of the same examples in other passes. With
    n_g passes of batch g, T_g tokens in it and M_g = sum over passes of (S_g - mean of S_g)^2,

        v = sum_g M_g / sum_g (n_g - 1) T_g   (variance per token),   standard_error = sqrt(v / tokens drawn in all).

    An estimate may come with a ``control`` of mean 0 by chance alone (see ``MaskedObjective.evaluate``). Then S_g - b
    C_g takes the place of S_g, where C_g is the total of the controls and b comes from the regression of S on C among
    the passes of each batch (one degree of freedom less) if there are ten of them, and is the mean NLL, about what a
    masked token costs, if there are fewer: that leaves the mean as it is and makes the error smaller.

    Draws may depend on each other within a batch (levels stratified over it make the error smaller, and this sees
    it), not between batches or passes. A data set in one batch leaves only n - 1 degrees of freedom. If no batch
    came twice (one pass, or batches mixed anew in each pass) the standard error is the spread over examples,
    sqrt(token-weighted variance of nll / (examples - 1)): it then also holds the variation of the data and means
    the error of the *population's* NLL, examples taken as independent. Errors of perplexity and bits follow by the
    delta method (perplexity's is perplexity * standard_error).

    Under DDP each process compares its own batches; all sums are added. Use ``update`` and ``compute``; calling the
    metric is refused, because it would forget the earlier passes.

    Args:
        bytes_per_token: mean number of bytes of text that a token stands for, 1 for byte tokens; None if unknown, then
            there are no bits per byte.
    """

    higher_is_better = False
    total: Tensor
    squares: Tensor
    tokens: Tensor
    examples: Tensor
    within: Tensor
    freedom: Tensor
    repeats: Tensor
    control: Tensor
    control_within: Tensor
    both_within: Tensor

    def __init__(self, bytes_per_token: float | None = None) -> None:
        super().__init__()
        if bytes_per_token is not None and not bytes_per_token > 0:
            raise ValueError(f"bytes_per_token is {bytes_per_token}: it must be positive (1 for byte tokens)")
        self.bytes_per_token = bytes_per_token
        for name in ("total", "squares", "tokens", "examples", "within", "freedom", "repeats"):
            self.add_sum(name)
        for name in ("control", "control_within", "both_within"):
            self.add_sum(name)
        self._passes: dict[tuple[int, ...], tuple[int, float, float]] = {}

    def update(self, nll: Tensor, index: Tensor, tokens: int, control: Tensor | None = None) -> None:
        """Add one pass of one batch.

        Args:
            nll: (B,) nats per token of each example, one draw.
            index: (B,) int64, which examples of the data set these are.
            tokens: number of tokens of every example.
            control: (B,) numbers whose expectation is 0, in nats per token; None for none.
        """
        if nll.shape != index.shape or nll.dim() != 1:
            raise ValueError(f"nll {tuple(nll.shape)} and index {tuple(index.shape)} must both have the shape (batch,)")
        nll = nll.detach().double()
        controls = torch.zeros_like(nll) if control is None else control.detach().double()
        # One wait for the device.
        value, chance = (torch.stack([nll.sum(), controls.sum()]) * tokens).tolist()
        self.add("total", value)
        self.add("control", chance)
        self.add("squares", nll.square().sum() * tokens)
        self.add("tokens", tokens * len(nll))
        self.add("examples", len(nll))
        # Welford's update: the passes of one batch never have to be kept.
        batch = tuple(sorted(index.tolist()))
        passes, mean, control_mean = self._passes.get(batch, (0, 0.0, 0.0))
        difference, control_difference = value - mean, chance - control_mean
        mean += difference / (passes + 1)
        control_mean += control_difference / (passes + 1)
        self._passes[batch] = (passes + 1, mean, control_mean)
        if passes:
            self.add("within", difference * (value - mean))
            self.add("both_within", difference * (chance - control_mean))
            self.add("control_within", control_difference * (chance - control_mean))
            self.add("freedom", tokens * len(nll))
            self.add("repeats", 1)

    def compute(self) -> dict[str, Tensor]:
        """The estimates, float64 scalars.

        Returns:
            nll (nats per token), perplexity, bits_per_token, standard_error (of nll), perplexity_standard_error; with
            ``bytes_per_token`` also bits_per_byte and bits_per_byte_standard_error. The errors are NaN for a single
            example.
        """
        if self.tokens == 0:
            raise ValueError("TokenLikelihood has seen no example: call update before compute")
        nll, within, freedom = self.total / self.tokens, self.within, self.freedom
        if self.control_within > 0:
            slope = nll
            if self.repeats >= _ENOUGH:
                slope = self.both_within / self.control_within
                freedom = freedom * (self.repeats - 1) / self.repeats
            nll = nll - slope * self.control / self.tokens
            within = within - 2 * slope * self.both_within + slope.square() * self.control_within
            within = within.clamp(min=0)
        if freedom > 0:
            variance = within / freedom / self.tokens
        else:
            variance = (self.squares / self.tokens - nll.square()).clamp(min=0) / (self.examples - 1)
        error, perplexity = variance.sqrt(), nll.exp()
        result = {
            "nll": nll,
            "perplexity": perplexity,
            "bits_per_token": nll / math.log(2),
            "standard_error": error,
            "perplexity_standard_error": perplexity * error,
        }
        if self.bytes_per_token is not None:
            per_byte = 1 / (math.log(2) * self.bytes_per_token)
            result |= {"bits_per_byte": nll * per_byte, "bits_per_byte_standard_error": error * per_byte}
        return result

    def reset(self) -> None:
        """Forget all examples and passes."""
        super().reset()
        self._passes = {}

    def forward(self, nll: Tensor, index: Tensor, tokens: int, control: Tensor | None = None) -> NoReturn:
        """Refused: torchmetrics resets between calls, and the passes would be lost."""
        raise ValueError("TokenLikelihood cannot be called: use update(nll, index, tokens), then compute()")


class BitsPerDim(DoubleMetric):
    """Negative log-likelihood in bits per dimension, with its standard error, of densities of dequantised data.

    Where n levels fill an interval of width w, a level is a cell of width w / n, and what a code for levels would take
    is -ln p / (D ln 2) + log2(n) - log2(w) bits (Theis et al. 2016, 1511.01844; the offset is 7 for 256 levels in
    [-1, 1] and 8 in [0, 1]). It is an upper bound of the levels' own negative log-likelihood.

    ``standard_error`` is sqrt(variance over examples / examples), that of the mean over data like these. Noise that
    every example has for itself (dequantisation, probes of the divergence) is part of the variance; errors that all
    share (the tolerance of a solver, the prior, one dequantisation for all) are not.

    Args:
        dimensions: D, numbers in an example.
        levels: n >= 1; None for data that are continuous by themselves, whose bits are those of their density.
        value_range: ends of the interval that the dequantised levels fill.
    """

    higher_is_better = False
    total: Tensor
    squares: Tensor
    examples: Tensor

    def __init__(self, dimensions: int, levels: int | None = 256, value_range: Sequence[float] = (-1.0, 1.0)) -> None:
        super().__init__()
        low, high = value_range
        if dimensions < 1 or (levels is not None and levels < 1) or not low < high:
            raise ValueError(
                f"BitsPerDim needs dimensions >= 1, levels >= 1 and a range from low to high, got {dimensions}, "
                f"{levels} and {list(value_range)}"
            )
        self.dimensions = dimensions
        self.offset = 0.0 if levels is None else math.log2(levels) - math.log2(high - low)
        for name in ("total", "squares", "examples"):
            self.add_sum(name)

    def bits(self, log_density: Tensor) -> Tensor:
        """Bits per dimension, (B,) float64, of ln p (B,) in nats."""
        return self.offset - log_density.detach().double() / (self.dimensions * math.log(2))

    def update(self, log_density: Tensor) -> None:
        """Add examples by their ln p, (B,), in nats for the density in the data's units."""
        if log_density.dim() != 1:
            raise ValueError(f"BitsPerDim takes ln p of shape (batch,), got {tuple(log_density.shape)}")
        bits = self.bits(log_density)
        self.add("total", bits.sum())
        self.add("squares", bits.square().sum())
        self.add("examples", len(bits))

    def compute(self) -> dict[str, Tensor]:
        """``bits_per_dim`` and its ``standard_error`` (NaN for a single example), float64 scalars."""
        if self.examples == 0:
            raise ValueError("BitsPerDim has seen no example: call update before compute")
        mean = self.total / self.examples
        variance = (self.squares / self.examples - mean.square()).clamp(min=0)
        return {"bits_per_dim": mean, "standard_error": (variance / (self.examples - 1)).sqrt()}
