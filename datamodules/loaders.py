"""Loaders over data in memory: batches by indexing, order and augmentation from counters, exact mid-epoch resume.

A torch DataLoader fetches example by example and collates; indexing a tensor with a batch of indices is several times
cheaper for small examples. Order, random windows and augmentations are functions of (seed, epoch, index), never of a
generator's state, so a run can be continued from any batch and does not notice validation or sampling in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Batch = dict[str, Tensor]
Fetch = Callable[[Tensor, int | None], Batch]

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ORDER = 1  # purpose of a hash: the order of an epoch; other users of `hashed` take other numbers


def splitmix(seed: NDArray[np.uint64], position: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Element ``position`` of the SplitMix64 stream of ``seed``, with broadcasting (Steele, Lea, Flood 2014).

    Args:
        seed: uint64 array, one stream each.
        position: uint64 array, which element of the stream.

    Returns:
        uint64 array of the broadcast shape; all 64 bits are usable.
    """
    x = seed + (position + np.uint64(1)) * _GOLDEN
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x


def hashed(index: Tensor, *counters: int) -> NDArray[np.uint64]:
    """64 random bits per example: a function of (counters, index[i]) alone.

    Args:
        index: (B,) int64 indices >= 0.
        counters: what the bits are for, e.g. seed, epoch, purpose; any integers.

    Returns:
        (B,) uint64.
    """
    seed = np.zeros(1, dtype=np.uint64)
    for counter in counters:
        seed = splitmix(seed, np.array([counter & _MASK], dtype=np.uint64))
    return splitmix(seed, index.numpy().astype(np.uint64))


def uniform(seeds: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1), ``count`` for each seed.

    Args:
        seeds: (B,) uint64, e.g. from ``hashed``.
        count: numbers per row.

    Returns:
        (B, count) float32 with 24 random bits.
    """
    words = np.arange((count + 1) // 2, dtype=np.uint64)
    halves = splitmix(seeds[:, None], words).view(np.uint32)[:, :count]  # two numbers from each 64 bits
    return (halves >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def permutation(length: int, *counters: int) -> Tensor:
    """A (length,) int64 permutation of 0..length-1, a function of ``counters`` alone."""
    seed = int(hashed(torch.zeros(1, dtype=torch.int64), *counters)[0] >> np.uint64(1))
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def process_rank() -> tuple[int, int]:
    """(rank, number of processes) of the running torch.distributed group; (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class EvalLoader:
    """All examples once, in order, without padding: rank r of w serves the indices r, r + w, r + 2 w, ...

    Sums over examples are then exact on any number of processes (a padding sampler counts some examples twice).

    Args:
        fetch: ``fetch(index (B,) int64, None)`` returns the batch as a dict of tensors.
        examples: number of examples in the split.
        batch_size: examples per batch and process; the last batch may be smaller.
        ranks: (rank, number of processes); None asks torch.distributed when iteration starts.
    """

    def __init__(self, fetch: Fetch, examples: int, batch_size: int, ranks: tuple[int, int] | None = None) -> None:
        self.fetch = fetch
        self.examples = examples
        self.batch_size = batch_size
        self.ranks = ranks

    def __len__(self) -> int:
        rank, world = self.ranks or process_rank()
        return -(-len(range(rank, self.examples, world)) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rank, world = self.ranks or process_rank()
        for index in torch.arange(self.examples)[rank::world].split(self.batch_size):
            if len(index):  # a split of nothing is one empty piece
                yield {**self.fetch(index, None), "index": index}


class TrainLoader:
    """Examples in a new order each epoch, the same number of full batches on every process, resumable in mid-epoch.

    The order is a permutation from (seed, epoch). Global batch b is its b-th stretch of ``batch_size * processes``
    indices, of which each process serves its part; what does not fill a global batch waits for another epoch. The epoch
    is set from outside (Lightning calls ``loader.sampler.set_epoch``); without that every iteration is of epoch 0.

    Args:
        fetch: ``fetch(index (B,) int64, epoch)`` returns the batch as a dict of tensors.
        examples: number of examples in the split.
        batch_size: examples per batch and process. Shrunk, with a warning, if the split cannot fill one global batch.
        seed: of the order.
        ranks: (rank, number of processes); None asks torch.distributed when iteration starts.
        reshuffle: False keeps the order and the augmentations of epoch 0 (overfitting on a few batches).
        finished: number of batches of this epoch whose training step is finished. With it a step that is interrupted
            (Ctrl-C, an exception) and saved is done again after resuming; None counts every batch handed out.
    """

    def __init__(
        self,
        fetch: Fetch,
        examples: int,
        batch_size: int,
        seed: int = 0,
        ranks: tuple[int, int] | None = None,
        reshuffle: bool = True,
        finished: Callable[[], int] | None = None,
    ) -> None:
        self.fetch = fetch
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = ranks
        self.reshuffle = reshuffle
        self.finished = finished
        self._epoch = 0
        self._done = {"epoch": 0, "batches": 0}
        self._resume: dict[str, int] | None = None

    @property
    def sampler(self) -> TrainLoader:
        """Itself: Lightning looks for ``set_epoch`` here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iterations that start from now on."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """How far this loader is: ``{"epoch": e, "batches": batches of it done}``, plain integers."""
        if self._resume is not None:
            return dict(self._resume)
        batches = self._done["batches"]
        return {**self._done, "batches": min(batches, self.finished()) if self.finished else batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start after ``state["batches"]`` batches, if it is of epoch ``state["epoch"]``.

        A state saved at the end of an epoch thus does not shorten the next one, whatever the Trainer's batch limits.
        """
        self._resume = {"epoch": int(state["epoch"]), "batches": int(state["batches"])}

    def __len__(self) -> int:
        _, world = self.ranks or process_rank()
        return self.examples // (self._rows(world) * world)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing runs before the first batch is asked for. Lightning calls iter() before set_epoch, and
        # makes iterators that it never uses.
        rank, world = self.ranks or process_rank()
        rows = self._rows(world)
        if rows < self.batch_size:
            warnings.warn(
                f"the training data have {self.examples} examples, fewer than one batch of {self.batch_size} on each "
                f"of {world} process(es): batches of {rows} are used",
                stacklevel=2,
            )
        epoch = self._epoch
        resume, self._resume = self._resume, None
        first = resume["batches"] if resume and resume["epoch"] == epoch else 0
        clock = epoch if self.reshuffle else 0
        order = permutation(self.examples, self.seed, clock, _ORDER)
        for number in range(first, len(self)):
            start = (number * world + rank) * rows
            index = order[start : start + rows]
            batch = {**self.fetch(index, clock), "index": index}
            self._done = {"epoch": epoch, "batches": number + 1}
            yield batch

    def _rows(self, world: int) -> int:
        """Rows of a batch on one process."""
        if self.examples < world:
            raise ValueError(f"the training data have {self.examples} examples, fewer than the {world} processes")
        return min(self.batch_size, self.examples // world)
