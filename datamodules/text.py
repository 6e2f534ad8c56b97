"""Text as blocks of token ids: any text files, a default corpus that ships with Python, three tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from datamodules.base import SPLITS, DataModule, Split, require_fractions, require_positive
from datamodules.corpus import cut, map_tokens, read, require_path
from datamodules.loaders import Batch, hashed
from datamodules.tokenizers import (
    GPT2_VOCABULARY,
    ByteTokenizer,
    CharacterTokenizer,
    GPT2Tokenizer,
    Ids,
    Tokenizer,
    storage,
)

_WINDOWS = 3  # purpose of a hash, see loaders.py


class TextDataModule(DataModule):
    """Blocks of ``length`` consecutive tokens: a batch has ``x`` (B, length) int64 and ``index`` (B,) int64.

    Files are joined to one row of tokens and cut into splits (see ``corpus.cut``). Validation and test are consecutive
    blocks without overlap, the remainder dropped, so a likelihood per token is well defined. Training takes either such
    blocks or, by default, windows at random offsets: an epoch has as many as there are blocks, the offset is a function
    of (seed, epoch, index), so every epoch shows new windows and ``index`` numbers windows, not places.

    ``spec``: kind "text", length, vocabulary (real tokens V; the mask of a masked model is V), tokenizer ("bytes",
    "gpt2" or {"characters": the set}), bytes_per_token (text bytes per token of the validation blocks, to turn nats per
    token into bits per byte; for gpt2 None before ``setup``, and None for .bin files without ``tokenizer_path``).

    Args:
        path: a UTF-8 text file, a .parquet file, a folder of .txt and .parquet files (recursive, in sorted order), or a
            .bin file of raw uint16 token ids, which stays on disk. None: the help topics of Python's standard library,
            about 0.5 MB of English (differs a little between Python versions).
        val_path: validation text of the same forms; None cuts ``val_fraction`` off the text of ``path``.
        test_path: test text of the same forms; None cuts ``test_fraction`` off the text of ``path``.
        length: tokens per example.
        batch_size: examples per batch and process.
        tokenizer: "bytes" (256 tokens, lossless on any file), "characters" (those that occur in ``path``) or "gpt2"
            (50257 tokens; each file or parquet row is followed by the end-of-text token; needs the library
            `tokenizers`).
        windows: how training examples are cut: "random" offsets or fixed "blocks".
        tokenizer_path: for "gpt2": folder with vocab.json and merges.txt (or encoder.json and vocab.bpe); None fetches
            them from the Hugging Face hub.
        column: text column of parquet files. Bytes and characters: every row ends with a line feed, added if missing.
        val_fraction: part of the tokens of ``path`` for validation.
        test_fraction: part of the tokens of ``path`` for testing.
        seed: of the order and the offsets.

    Raises:
        ValueError: an argument out of range; at ``setup``: a file that is no text, a split shorter than one block, a
            character outside the set. With "characters" all files are read at construction.
        FileNotFoundError: a path that does not exist; a folder without text.
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
    ) -> None:
        super().__init__(batch_size, seed)
        require_positive(length=length)
        require_fractions(val_fraction, test_fraction)
        if tokenizer not in ("bytes", "characters", "gpt2"):
            raise ValueError(f"there is no tokenizer {tokenizer!r}: choose bytes, characters or gpt2")
        if windows not in ("random", "blocks"):
            raise ValueError(f"windows must be random or blocks, got {windows!r}")
        if tokenizer_path is not None and tokenizer != "gpt2":
            raise ValueError(f"tokenizer_path is for tokenizer: gpt2 and the tokenizer is {tokenizer}")
        for place in (path, val_path, test_path, tokenizer_path):
            require_path(place)
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.length, self.windows, self.column = length, windows, column
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.tokenizer, self.tokenizer_path = tokenizer, tokenizer_path
        self._windows: dict[str, Ids] = {}
        self._tokenizer: Tokenizer | None = None
        self.spec = {"kind": "text", "length": length, "vocabulary": GPT2_VOCABULARY, "tokenizer": tokenizer}
        self.spec["bytes_per_token"] = 1.0 if tokenizer == "bytes" else None
        if tokenizer == "characters":  # the vocabulary is in the text
            self.setup()
        elif tokenizer == "bytes":
            self._adopt(ByteTokenizer())
        elif tokenizer_path is not None:
            self._adopt(GPT2Tokenizer(tokenizer_path))

    def prepare_data(self) -> None:
        """Fetch the GPT-2 vocabulary into the hub's cache if it will be needed; everything else is on disk."""
        if self.tokenizer == "gpt2" and self._tokenizer is None and self._reads_text():
            self._adopt(GPT2Tokenizer(None))

    def load(self) -> None:
        """Read and tokenize all files; print how many tokens and blocks the splits have.

        Raises:
            ValueError, FileNotFoundError: see the class.
        """
        self.prepare_data()
        row = self._observe() if self.tokenizer == "characters" else self._read(self.path)
        val_fraction = 0.0 if self.val_path else self.val_fraction
        test_fraction = 0.0 if self.test_path else self.test_fraction
        train, val, test = cut(row, val_fraction, test_fraction)
        if self.val_path:
            val = self._read(self.val_path)
        if self.test_path:
            test = self._read(self.test_path)
        report = []
        for split, tokens in zip(SPLITS, (train, val, test), strict=True):
            self._windows[split] = self._cut_windows(split, tokens)
            blocks = self.count(split)
            report.append(f"{split} {len(tokens)} ({blocks} blocks, {len(tokens) - blocks * self.length} dropped)")
        if self._tokenizer is not None:
            self.spec = {**self.spec, "bytes_per_token": self._bytes_per_token(self._tokenizer)}
        rank_zero_info(f"text: tokens in blocks of {self.length}: {', '.join(report)}")

    def count(self, split: Split) -> int:
        """Number of whole blocks in a split; also the number of random windows of a training epoch."""
        return (len(self._windows[split]) + self.length - 1) // self.length

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Blocks ``index`` of a split, or this epoch's random windows of the training split: x (B, length) int64."""
        windows = self._windows[split]
        if split == "train" and self.windows == "random" and epoch is not None:
            starts = (hashed(index, self.seed, epoch, _WINDOWS) % np.uint64(len(windows))).astype(np.int64)
        else:
            starts = index.numpy() * self.length
        return {"x": torch.from_numpy(windows[starts].astype(np.int64))}

    def decode(self, tokens: Tensor) -> list[str]:
        """Text of each row of real tokens.

        Args:
            tokens: (B, L) integer ids below ``spec["vocabulary"]``.
        """
        self.prepare_data()
        if self._tokenizer is None:
            self._adopt(GPT2Tokenizer(None))
        assert self._tokenizer is not None
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.spec["vocabulary"]):
            raise ValueError(f"only tokens 0 to {self.spec['vocabulary'] - 1} stand for text, got {int(tokens.max())}")
        kind = storage(self.spec["vocabulary"])
        rows = tokens.cpu().numpy().astype(kind)
        return [self._tokenizer.raw(row).decode("utf-8", errors="replace") for row in rows]

    def _adopt(self, tokenizer: Tokenizer) -> None:
        storage(tokenizer.vocabulary)
        self._tokenizer = tokenizer
        self.spec["vocabulary"] = tokenizer.vocabulary

    def _reads_text(self) -> bool:
        paths = (self.path, self.val_path or self.path, self.test_path or self.path)
        return not all(_holds_tokens(path) for path in paths)

    def _observe(self) -> Ids:
        """Read ``path``, take its characters as the vocabulary, and return all its tokens."""
        for path in (self.path, self.val_path, self.test_path):
            if _holds_tokens(path):
                raise ValueError(f"tokenizer: characters needs text and {path} holds tokens: set the tokenizer")
        groups = list(read(self.path, self.column, end_rows=True))
        characters = ""
        for name, documents in groups:
            with _named(name):
                characters += CharacterTokenizer.observed(documents).characters
        if not characters:
            raise ValueError(f"{self.path} is empty")
        tokenizer = CharacterTokenizer(characters)
        self._adopt(tokenizer)
        self.spec["tokenizer"] = {"characters": tokenizer.characters}
        return np.concatenate([tokenizer.encode(documents) for _, documents in groups])

    def _read(self, path: str | None) -> Ids:
        """All tokens of a path in one row."""
        if path is not None and _holds_tokens(path):
            return map_tokens(path, self.spec["vocabulary"])
        assert self._tokenizer is not None
        rows = []
        for name, documents in read(path, self.column, not self._tokenizer.ends_documents):
            with _named(name):
                rows.append(self._tokenizer.encode(documents))
        if not any(len(row) for row in rows):
            raise ValueError(f"{path} is empty")
        return np.concatenate(rows)

    def _cut_windows(self, split: Split, tokens: Ids) -> Ids:
        """View (N - length + 1, length) of a row of N tokens: window i starts at token i."""
        if len(tokens) < self.length:
            place = {"val": self.val_path, "test": self.test_path}.get(split) or self.path or "the default corpus"
            raise ValueError(
                f"the {split} split of {place} has {len(tokens)} tokens, fewer than one block of length {self.length}: "
                f"give a longer text or a smaller length"
            )
        return sliding_window_view(tokens, self.length)

    def _bytes_per_token(self, tokenizer: Tokenizer) -> float:
        """Text bytes per token over the validation blocks, at most 16 million tokens of them."""
        blocks = self._windows["val"][: 1 << 24 : self.length]
        counts = np.bincount(blocks.reshape(-1), minlength=tokenizer.vocabulary)
        return float((counts * tokenizer.token_bytes()).sum() / counts.sum())


def _holds_tokens(path: str | None) -> bool:
    return path is not None and Path(path).suffix == ".bin"


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Put the name of the file into what a tokenizer has to say about its content."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: use tokenizer: bytes") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
