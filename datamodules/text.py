"""Text as blocks of token ids: any text files, sets of the Hugging Face hub, a default corpus without download."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base import SPLITS, DataModule, Split, require_fractions, require_positive
from datamodules.corpus import bytes_per_token, cut, cut_windows, encode, map_tokens, observed, tokenize
from datamodules.hub import HubRows, HubShards
from datamodules.loaders import Batch, EvalLoader, TrainLoader, hashed, process_rank
from datamodules.streaming import Packer, StreamLoader, hold_out, start
from datamodules.text_sources import Chunk, Files, Source, StandardLibrary, require_path
from datamodules.tokenizers import (
    GPT2_VOCABULARY,
    ByteTokenizer,
    CharacterTokenizer,
    GPT2Tokenizer,
    Ids,
    Tokenizer,
    storage,
)
from datamodules.zero_shot import corpus_source, named_corpora

_WINDOWS = 3  # purpose of a hash, see loaders.py


class TextDataModule(DataModule):
    """Blocks of ``length`` consecutive tokens: a batch has ``x`` (B, length) int64 and ``index`` (B,) int64.

    Documents are joined to one row of tokens and cut into splits (see ``corpus.cut``). Validation and test are
    consecutive blocks without overlap, the remainder dropped, so a likelihood per token is well defined. Training takes
    either such blocks or, by default, windows at random offsets: an epoch has as many as there are blocks, the offset
    is a function of (seed, epoch, index), so every epoch shows new windows and ``index`` numbers windows, not places.

    ``spec``: kind "text", length, vocabulary (real tokens V; the mask of a masked model is V), tokenizer ("bytes",
    "gpt2", {"gpt2": folder of its vocabulary} or {"characters": the set}), bytes_per_token (text bytes per token of the
    validation blocks, to turn nats per token into bits per byte; for gpt2 None before ``setup``, and None for .bin
    files without ``tokenizer_path``).

    Args:
        path: a .txt file (one document), a .parquet file (a row is a document), a .jsonl file (a line is a document: a
            JSON string, or an object with the text under ``column``), a folder of these (recursive, in sorted order),
            or a .bin file of raw uint16 token ids, which stays on disk. None: the help topics of Python's standard
            library, about 0.5 MB of English (differs a little between Python versions).
        val_path: validation text of the same forms; None cuts ``val_fraction`` off the training text.
        test_path: test text of the same forms; None cuts ``test_fraction`` off the training text.
        length: tokens per example.
        batch_size: examples per batch and process.
        tokenizer: "bytes" (256 tokens, lossless on any file), "characters" (those that occur in the training text) or
            "gpt2" (50257 tokens; each document is followed by the end-of-text token; needs the library `tokenizers`).
        windows: how training examples are cut: "random" offsets or fixed "blocks".
        tokenizer_path: for "gpt2": folder with vocab.json and merges.txt (or encoder.json and vocab.bpe); None fetches
            them from the Hugging Face hub.
        column: that holds the text in .parquet, .jsonl and data sets. Bytes and characters: every row ends with a line
            feed, added if missing.
        val_fraction: part of the tokens of the training text for validation.
        test_fraction: part of the tokens of the training text for testing.
        seed: of the order and the offsets.
        cache: folder for tokens: text is tokenized once, in chunks, and mapped from disk from then on, so it may be
            larger than memory. Validation and test are then cut off the end. Machines may share it if the text lies at
            the same place for all; else give each its own. None keeps all tokens in memory.
        corpora: further texts that ``test`` measures one by one: files or folders as ``path``, NAME=PATH, or lambada,
            wikitext2, ptb, wikitext103, lm1b: the sets of zero-shot perplexity, from the hub (or, as wikitext2=PATH,
            from own files) with the paper's splits and detokenizers.
        dataset: in place of ``path``: name of a set on the Hugging Face hub, or NAME@REVISION, or a folder that the
            `datasets` library knows how to read. It is kept in the library's cache.
        dataset_config: of the set, where it has several.
        dataset_split: of the set, for training.
        val_split: of the set, for validation; None cuts ``val_fraction`` off. It is not streamed: the library may keep
            all of the set for it.
        test_split: of the set, for testing; None cuts ``test_fraction`` off.
        streaming: train on ``dataset`` while it is being read, always in blocks, without keeping it; see ``Packer``.
        stream_examples: blocks of an epoch of a stream, over all processes; the next epoch goes on where it ended.
        stream_window: documents of a stream that are shuffled together, in memory.
        held_out: documents at the beginning of a stream that are kept for validation, and as many for testing, in
            place of the fractions.

    Raises:
        ValueError: an argument out of range; at ``setup``: a file that is no text, a split shorter than one block, a
            character outside the set. With "characters" all files are read at construction.
        FileNotFoundError: a path that does not exist; a folder without text; a hub out of reach.
    """

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        length: int = 128,
        batch_size: int = 32,
        tokenizer: Literal["bytes", "characters", "gpt2"] = "bytes",
        windows: Literal["random", "blocks"] = "random",
        tokenizer_path: str | None = None,
        column: str = "text",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        cache: str | None = None,
        corpora: list[str] | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        streaming: bool = False,
        stream_examples: int = 100_000,
        stream_window: int = 10_000,
        held_out: int = 1000,
    ) -> None:
        super().__init__(batch_size, seed)
        require_positive(length=length, stream_window=stream_window, held_out=held_out)
        require_fractions(val_fraction, test_fraction)
        if tokenizer not in ("bytes", "characters", "gpt2"):
            raise ValueError(f"there is no tokenizer {tokenizer!r}: choose bytes, characters or gpt2")
        if windows not in ("random", "blocks"):
            raise ValueError(f"windows must be random or blocks, got {windows!r}")
        if tokenizer_path is not None and tokenizer != "gpt2":
            raise ValueError(f"tokenizer_path is for tokenizer: gpt2 and the tokenizer is {tokenizer}")
        for place in (path, val_path, test_path, tokenizer_path):
            require_path(place)
        _require_one(path=path, dataset=dataset)
        _require_one(val_path=val_path, val_split=val_split)
        _require_one(test_path=test_path, test_split=test_split)
        if dataset is None and (dataset_config or val_split or test_split or dataset_split != "train"):
            raise ValueError("dataset_config and the splits belong to a data set: give its name as dataset")
        if streaming and (dataset is None or tokenizer == "characters"):
            raise ValueError("streaming needs a dataset and a tokenizer with a fixed vocabulary: bytes or gpt2")
        self.path = path
        self.paths: dict[Split, str | None] = {"val": val_path, "test": test_path}
        self.dataset, self.dataset_config, self.dataset_split = dataset, dataset_config, dataset_split
        self.splits: dict[Split, str | None] = {"val": val_split, "test": test_split}
        self.streaming, self.stream_examples = streaming, stream_examples
        self.stream_window, self.held_out = stream_window, held_out
        self.length, self.windows, self.column, self.cache = length, windows, column, cache
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.tokenizer, self.tokenizer_path = tokenizer, tokenizer_path
        self._corpora = named_corpora(corpora or [])
        self._windows: dict[Split, Ids] = {}
        self._corpus_windows: dict[str, Ids] = {}
        self._tokenizer: Tokenizer | None = None
        self._packer: Packer | None = None
        self.spec = {"kind": "text", "length": length, "vocabulary": GPT2_VOCABULARY, "tokenizer": tokenizer}
        self.spec["bytes_per_token"] = 1.0 if tokenizer == "bytes" else None
        if tokenizer == "characters":  # the vocabulary is in the text
            self.setup()
        elif tokenizer == "bytes":
            self._adopt(ByteTokenizer())
        elif tokenizer_path is not None:
            self.spec["tokenizer"] = {"gpt2": str(Path(tokenizer_path).absolute())}
            self._adopt(GPT2Tokenizer(tokenizer_path))

    @property
    def test_sets(self) -> tuple[str, ...]:
        """Names of the loaders of ``test_dataloader``: "" for the test split, then those of ``corpora``."""
        return ("", *self._corpora)

    def prepare_data(self) -> None:
        """Fetch the GPT-2 vocabulary if it will be needed, and fill the cache, if there is one."""
        if self.tokenizer == "gpt2" and self._reads_text():
            self._text_tokenizer()
        if self.cache is not None and not self.streaming:
            self._rows()

    def load(self) -> None:
        """Read and tokenize all splits; print how many tokens and blocks they have.

        Raises:
            ValueError, FileNotFoundError: see the class.
        """
        if self.tokenizer == "characters":
            self._observe()
        report = []
        for split, tokens in self._rows().items():
            place = self.paths.get(split) or self.splits.get(split) or self.path or self.dataset or "the default corpus"
            self._windows[split] = cut_windows(tokens, self.length, f"the {split} split of {place}")
            blocks = self._blocks(self._windows[split])
            report.append(f"{split} {len(tokens)} ({blocks} blocks, {len(tokens) - blocks * self.length} dropped)")
        if self._tokenizer is not None:
            self.spec = {**self.spec, "bytes_per_token": bytes_per_token(self._windows["val"], self._tokenizer)}
        rank_zero_info(f"text: tokens in blocks of {self.length}: {', '.join(report)}")

    def count(self, split: Split) -> int:
        """Number of whole blocks in a split; also the number of random windows, or of a stream, in an epoch."""
        if split == "train" and self.streaming:
            return self.stream_examples
        return self._blocks(self._windows[split])

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Blocks ``index`` of a split, or this epoch's random windows of the training split: x (B, length) int64."""
        if split == "train" and self.streaming:
            raise ValueError("the training examples of a stream have no numbers: leave streaming off")
        windows = self._windows[split]
        if split == "train" and self.windows == "random" and epoch is not None:
            starts = (hashed(index, self.seed, epoch, _WINDOWS) % np.uint64(len(windows))).astype(np.int64)
        else:
            starts = index.numpy() * self.length
        return {"x": torch.from_numpy(windows[starts].astype(np.int64))}

    def train_dataloader(self) -> TrainLoader | StreamLoader:
        """Training batches in a new order each epoch, or from the stream."""
        if self._packer is None:
            return super().train_dataloader()
        if getattr(self.trainer, "overfit_batches", 0):
            raise ValueError("overfit_batches needs training examples that stay: leave streaming off")
        finished = self._finished_steps if self.trainer else None
        return StreamLoader(self._packer, self.stream_examples, self.batch_size, finished=finished)

    def examples(self, split: str, count: int) -> Batch:
        """As in every data module; of a stream the first training blocks."""
        if split != "train" or not self.streaming:
            return super().examples(split, count)
        require_positive(count=count)
        self.setup()
        assert self._packer is not None
        blocks = [block.astype(np.int64) for block, _ in islice(self._packer.blocks(start()), count)]
        return {"x": torch.from_numpy(np.stack(blocks)), "index": torch.arange(count)}

    def test_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """All blocks of the test split once; with ``corpora`` a loader each, in the order of ``test_sets``."""
        split = self.eval_loader("test")
        return [split, *(self._corpus_loader(name) for name in self._corpora)] if self._corpora else split

    def bytes_per_token_of(self, name: str) -> float | None:
        """Text bytes per token in the blocks of a test set; None for token ids without a tokenizer.

        Args:
            name: of ``test_sets``; "" gives the value of the spec, of the validation blocks.
        """
        if not name:
            return self.spec["bytes_per_token"]
        return None if self._tokenizer is None else bytes_per_token(self._corpus(name), self._tokenizer)

    def decode(self, tokens: Tensor) -> list[str]:
        """Text of each row of real tokens.

        Args:
            tokens: (B, L) integer ids below ``spec["vocabulary"]``.
        """
        tokenizer = self._text_tokenizer()
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.spec["vocabulary"]):
            raise ValueError(f"only tokens 0 to {self.spec['vocabulary'] - 1} stand for text, got {int(tokens.max())}")
        kind = storage(self.spec["vocabulary"])
        rows = tokens.cpu().numpy().astype(kind)
        return [tokenizer.raw(row).decode("utf-8", errors="replace") for row in rows]

    def _adopt(self, tokenizer: Tokenizer) -> None:
        storage(tokenizer.vocabulary)
        self._tokenizer = tokenizer
        self.spec["vocabulary"] = tokenizer.vocabulary

    def _text_tokenizer(self) -> Tokenizer:
        """The tokenizer, by now; GPT-2's released one is fetched when text is first met."""
        if self._tokenizer is None:
            self._adopt(GPT2Tokenizer(None))
        assert self._tokenizer is not None
        return self._tokenizer

    def _reads_text(self) -> bool:
        # Corpora are read when they are tested, and fetch the vocabulary then: a fit has no use for them.
        paths = (self.path, self.paths["val"] or self.path, self.paths["test"] or self.path)
        return not all(_holds_tokens(path) for path in paths)

    def _observe(self) -> None:
        """Take the characters of the training text as the vocabulary."""
        for path in (self.path, *self.paths.values(), *self._corpora.values()):
            if _holds_tokens(path):
                raise ValueError(f"tokenizer: characters needs text and {path} holds tokens: set the tokenizer")
        source = self._source(self.path, self.dataset_split)
        tokenizer = CharacterTokenizer(observed(source))
        if not tokenizer.characters:
            raise ValueError(f"{source.name} is empty")
        self._adopt(tokenizer)
        self.spec["tokenizer"] = {"characters": tokenizer.characters}

    def _source(self, path: str | None, split: str) -> Source:
        if path is not None:
            return Files(path, self.column)
        if self.dataset is not None:
            return HubRows(self.dataset, self.dataset_config, split, self.column)
        return StandardLibrary()

    def _rows(self) -> dict[Split, Ids]:
        """All tokens of each split in one row."""
        own: list[Split] = [split for split in SPLITS[1:] if self.paths[split] or self.splits[split]]
        rows = self._held_out(own) if self.streaming else self._cut(own)
        for split in own:
            rows[split] = self._tokens(self.paths[split], self.splits[split] or "")
        return rows

    def _cut(self, own: list[Split]) -> dict[Split, Ids]:
        """The training text, cut into itself and the splits that have no text of their own."""
        row = self._tokens(self.path, self.dataset_split)
        parts = cut(row, 0.0 if "val" in own else self.val_fraction, 0.0 if "test" in own else self.test_fraction)
        return dict(zip(SPLITS, parts, strict=True))

    def _held_out(self, own: list[Split]) -> dict[Split, Ids]:
        """Open the stream; its first documents are the splits that have no text of their own."""
        assert self.dataset is not None
        tokenizer = self._text_tokenizer()
        shards = HubShards(self.dataset, self.dataset_config, self.dataset_split, self.column)
        splits = [split for split in SPLITS[1:] if split not in own]
        groups, taken = hold_out(shards, [self.held_out] * len(splits))
        self._packer = Packer(shards, taken, tokenizer, self.length, self.stream_window, self.seed)
        chunks = [Chunk(shards.name, documents, 1, "document", 0) for documents in groups]
        return {split: encode(chunk, tokenizer) for split, chunk in zip(splits, chunks, strict=True)}

    def _tokens(self, path: str | None, split: str) -> Ids:
        if path is not None and _holds_tokens(path):
            return self._map(path)
        return self._tokenize(self._source(path, split))

    def _map(self, path: str) -> Ids:
        return map_tokens(path, self.spec["vocabulary"], check=process_rank()[0] == 0)

    def _tokenize(self, source: Source) -> Ids:
        return tokenize(source, self._text_tokenizer(), self.spec["tokenizer"], self.cache)

    def _corpus(self, name: str) -> Ids:
        """Windows of an entry of ``corpora``, read when first asked for."""
        if name not in self._corpus_windows:
            path = self._corpora[name]
            if path is not None and _holds_tokens(path):
                tokens = self._map(path)
            else:
                tokens = self._tokenize(corpus_source(name, path, self.column))
            self._corpus_windows[name] = cut_windows(tokens, self.length, name)
        return self._corpus_windows[name]

    def _corpus_loader(self, name: str) -> EvalLoader:
        windows = self._corpus(name)

        def fetch(index: Tensor, epoch: int | None) -> Batch:
            return {"x": torch.from_numpy(windows[index.numpy() * self.length].astype(np.int64))}

        return EvalLoader(fetch, self._blocks(windows), self.batch_size)

    def _blocks(self, windows: Ids) -> int:
        return (len(windows) + self.length - 1) // self.length


def _holds_tokens(path: str | None) -> bool:
    return path is not None and Path(path).suffix == ".bin"


def _require_one(**arguments: Any) -> None:
    """Raise a ValueError if two arguments that exclude each other are given."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give {' or '.join(given)}, not both: set the other to null")
