"""Text whose law is known in full: letters from a random Markov chain, with its exact entropy."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.base import SPLITS, DataModule, Split, require_positive
from datamodules.loaders import Batch, hashed, uniform

_LAW, _SEQUENCE = 7, 8  # purposes of hashes, see loaders.py
Array = NDArray[np.floating[Any]]


class MarkovDataModule(DataModule):
    """Stationary first-order Markov chains over letters: a batch has ``x`` (B, length) int64 and ``index`` (B,) int64.

    The best any model can do is known, so this is where to see whether a likelihood is right: no model's expected
    negative log-likelihood is below ``spec["entropy"]``, and a masked model with exact conditionals reaches it in every
    order of the tokens (``ExactMarkov`` is that model). Every letter can follow every other one.

    Sequences are made where they are asked for. Training never sees one twice: each epoch has new ones. Validation and
    test sequences follow from ``law`` alone.

    ``spec``: kind "text", length, vocabulary (``states``), tokenizer ({"characters": "abc..."}), bytes_per_token 1.0,
    transition (``states`` lists of ``states`` probabilities, that of the next letter given a letter), stationary
    (probabilities of a letter), entropy (of the law, nats per token: (H(stationary) + (length - 1) h) / length with the
    entropy rate h).

    Args:
        states: number of letters, 2 to 52.
        length: letters per sequence.
        sharpness: the letters that may follow one have weights E ** sharpness with independent E ~ Exponential(1):
            0 makes all equal (no dependence at all), 1 any law as likely as another, up to 6 ever fewer of them count.
        sequences: of an epoch of training.
        val_sequences: of validation.
        test_sequences: of the test.
        law: which random chain; another number is another language.
        batch_size: sequences per batch and process.
        seed: of the training sequences and their order.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        states: int = 8,
        length: int = 64,
        sharpness: float = 3.0,
        sequences: int = 8192,
        val_sequences: int = 512,
        test_sequences: int = 4096,
        law: int = 0,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        require_positive(length=length, sequences=sequences, val_sequences=val_sequences, test_sequences=test_sequences)
        letters = string.ascii_lowercase + string.ascii_uppercase
        if not 2 <= states <= len(letters):
            raise ValueError(f"states must be 2 to {len(letters)}, one letter each, got {states}")
        if not 0 <= sharpness <= 6:
            raise ValueError(f"sharpness must lie in [0, 6], got {sharpness}")
        self.length, self.law = length, law
        self._counts = dict(zip(SPLITS, (sequences, val_sequences, test_sequences), strict=True))
        transition = _random_transition(states, sharpness, law)
        stationary = stationary_law(transition)
        # Thresholds of a uniform number, without the last one: rounding cannot lead outside the alphabet.
        self._first = stationary.cumsum()[:-1]
        self._next = transition.cumsum(axis=1)[:, :-1]
        self.spec = {
            "kind": "text",
            "length": length,
            "vocabulary": states,
            "tokenizer": {"characters": "".join(sorted(letters[:states]))},
            "bytes_per_token": 1.0,
            "transition": transition.tolist(),
            "stationary": stationary.tolist(),
            "entropy": float(_entropy(stationary) + (length - 1) * stationary @ _entropy(transition)) / length,
        }

    def load(self) -> None:
        """Nothing: sequences are made where they are asked for."""

    def count(self, split: Split) -> int:
        """Number of sequences of a split; of training, those of an epoch."""
        return self._counts[split]

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Sequences ``index`` (B,) of a split, of this epoch if training: x (B, length) int64."""
        stream = (self.seed, epoch or 0) if split == "train" else ()
        bits = hashed(index, self.law, SPLITS.index(split), *stream, _SEQUENCE)
        u = uniform(bits, self.length)[:, :, None]
        x = np.empty((len(index), self.length), dtype=np.int64)
        x[:, 0] = (u[:, 0] >= self._first).sum(axis=1)
        for i in range(1, self.length):
            x[:, i] = (u[:, i] >= self._next[x[:, i - 1]]).sum(axis=1)
        return {"x": torch.from_numpy(x)}


def stationary_law(transition: Array) -> Array:
    """The law (S,) that a step of an irreducible chain leaves as it is; ``transition`` (S, S), rows summing to 1."""
    states = len(transition)
    # p (1 - P) = 0 and sum(p) = 1 in one regular system.
    law: Array = np.linalg.solve(np.eye(states) - transition.T + 1.0, np.ones(states))
    return law


def _random_transition(states: int, sharpness: float, law: int) -> Array:
    bits = hashed(torch.arange(states), law, _LAW)
    inside = uniform(bits, states).astype(np.float64) + 2.0**-25  # neither 0 nor 1: every step stays possible
    weights: Array = (-np.log(inside)) ** sharpness
    return weights / weights.sum(axis=1, keepdims=True)


def _entropy(probabilities: Array) -> Any:
    """In nats, of each row."""
    return -(probabilities * np.log(probabilities)).sum(axis=-1)
