"""Judges of generated tokens that need no network and no download."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sgm.metrics.base import DoubleMetric


def check_tokens(x: Tensor, vocabulary: int) -> None:
    """Raise a ValueError unless all of ``x`` are in [0, vocabulary)."""
    if x.numel() and (int(x.min()) < 0 or int(x.max()) >= vocabulary):
        raise ValueError(
            f"tokens must be in [0, {vocabulary}), found {int(x.min())} to {int(x.max())}: is a mask left in a sample?"
        )


def _bits(counts: Tensor) -> Tensor:
    """Sum of -c log2 c over a tensor of counts; 0 log 0 = 0."""
    return -torch.special.xlogy(counts, counts) / math.log(2)


class UnigramEntropy(DoubleMetric):
    """Entropy of token frequencies in bits per token, of samples and of data.

    Two numbers with different meanings: ``sequence_entropy`` is the entropy of the frequencies within one sequence,
    averaged over sequences (Zheng et al. 2025; at most log2 L, and low when a sequence repeats itself), and
    ``corpus_entropy`` that of all sequences together (at most log2 V). Read generative perplexity only next to
    them: sampling with too little precision lowers both.

    Args:
        vocabulary: number V of real tokens, or anything above it (a frequency table of that size is kept).

    Attributes:
        inputs: the batch entries passed to ``update``.
    """

    inputs: tuple[str, ...] = ("x",)
    name = "unigram_entropy"

    def __init__(self, vocabulary: int = 65536) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        for side in ("real", "generated"):
            self.add_sum(f"{side}_counts", vocabulary)
            self.add_sum(f"{side}_entropies")
            self.add_sum(f"{side}_sequences")

    def update(self, x: Tensor, real: bool) -> None:
        """Add sequences.

        Args:
            x: (B, L) tokens in [0, V), long.
            real: whether they are data or samples.
        """
        check_tokens(x, self.vocabulary)
        rows, length = x.shape
        row = torch.arange(rows, device=x.device)[:, None]
        # Counting the distinct (row, token) pairs needs memory for B L of them, not B V.
        pairs, counts = torch.unique(row * self.vocabulary + x, return_counts=True)
        entropies = torch.zeros(rows, dtype=torch.float64, device=x.device)
        entropies.index_add_(0, pairs // self.vocabulary, _bits(counts.double()))
        side = "real" if real else "generated"
        self.add(f"{side}_counts", torch.bincount(pairs % self.vocabulary, counts.double(), self.vocabulary))
        self.add(f"{side}_entropies", (entropies / length + math.log2(length)).sum())
        self.add(f"{side}_sequences", rows)

    def compute(self) -> dict[str, Tensor]:
        """Bits per token: sequence_entropy and corpus_entropy of samples, and with ``_real`` of data; what was fed."""
        result = {}
        for side, suffix in (("generated", ""), ("real", "_real")):
            sequences, counts = getattr(self, f"{side}_sequences"), getattr(self, f"{side}_counts")
            if sequences > 0:
                total = counts.sum()
                result[f"sequence_entropy{suffix}"] = getattr(self, f"{side}_entropies") / sequences
                result[f"corpus_entropy{suffix}"] = _bits(counts).sum() / total + total.log2()
        return result


class NGramJudge(DoubleMetric):
    """Bits per token that an n-gram model of real text needs for sequences: an offline generative perplexity.

    Interpolated Witten-Bell smoothing (Bell, Witten and Cleary 1990): with c(h w) occurrences of w after history h,
    c(h) of h and T(h) distinct tokens after it,

        P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h)),   h' = h without its first token,

    down to the uniform distribution over V tokens; an unseen h passes on P(w | h'). The first ``order - 1`` tokens
    of a sequence are not scored. Good text is not the lowest value but that of real text: give both. For byte
    tokens the unit is bits per byte.

    Args:
        vocabulary: number V of real tokens; ``prepare`` takes that of the data.
        order: n; a token is judged by the n - 1 before it.
        most: tokens of the training text from which ``prepare`` learns, the first ones. In order 6 learning takes 60
            bytes of memory per token of English bytes and at most 170, of which 10 and at most 150 stay.

    Attributes:
        inputs: the batch entries passed to ``update``.
        floor: no floor is computed: the training text is what the judge knows by heart.
    """

    inputs: tuple[str, ...] = ("x",)
    name = "ngram_judge"
    floor = False

    def __init__(self, vocabulary: int = 256, order: int = 6, most: int = 20_000_000) -> None:
        super().__init__()
        if order < 1 or most < order:
            raise ValueError(f"NGramJudge needs order >= 1 and most >= order tokens, got {order} and {most}")
        self.most = most
        self.vocabulary = vocabulary
        self.order = order
        self._levels: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for side in ("real", "generated"):
            self.add_sum(f"{side}_bits")
            self.add_sum(f"{side}_tokens")

    def prepare(self, data: Any) -> None:
        """Learn from the training blocks of a DataModule, unless ``fit`` has been called.

        Raises:
            ValueError: there is no DataModule.
        """
        if self._levels:
            return
        if data is None:
            raise ValueError("NGramJudge learns from the training text: give a DataModule, or call fit(tokens) first")
        self.vocabulary = data.spec["vocabulary"]
        blocks = min(data.count("train"), -(-self.most // data.spec["length"]))
        if getattr(data, "streaming", False):  # its blocks have no numbers
            parts = [data.examples("train", blocks)["x"].flatten()]
        else:
            parts = [data.fetch("train", index, None)["x"].flatten() for index in torch.arange(blocks).split(4096)]
        self.fit(torch.cat(parts)[: self.most])

    def fit(self, tokens: Tensor) -> None:
        """Count the n-grams of one long text; replaces an earlier fit, and ``reset`` keeps it.

        Args:
            tokens: (N,) long, N >= order.
        """
        check_tokens(tokens, self.vocabulary)
        if tokens.dim() != 1 or len(tokens) < self.order:
            raise ValueError(
                f"NGramJudge needs one text (N,) of at least {self.order} tokens, got {tuple(tokens.shape)}"
            )
        tokens = tokens.cpu()
        self._levels = []
        # node[i] numbers the distinct k-grams that start at i: a (k+1)-gram is its number and one token, so keys
        # stay below N V whatever the order.
        node = torch.zeros(len(tokens), dtype=torch.long)
        nodes = 1
        for k in range(self.order):
            parent = node[: len(tokens) - k]
            keys, node, counts = torch.unique(
                parent * self.vocabulary + tokens[k:], return_inverse=True, return_counts=True
            )
            history = keys // self.vocabulary
            occurrences = torch.zeros(nodes, dtype=torch.float64).index_add_(0, history, counts.double())
            distinct = torch.bincount(history, minlength=nodes).double()
            self._levels.append((keys, counts.double(), occurrences, distinct))
            nodes = len(keys)

    def log2_probability(self, x: Tensor) -> Tensor:
        """log2 P of every scored token.

        Args:
            x: (B, L) tokens in [0, V), long.

        Returns:
            (B, L - order + 1) float64 on the CPU: tokens order - 1, ..., L - 1 given those before them.
        """
        if not self._levels:
            raise ValueError("NGramJudge has no text to judge by: call fit(tokens) first")
        check_tokens(x, self.vocabulary)
        x = x.cpu()
        scored = x.shape[1] - self.order + 1
        if scored < 1:
            raise ValueError(f"NGramJudge of order {self.order} cannot score sequences of {x.shape[1]} tokens")
        probability = torch.full((len(x), scored), 1.0 / self.vocabulary, dtype=torch.float64)
        for size in range(1, self.order + 1):
            start = self.order - size
            node = torch.zeros(len(x), scored, dtype=torch.long)
            for k in range(size):
                keys, counts, occurrences, distinct = self._levels[k]
                history = node
                node = _find(keys, history, x[:, start + k : start + k + scored], self.vocabulary)
            total, kinds = occurrences[history.clamp(min=0)], distinct[history.clamp(min=0)]
            # The last gram of the text is known but nothing follows it.
            seen = (history >= 0) & (total > 0)
            count = torch.where(node >= 0, counts[node.clamp(min=0)], 0.0)
            smoothed = (count + kinds * probability) / (total + kinds)
            probability = torch.where(seen, smoothed, probability)
        return probability.log2()

    def update(self, x: Tensor, real: bool) -> None:
        """Judge sequences.

        Args:
            x: (B, L) tokens in [0, V), long, L >= order.
            real: whether they are data or samples.
        """
        scores = self.log2_probability(x)
        side = "real" if real else "generated"
        self.add(f"{side}_bits", -scores.sum().to(self.device))
        self.add(f"{side}_tokens", scores.numel())

    def compute(self) -> dict[str, Tensor]:
        """Bits per token: judge_bits of samples and judge_bits_real of data; what was fed."""
        result = {}
        for side, suffix in (("generated", ""), ("real", "_real")):
            tokens = getattr(self, f"{side}_tokens")
            if tokens > 0:
                result[f"judge_bits{suffix}"] = getattr(self, f"{side}_bits") / tokens
        return result


def _find(keys: Tensor, history: Tensor, token: Tensor, vocabulary: int) -> Tensor:
    """Numbers of the grams (history, token) among the sorted ``keys``; -1 where the gram or its history is unknown."""
    wanted = history * vocabulary + token
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where((keys[place] == wanted) & (history >= 0), place, -1)
