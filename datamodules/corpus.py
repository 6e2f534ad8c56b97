"""Reading text: files, folders, the standard library's own; cutting a row of tokens into three splits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from datamodules.tokenizers import Ids

_BINARY = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy", ".npz", ".pt", ".ckpt"}
_BINARY |= {".safetensors", ".zip", ".gz", ".zst", ".xz", ".bz2", ".tar", ".pdf"}
_ROWS = 1000  # documents of a parquet file that are read at once
_PIECES, _PIECE = 20, 20_000  # a row of tokens is cut in at most so many pieces, of at least so many tokens

Documents = Iterator[tuple[str, list[bytes]]]


def read(path: str | None, column: str, end_rows: bool) -> Documents:
    """Documents of a text file, a parquet file, a folder of both, or (None) of the default corpus.

    The default corpus are Python's own help topics (`pydoc_data.topics`, about 0.5 MB of English on the language) in
    sorted order. It ships with Python, so it needs no download, and differs a little between Python versions.

    Args:
        path: a folder is searched recursively for .txt and .parquet files, in sorted order.
        column: of parquet files; one row is one document.
        end_rows: end every row of a parquet file by a line feed if it has none.

    Yields:
        (name for messages, list of documents as bytes).

    Raises:
        FileNotFoundError: no such path, or nothing to read in a folder.
        ValueError: a file is empty or no text, or a parquet file lacks the column.
    """
    if path is None:
        from pydoc_data.topics import topics

        yield "the default corpus", [topics[key].encode() for key in sorted(topics)]
        return
    for file in _files(Path(path)):
        if file.suffix == ".parquet":
            yield from _read_parquet(file, column, end_rows)
        else:
            yield str(file), [_read_text(file)]


def require_path(path: str | None) -> None:
    """Raise FileNotFoundError for a path that is given and does not exist."""
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"no such file or folder: {path}")


def map_tokens(path: str, vocabulary: int) -> Ids:
    """Memory-map a .bin file: raw little-endian uint16 token ids, nothing else.

    Args:
        path: the file.
        vocabulary: ids must be below; the first 16 million are checked, which finds a wrong tokenizer.

    Raises:
        ValueError: the file is empty or not uint16, or holds a token outside the vocabulary.
    """
    size = Path(path).stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes: a .bin file must hold uint16 tokens, two bytes each")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    largest = int(tokens[: 1 << 24].max())
    if largest >= vocabulary:
        raise ValueError(f"{path} holds the token {largest}, outside the vocabulary of {vocabulary}: set the tokenizer")
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


def _files(path: Path) -> list[Path]:
    require_path(str(path))
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".parquet"} and file.is_file())
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise FileNotFoundError(f"no .txt or .parquet files with content in the folder {path}")
    return files


def _read_text(file: Path) -> bytes:
    refusal = f"{file} is not a text file: give .txt, .parquet, a .bin of uint16 tokens, or a folder of text"
    if file.suffix.lower() in _BINARY:
        raise ValueError(refusal)
    content = file.read_bytes()
    if not content:
        raise ValueError(f"{file} is empty")
    if b"\0" in content:
        raise ValueError(refusal)
    return content


def _read_parquet(file: Path, column: str, end_rows: bool) -> Documents:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"cannot read {file} as parquet: {error}") from error
    if column not in table.schema_arrow.names:
        raise ValueError(f"{file} has no column {column!r}: set column to one of {', '.join(table.schema_arrow.names)}")
    kind = table.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"the column {column!r} of {file} holds {kind}, not text")
    for rows in table.iter_batches(_ROWS, columns=[column]):
        documents = [text.encode() for text in rows.column(0).drop_null().to_pylist()]
        if end_rows:
            documents = [text if text.endswith(b"\n") else text + b"\n" for text in documents]
        yield str(file), documents
