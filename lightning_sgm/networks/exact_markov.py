"""The exact masked model of a Markov chain: nothing to train, everything to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sgm.networks.base import Spec, TokenNetwork, entry

# Least log-probability. Finite, so that probability times log-probability stays 0, and small enough never to be drawn.
_LEAST = -1e4


class ExactMarkov(TokenNetwork):
    """ln p(token at i | the other unmasked tokens) of a stationary first-order chain, in closed form.

    Given the nearest unmasked tokens a, m places to the left, and b, n places to the right, others do not matter:

        p(v) ~ (P^m)[a, v] (P^n)[v, b]

    with the stationary law in place of the first factor where there is no such a, and 1 for the second without b. All
    powers of P are made once, so an answer costs two look-ups, whatever the length. Tokens that exclude each other
    (P has zeros) get an answer that is finite, but means nothing.

    This is what a perfect network answers: its masked losses have the entropy of the data as their mean, and its
    samples at many steps are data. It has no parameters, so ``test`` and ``predict`` work and ``fit`` does not.

    Args:
        spec: of data with a known chain (``MarkovDataModule``): ``vocabulary`` V, ``length``, ``transition`` (V rows
            of V probabilities) and ``stationary`` (V) are used.

    Raises:
        ValueError: data of another kind; at a call: sequences longer than ``length``.
    """

    left: Tensor
    right: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.vocabulary = int(entry(spec, "vocabulary", "ExactMarkov"))
        self.length = int(entry(spec, "length", "ExactMarkov"))
        transition = torch.tensor(entry(spec, "transition", "ExactMarkov"), dtype=torch.float64)
        stationary = torch.tensor(entry(spec, "stationary", "ExactMarkov"), dtype=torch.float64)
        powers = [torch.eye(self.vocabulary, dtype=torch.float64)]
        for _ in range(self.length):
            powers.append(powers[-1] @ transition)
        table = torch.stack(powers)
        # Row V of each table, that of the mask, is for "no such neighbour".
        left = torch.cat([table, stationary.expand(len(table), 1, -1)], dim=1)
        right = torch.cat([table.transpose(1, 2), torch.ones_like(table[:, :1])], dim=1)
        self.register_buffer("left", left.log().clamp_min(_LEAST), persistent=False)
        self.register_buffer("right", right.log().clamp_min(_LEAST), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens (B, L) to log-probabilities (B, L, V) float64, or (N, V) at the flat ``positions``."""
        if x.shape[1] > self.length:
            raise ValueError(
                f"ExactMarkov was built for sequences of up to {self.length} tokens, got {x.shape[1]}: set the length "
                f"in its spec"
            )
        a, m = _nearest_before(x, self.vocabulary)
        b, n = (found.flip(1) for found in _nearest_before(x.flip(1), self.vocabulary))
        if positions is not None:
            a, m, b, n = (found.flatten()[positions] for found in (a, m, b, n))
        return (self.left[m, a] + self.right[n, b]).log_softmax(-1)


def _nearest_before(x: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """The last token before each place that is not ``mask``, else ``mask``, and how far away it is; (B, L) int64 each.

    The distance is 1 at least; without such a token it is that to the place before the first one.
    """
    place = torch.arange(x.shape[1], device=x.device)
    last = place.masked_fill(x == mask, -1).cummax(1).values
    # Strictly before: what stands at a place does not speak for itself.
    last = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)
    token = x.gather(1, last.clamp_min(0)).masked_fill(last < 0, mask)
    return token, place - last
