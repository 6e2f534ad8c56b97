"""Rows of tokens: text made into one row in memory or in a cache on disk, cut into splits, seen as windows."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.lib.stride_tricks import sliding_window_view

from datamodules.text_sources import Chunk, Source, stamp
from datamodules.tokenizers import Ids, Tokenizer, TokenizerName, storage

_PIECES, _PIECE = 20, 20_000  # a row of tokens is cut in at most so many pieces, of at least so many tokens
_SCAN = 1 << 24  # tokens of a file that are looked at together
_FORMAT = 1  # of the cache
_SECONDS = 20  # between two messages on progress


def encode(chunk: Chunk, tokenizer: Tokenizer) -> Ids:
    """Tokens of a chunk. Where the tokenizer has no mark for the end of a document, every row ends by a line feed.

    Raises:
        ValueError: the text cannot be written with this tokenizer; names the file and the place.
    """
    documents = chunk.documents
    if not tokenizer.ends_documents and chunk.unit != "byte":
        documents = [text if text.endswith(b"\n") else text + b"\n" for text in documents]
    try:
        if chunk.open and tokenizer.ends_documents:
            last = tokenizer.encode_text(documents[-1].decode())
            return np.concatenate([tokenizer.encode(documents[:-1]), last])
        return tokenizer.encode(documents)
    except UnicodeDecodeError as error:
        raise ValueError(f"{chunk.name} is not UTF-8 text: use tokenizer: bytes ({_broken(chunk)})") from error
    except ValueError as error:
        raise ValueError(f"{chunk.name}: {error}") from error


def observed(source: Source) -> str:
    """All characters that occur in a text. ValueError where it is not UTF-8."""
    found: set[str] = set()
    for chunk in source.chunks():
        try:
            found = found.union(*(document.decode() for document in chunk.documents))
        except UnicodeDecodeError as error:
            raise ValueError(f"{chunk.name} is not UTF-8 text: use tokenizer: bytes ({_broken(chunk)})") from error
        if chunk.unit != "byte" and chunk.documents:
            found.add("\n")
    return "".join(sorted(found))


def tokenize(source: Source, tokenizer: Tokenizer, name: TokenizerName, cache: str | None) -> Ids:
    """All tokens of a text in one row.

    With a cache the row is written once, in chunks, and mapped into memory from then on: a text may be larger than
    memory. It is written again when the files or the tokenizer have changed. Several processes may do this at once.

    Args:
        source: the text.
        tokenizer: what makes its tokens.
        name: of the tokenizer, as in a spec.
        cache: folder for rows of tokens; None keeps them in memory.

    Raises:
        ValueError: the text is empty, or cannot be written with this tokenizer.
    """
    if cache is None:
        pieces = list(_pieces(source, tokenizer))
        if not any(len(piece) for piece in pieces):
            raise ValueError(f"{source.name} is empty")
        return np.concatenate(pieces)
    kind = np.dtype(storage(tokenizer.vocabulary)).newbyteorder("<")
    facts = {"format": _FORMAT, "source": source.fingerprint(), "tokenizer": _identity(name), "type": kind.str}
    key = hashlib.sha256(json.dumps([source.identity, name]).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "_", source.name).strip("_.")[-60:]
    tokens, record = (Path(cache) / f"{stem}-{key}.{suffix}" for suffix in ("tokens", "json"))
    if _recorded(record, tokens, kind.itemsize) != facts:
        _write(tokens, record, facts, _pieces(source, tokenizer), source.name)
    return np.memmap(tokens, dtype=kind, mode="r")


def map_tokens(path: str, vocabulary: int, check: bool = True) -> Ids:
    """Memory-map a .bin file: raw little-endian uint16 token ids, nothing else.

    Args:
        path: the file.
        vocabulary: ids must be below.
        check: look at all of them.

    Raises:
        ValueError: the file is empty or not uint16, or holds a token outside the vocabulary.
    """
    size = Path(path).stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes: a .bin file must hold uint16 tokens, two bytes each")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    for start in range(0, len(tokens) if check and vocabulary < 1 << 16 else 0, _SCAN):
        piece = tokens[start : start + _SCAN]
        if int(piece.max()) >= vocabulary:
            place = start + int((piece >= vocabulary).argmax())
            raise ValueError(
                f"{path} holds the token {tokens[place]} at position {place}, outside the vocabulary of {vocabulary}: "
                f"set the tokenizer"
            )
    return tokens


def cut(tokens: Ids, val_fraction: float, test_fraction: float) -> tuple[Ids, Ids, Ids]:
    """Cut a row of tokens into train, validation and test rows that share no token.

    Texts change from beginning to end, so the row is first cut into up to 20 pieces of at least 20,000 tokens; the end
    of every piece goes to validation and test, and equal parts are joined. The cut depends on nothing but the number of
    tokens and the fractions. A memory-mapped row is one piece, which keeps its parts on disk.

    Args:
        tokens: (N,) ids.
        val_fraction: part of each piece for validation, 0 for none.
        test_fraction: part of each piece for testing, 0 for none.
    """
    pieces = 1 if isinstance(tokens, np.memmap) else min(_PIECES, max(1, len(tokens) // _PIECE))
    edges = [len(tokens) * piece // pieces for piece in range(pieces + 1)]
    parts: tuple[list[Ids], list[Ids], list[Ids]] = ([], [], [])
    for start, end in pairwise(edges):
        test = end - round((end - start) * test_fraction)
        val = test - round((end - start) * val_fraction)
        for part, piece in zip(parts, (tokens[start:val], tokens[val:test], tokens[test:end]), strict=True):
            part.append(piece)
    train, validation, held_out = (part[0] if len(part) == 1 else np.concatenate(part) for part in parts)
    return train, validation, held_out


def cut_windows(tokens: Ids, length: int, name: str) -> Ids:
    """View (N - length + 1, length) of a row of N tokens: window i starts at token i.

    Raises:
        ValueError: fewer tokens than one window; calls them by ``name``.
    """
    if len(tokens) < length:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, fewer than one block of length {length}: "
            f"give a longer text or a smaller length"
        )
    return sliding_window_view(tokens, length)


def bytes_per_token(windows: Ids, tokenizer: Tokenizer) -> float:
    """Text bytes per token over the blocks of a view of windows, at most 16 million tokens of them."""
    blocks = windows[: 1 << 24 : windows.shape[1]]
    counts = np.bincount(blocks.reshape(-1), minlength=tokenizer.vocabulary)
    return float((counts * tokenizer.token_bytes()).sum() / counts.sum())


def _broken(chunk: Chunk) -> str:
    """Where in its file a chunk is not UTF-8."""
    for number, document in enumerate(chunk.documents):
        try:
            document.decode()
        except UnicodeDecodeError as error:
            return f"wrong at {chunk.unit} {chunk.place + (error.start if chunk.unit == 'byte' else number)}"
    raise AssertionError("the chunk is UTF-8")


def _pieces(source: Source, tokenizer: Tokenizer) -> Iterator[Ids]:
    """Tokens of a text chunk by chunk, with a message on progress now and then."""
    begin = told = time.monotonic()
    size = tokens = 0
    for chunk in source.chunks():
        ids = encode(chunk, tokenizer)
        size, tokens = size + chunk.size, tokens + len(ids)
        if (now := time.monotonic()) - told > _SECONDS and source.size:
            told, done = now, min(size / source.size, 1.0)
            left = (now - begin) * (1 - done) / max(done, 1e-9)
            rank_zero_info(f"{source.name}: {done:.1%} made into {tokens / 1e6:.1f} M tokens, {left / 60:.0f} min left")
        yield ids


def _identity(name: TokenizerName) -> Any:
    """What a cache remembers of a tokenizer: its name and the files of its vocabulary."""
    if isinstance(name, dict) and "gpt2" in name:
        return [name, [stamp(file) for file in sorted(Path(name["gpt2"]).iterdir()) if file.is_file()]]
    return name


def _recorded(record: Path, tokens: Path, width: int) -> dict[str, Any] | None:
    """The facts that were recorded with a row of tokens, None if it is not there or not whole."""
    try:
        facts = json.loads(record.read_text(encoding="utf-8"))
        count = facts.pop("tokens")
        whole = tokens.stat().st_size == count * width
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return facts if whole else None


def _write(tokens: Path, record: Path, facts: dict[str, Any], pieces: Iterator[Ids], name: str) -> None:
    """Write a row of tokens and then its record: without the second the first does not count."""
    tokens.parent.mkdir(parents=True, exist_ok=True)
    count = 0

    record.unlink(missing_ok=True)
    with _replacing(tokens) as stream:
        for ids in pieces:
            stream.write(ids.astype(facts["type"]).tobytes())
            count += len(ids)
        if not count:
            raise ValueError(f"{name} is empty")
    with _replacing(record) as stream:
        stream.write(json.dumps({**facts, "tokens": count}).encode())


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content takes the place of a file at once; what fails on the way leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{time.time_ns()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
