"""Training on a stream of documents: shuffled, tokenized and packed on the fly, disjoint on each process, resumable.

A stream has no length and its tokens are not numbered, so a place in it is a cursor: the window of documents that is
being packed, and how far. Processes differ in theirs, and a checkpoint is written by one of them; so all exchange their
cursors every few batches, and a resumed run goes on from the last exchange, packing again the few batches since then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol, TypedDict

import numpy as np
import torch

from datamodules.corpus import encode
from datamodules.loaders import Batch, permutation, process_rank
from datamodules.text_sources import Chunk
from datamodules.tokenizers import Ids, Tokenizer, storage

_SHARDS, _DOCUMENTS = 11, 12  # purposes of a hash, see loaders.py
_TOGETHER = 64  # documents that are tokenized at once
_EXCHANGE = 50  # batches between two exchanges of cursors


class Shards(Protocol):
    """A set of documents in parts.

    Attributes:
        name: for messages.
        shards: number of parts.
    """

    name: str
    shards: int

    def documents(self, shard: int, skip: int, step: int) -> Iterator[bytes]:
        """Every ``step``-th document of a part from number ``skip`` on."""


class Cursor(TypedDict):
    """A place in the stream of one process, in plain integers.

    Attributes:
        round: how often all documents have been seen.
        shard: number of the window's first shard in this round's order of this process.
        document: number of the window's first document among those of this process in that shard.
        block: blocks of the window that were served.
        rest: tokens of the window before that did not fill a block; the window begins with them.
    """

    round: int
    shard: int
    document: int
    block: int
    rest: list[int]


def start() -> Cursor:
    """The beginning of a stream."""
    return {"round": 0, "shard": 0, "document": 0, "block": 0, "rest": []}


def hold_out(shards: Shards, counts: list[int]) -> tuple[list[list[bytes]], list[int]]:
    """The first documents of a stream, for evaluation.

    Args:
        shards: the stream.
        counts: how many documents each group has.

    Returns:
        The groups, and the number of documents that were taken from the beginning of each shard.

    Raises:
        ValueError: the stream has no more documents than that.
    """
    documents: list[bytes] = []
    taken = [0] * shards.shards
    for shard in range(shards.shards):
        found = list(islice(shards.documents(shard, 0, 1), sum(counts) - len(documents)))
        documents += found
        taken[shard] = len(found)
    if len(documents) < sum(counts):
        raise ValueError(
            f"{shards.name} has {len(documents)} documents and {sum(counts)} are to be held out: lower data.held_out, "
            "give val_path and test_path, or leave streaming off"
        )
    rest = iter(documents)
    return [list(islice(rest, count)) for count in counts], taken


class Packer:
    """Blocks of tokens from a stream, without end: every document once per round, in windows of shuffled documents.

    With as many shards as processes, or more, each process reads shards of its own, in a new order each round; with
    fewer each takes every so-manieth document of all shards. Documents are tokenized, joined and cut into blocks; no
    token is lost.

    Args:
        shards: the documents.
        taken: documents at the beginning of each shard that are not served.
        tokenizer: what makes their tokens.
        length: tokens of a block.
        window: documents that are shuffled together, held in memory.
        seed: of the order.
    """

    def __init__(
        self, shards: Shards, taken: list[int], tokenizer: Tokenizer, length: int, window: int, seed: int
    ) -> None:
        self.shards, self.taken, self.tokenizer = shards, taken, tokenizer
        self.length, self.window, self.seed = length, window, seed

    def blocks(self, cursor: Cursor, ranks: tuple[int, int] = (0, 1)) -> Iterator[tuple[Ids, Cursor]]:
        """Blocks (length,) of a process from a place on, each with the place behind it.

        Args:
            cursor: the place.
            ranks: (rank, number of processes).

        Raises:
            ValueError: there is no document for this process.
        """
        while True:
            found = cursor["shard"] + cursor["document"] > 0  # the round may have been over
            documents = self._documents(cursor, ranks)
            while window := list(islice(documents, self.window)):
                found = True
                rest: list[int] = []
                for number, block in enumerate(self._pack([text for _, _, text in window], cursor, ranks[0])):
                    if len(block) < self.length:
                        rest = block.tolist()
                    elif number >= cursor["block"]:
                        yield block, {**cursor, "block": number + 1}
                shard, document, _ = window[-1]
                cursor = {**cursor, "shard": shard, "document": document + 1, "block": 0, "rest": rest}
            if not found:
                raise ValueError(f"{self.shards.name} has no documents for process {ranks[0]} of {ranks[1]}")
            cursor = {**cursor, "round": cursor["round"] + 1, "shard": 0, "document": 0}

    def _documents(self, cursor: Cursor, ranks: tuple[int, int]) -> Iterator[tuple[int, int, bytes]]:
        """The rest of a round for one process: (place of the shard in its order, number in the shard, document)."""
        rank, world = ranks
        order = permutation(self.shards.shards, self.seed, cursor["round"], _SHARDS).tolist()
        first, step = (0, 1) if len(order) >= world else (rank, world)
        order = order[rank::world] if step == 1 else order
        begin = cursor["document"]
        for place in range(cursor["shard"], len(order)):
            skip = self.taken[order[place]] + first + begin * step
            for number, text in enumerate(self.shards.documents(order[place], skip, step), start=begin):
                yield place, number, text
            begin = 0

    def _pack(self, window: list[bytes], cursor: Cursor, rank: int) -> Iterator[Ids]:
        """Blocks of a window, and what is left, which is shorter."""
        counters = (cursor["round"], cursor["shard"], cursor["document"], rank)
        order = permutation(len(window), self.seed, *counters, _DOCUMENTS).tolist()
        tokens = np.array(cursor["rest"], dtype=storage(self.tokenizer.vocabulary))
        for begin in range(0, len(order), _TOGETHER):
            texts = [window[place] for place in order[begin : begin + _TOGETHER]]
            fresh = encode(Chunk(self.shards.name, texts, cursor["document"] + 1, "document", 0), self.tokenizer)
            tokens = np.concatenate([tokens, fresh])
            whole = len(tokens) // self.length * self.length
            yield from tokens[:whole].reshape(-1, self.length)
            tokens = tokens[whole:]
        yield tokens


class StreamLoader:
    """Batches of a stream; an "epoch" is a fixed number of them, and the next one goes on where it ended.

    Args:
        packer: the stream.
        examples: blocks of an epoch, over all processes.
        batch_size: examples per batch and process.
        ranks: (rank, number of processes); None asks torch.distributed when iteration starts.
        finished: number of batches of this epoch whose training step is finished; see ``loaders.TrainLoader``.
    """

    def __init__(
        self,
        packer: Packer,
        examples: int,
        batch_size: int,
        ranks: tuple[int, int] | None = None,
        finished: Callable[[], int] | None = None,
    ) -> None:
        self.packer = packer
        self.examples = examples
        self.batch_size = batch_size
        self.ranks = ranks
        self.finished = finished
        self._epoch = 0
        self._done = {"epoch": 0, "batches": 0}
        self._exchanges: list[dict[str, Any]] = []
        self._resume: dict[str, Any] | None = None
        self._cursor = start()
        self._blocks: Iterator[tuple[Ids, Cursor]] | None = None

    @property
    def sampler(self) -> StreamLoader:
        """Itself: Lightning looks for ``set_epoch`` here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the number of the iterations that start from now on."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """How far this loader is: ``{"epoch", "batches", "exchange"}``, plain values.

        ``exchange`` is the last one that is not behind: its number of batches and the cursors of all processes.
        """
        if self._resume is not None:
            return dict(self._resume)
        batches = self._done["batches"]
        if self.finished is not None and self.finished() == batches - 1:  # far behind it has been reset: a new epoch
            batches -= 1
        known = [e for e in self._exchanges if e["epoch"] == self._done["epoch"] and e["batches"] <= batches]
        return {**self._done, "batches": batches, "exchange": dict(known[-1]) if known else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on behind the batches that the state counts, in its epoch or a later one."""
        self._resume = dict(state)

    def __len__(self) -> int:
        _, world = self.ranks or process_rank()
        if self.examples < self.batch_size * world:
            raise ValueError(
                f"an epoch of {self.examples} examples of a stream is less than one batch of {self.batch_size} on each "
                f"of {world} process(es): raise stream_examples"
            )
        return self.examples // (self.batch_size * world)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, as TrainLoader's: Lightning makes iterators that it never uses.
        ranks = self.ranks or process_rank()
        epoch = self._epoch
        first = self._begin(ranks, epoch)
        for number in range(first, len(self)):
            if number == first or number % _EXCHANGE == 0:
                exchange = {"epoch": epoch, "batches": number, "cursors": _exchange(self._cursor, ranks[1])}
                self._exchanges = [*self._exchanges[-1:], exchange]
            x = self._next()
            index = (number * ranks[1] + ranks[0]) * self.batch_size + torch.arange(self.batch_size)
            self._done = {"epoch": epoch, "batches": number + 1}
            yield {"x": torch.from_numpy(x.astype(np.int64)), "index": index}

    def _begin(self, ranks: tuple[int, int], epoch: int) -> int:
        """Go to where this iteration begins; the number of its first batch."""
        resume, self._resume = self._resume, None
        exchange = resume["exchange"] if resume else None
        if self._blocks is None or exchange:
            self._cursor = start()
            if exchange:
                if len(exchange["cursors"]) != ranks[1]:
                    raise ValueError(
                        f"a stream goes on with as many processes as it was saved with: {len(exchange['cursors'])}, "
                        f"not {ranks[1]}"
                    )
                self._cursor = exchange["cursors"][ranks[0]]
            self._blocks = self.packer.blocks(self._cursor, ranks)
        if resume and exchange:
            for _ in range(resume["batches"] - exchange["batches"]):
                self._next()
        return resume["batches"] if resume and resume["epoch"] == epoch else 0

    def _next(self) -> Ids:
        """The next batch (B, length), and on with the cursor."""
        assert self._blocks is not None
        found = list(islice(self._blocks, self.batch_size))
        self._cursor = found[-1][1]
        return np.stack([block for block, _ in found])


def _exchange(cursor: Cursor, world: int) -> list[Any]:
    """The cursors of all processes, in order."""
    cursors: list[Any] = [cursor] * world
    if world > 1 and torch.distributed.is_initialized():
        torch.distributed.all_gather_object(cursors, cursor)
    return cursors
