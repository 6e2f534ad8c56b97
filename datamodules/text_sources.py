"""Where text comes from: files, folders, Python's own help; read in chunks, so that memory does not grow with size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

_BINARY = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy", ".npz", ".pt", ".ckpt"}
_BINARY |= {".safetensors", ".zip", ".gz", ".zst", ".xz", ".bz2", ".tar", ".pdf", ".bin"}
_KINDS = (".txt", ".parquet", ".jsonl")
_ROWS, _BYTES = 1000, 1 << 22  # documents and bytes of a file of rows that are read at once
_PIECE = 1 << 20  # bytes of a text file that are read at once
_LONGEST = 8  # so many pieces without a blank are cut anywhere
_BLANK = re.compile(rb"[ \n\t\r]")

Line = Callable[[str], str]


class Chunk(NamedTuple):
    """Consecutive documents.

    Attributes:
        name: of their file, for messages.
        documents: their bytes.
        place: where the first one is: a byte of the file, or a number of a line or document from 1.
        unit: what ``place`` counts: "byte", "line" or "document".
        size: bytes of the source that this chunk took, for progress.
        open: the last document goes on in the next chunk.
    """

    name: str
    documents: list[bytes]
    place: int
    unit: str
    size: int
    open: bool = False


class Source(Protocol):
    """Text that can be read from its beginning as often as needed.

    Attributes:
        name: for messages.
        size: sum of ``size`` over all chunks, about.
        identity: plain values that tell this source from others, whatever its text is by now.
    """

    name: str
    size: int
    identity: list[str]

    def chunks(self) -> Iterator[Chunk]:
        """All documents in order. ValueError where a file is not what it should be."""

    def fingerprint(self) -> list[Any]:
        """Plain values that change when the text does."""


class StandardLibrary:
    """The default corpus: Python's own help topics, about 0.5 MB of English on the language, in sorted order.

    They ship with Python (`pydoc_data.topics`), so they need no download, and differ a little between versions.
    """

    name = "the default corpus"
    identity = [name]

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        self._documents = [topics[key].encode() for key in sorted(topics)]
        self.size = sum(map(len, self._documents))

    def chunks(self) -> Iterator[Chunk]:
        """One chunk, a document per topic."""
        yield Chunk(self.name, self._documents, 0, "byte", self.size)

    def fingerprint(self) -> list[Any]:
        """Number and bytes of the topics."""
        return [len(self._documents), self.size]


class Files:
    """A file or a folder: .txt (a file is a document), .parquet (a row) and .jsonl (a line).

    A line of .jsonl is an object with the text under ``column``, or a JSON string; halves of surrogate pairs in it
    become "?". Null texts and blank lines of .jsonl are left out.

    Args:
        path: a file of any other suffix is text; a folder is searched recursively, in sorted order.
        column: of parquet files and JSON objects.
        line: makes every line of a text file a document of its own, which this function has seen.

    Raises:
        FileNotFoundError: no such path, or nothing to read in a folder.
        ValueError: while reading: a file is empty, no text, lacks the column or is damaged.
    """

    def __init__(self, path: str, column: str, line: Line | None = None) -> None:
        self.name = path
        self.identity = [str(Path(path).absolute()), column, str(line is not None)]
        self._column = column
        self._line = line
        self._files = _find(Path(path))
        self.size = sum(file.stat().st_size for file in self._files)

    def chunks(self) -> Iterator[Chunk]:
        """The documents of all files."""
        for file in self._files:
            if file.suffix == ".parquet":
                yield from _parquet(file, self._column)
            elif file.suffix == ".jsonl":
                yield from _rows(file, lambda line: _from_json(line, self._column))
            elif self._line is None:
                yield from _pieces(file)
            else:
                yield from _rows(file, _of_text(self._line))

    def fingerprint(self) -> list[Any]:
        """Path, bytes and time of change of each file."""
        return [stamp(file) for file in self._files]


def stamp(file: Path) -> list[Any]:
    """Absolute path, bytes and time of change of a file."""
    facts = file.stat()
    return [str(file.absolute()), facts.st_size, facts.st_mtime_ns]


def require_path(path: str | None) -> None:
    """Raise FileNotFoundError for a path that is given and does not exist."""
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"no such file or folder: {path}")


def _find(path: Path) -> list[Path]:
    require_path(str(path))
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in _KINDS and file.is_file())
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise FileNotFoundError(f"no .txt, .parquet or .jsonl files with content in the folder {path}")
    return files


def _open_text(file: Path) -> BinaryIO:
    if file.suffix.lower() in _BINARY:
        raise ValueError(_refusal(file))
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty")
    return file.open("rb")


def _refusal(file: Path) -> str:
    return f"{file} is not a text file: give .txt, .parquet, .jsonl, a .bin of uint16 tokens, or a folder of text"


def _pieces(file: Path) -> Iterator[Chunk]:
    """A text file as one document in pieces that tokenize as the whole does."""
    place, rest = 0, b""
    with _open_text(file) as stream:
        while fresh := stream.read(_PIECE):
            if b"\0" in fresh:
                raise ValueError(_refusal(file))
            rest += fresh
            if len(rest) >= _PIECE and (end := _cut_place(rest)):
                yield Chunk(str(file), [rest[:end]], place, "byte", end, open=True)
                place, rest = place + end, rest[end:]
    yield Chunk(str(file), [rest], place, "byte", len(rest))


def _cut_place(content: bytes) -> int:
    """Where to cut a text: before the last blank that follows a visible character, 0 if there is none nearby.

    There every rule that splits text into words has a border, GPT-2's too; behind the blank it has not.
    """
    start = max(1, len(content) - 4096)
    for match in reversed(list(_BLANK.finditer(content, start))):
        before = content[max(0, match.start() - 4) : match.start()].decode("utf-8", errors="ignore")[-1:]
        if before and not before.isspace():
            return match.start()
    if len(content) < _LONGEST * _PIECE:
        return 0
    end = len(content) - 1
    while content[end] & 0xC0 == 0x80 and len(content) - end < 4:  # not inside a character
        end -= 1
    return end


def _rows(file: Path, document: Callable[[bytes], bytes | None]) -> Iterator[Chunk]:
    """Lines of a file, each made into a document or left out."""
    documents: list[bytes] = []
    first, size = 1, 0
    with _open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                found = document(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} line {number} is not UTF-8 text: {error.reason}") from error
            except ValueError as error:
                raise ValueError(f"{file} line {number}: {error}") from error
            size += len(line)
            documents += [] if found is None else [found]
            if len(documents) >= _ROWS or size >= _BYTES:
                yield Chunk(str(file), documents, first, "line", size)
                documents, first, size = [], number + 1, 0
    yield Chunk(str(file), documents, first, "line", size)


def _of_text(function: Line) -> Callable[[bytes], bytes]:
    return lambda line: function(line.decode()).encode()


def _from_json(line: bytes, column: str) -> bytes | None:
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if isinstance(value, dict):
        if column not in value:
            raise ValueError(f"no key {column!r}: set column to one of {', '.join(value)}")
        value = value[column]
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{json.dumps(value)[:40]} is not text: give a JSON string, or an object with one, per line")
    return value.encode("utf-8", errors="replace")


def _parquet(file: Path, column: str) -> Iterator[Chunk]:
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
    row_size = file.stat().st_size / max(table.metadata.num_rows, 1)
    place = 1
    for rows in table.iter_batches(_ROWS, columns=[column]):
        documents = text_bytes(rows.column(0))
        yield Chunk(str(file), documents, place, "document", int(row_size * len(rows)))
        place += len(documents)


def text_bytes(column: Any) -> list[bytes]:
    """The texts of an Arrow column of strings, without nulls, as they are: Arrow does not promise valid UTF-8."""
    import pyarrow

    kind = pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()
    return column.drop_null().cast(kind).to_pylist()
