"""Text of the Hugging Face hub by the `datasets` library: rows mapped from disk, or shards over the network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datamodules.text_sources import Chunk, text_bytes

_ROWS = 1000  # that are read at once


class HubRows:
    """A split of a set, downloaded once by the library and mapped from its cache; a row is a document.

    Args:
        dataset: name on the hub, NAME@REVISION, or a local folder of files in a usual format.
        config: of the set; None where it has one only.
        split: "train", or what the library makes of "train[:1%]" and the like.
        column: that holds the text.
        files: where the rows are, for a general builder ("parquet", "json") in place of a name.

    Raises:
        FileNotFoundError: the hub or the set is out of reach.
        ModuleNotFoundError: the library is not installed.
        ValueError: no such config, split or column; a set that needs its own code.
    """

    def __init__(self, dataset: str, config: str | None, split: str, column: str, files: str | None = None) -> None:
        self._rows = _load(dataset, config, split, files, streaming=False)
        self.name = f"{files or dataset} ({config + ', ' if config else ''}{split})"
        _require_text(self._rows, column, self.name)
        self._column = column
        self.identity = [self.name, column]
        self.size = len(self._rows)

    def chunks(self) -> Iterator[Chunk]:
        """All rows; ``size`` counts them."""
        rows = self._rows.select_columns([self._column]).with_format("arrow")
        place = 1
        for table in rows.iter(batch_size=_ROWS):
            documents = text_bytes(table.column(0))
            yield Chunk(self.name, documents, place, "document", len(table))
            place += len(documents)

    def fingerprint(self) -> list[Any]:
        """Number of rows and the library's files, whose folders hold a hash of the data, wherever its cache lies."""
        files = [Path(entry["filename"]) for entry in self._rows.cache_files]
        return [self.size, *([*file.parts[-2:], file.stat().st_size] for file in files)]


class HubShards:
    """A split of a set, streamed: its shards can be read in any order, each from any document on.

    Args:
        dataset, config, split, column: see :class:`HubRows`. A null text is an empty document.

    Attributes:
        shards: number of files of the split.
    """

    def __init__(self, dataset: str, config: str | None, split: str, column: str) -> None:
        self._stream = _load(dataset, config, split, None, streaming=True)
        self.name = f"{dataset} ({config + ', ' if config else ''}{split})"
        if self._stream.features is not None:
            _require_text(self._stream, column, self.name)
            self._stream = self._stream.select_columns([column])
        self._column = column
        self.shards: int = self._stream.num_shards

    def documents(self, shard: int, skip: int, step: int) -> Iterator[bytes]:
        """Every ``step``-th document of a shard from number ``skip`` on, as bytes.

        Raises:
            ValueError: a row without the text.
        """
        stream = self._stream.shard(num_shards=self.shards, index=shard)
        for row in islice(stream.skip(skip) if skip else stream, None, None, step):
            text = row.get(self._column, 0)
            if not isinstance(text, str | None):
                raise ValueError(
                    f"{self.name} has no text in column {self._column!r}: set column to one of {list(row)}"
                )
            yield (text or "").encode("utf-8", errors="replace")


def _load(dataset: str, config: str | None, split: str, files: str | None, streaming: bool) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "text by the name of a data set needs the datasets library: pip install 'lightning_sgm[text]'"
        ) from error
    name = files or dataset
    path, _, revision = (dataset, "", "") if Path(dataset).exists() else dataset.partition("@")
    try:
        return datasets.load_dataset(
            path, config, split=split, streaming=streaming, data_files=files, revision=revision or None
        )
    except Exception as error:  # the library, its file systems and its HTTP client raise kinds of their own
        text = " ".join(str(error).split())
        if "scripts are no longer supported" in text:
            raise ValueError(
                f"the data set {name} is a script, and none is run here: try {path}@refs/convert/parquet, the hub's "
                f"own copy (of a very large set a part only), or give files of your own as path"
            ) from error
        if isinstance(error, ValueError):  # an unknown config or split: the message lists the known ones
            raise ValueError(f"the data set {name}: {text}") from error
        raise FileNotFoundError(
            f"the data set {name} could not be reached ({text[:200]}): check its name and the network, or give a local "
            f"folder of .parquet, .jsonl or .txt files"
        ) from error


def _require_text(rows: Any, column: str, name: str) -> None:
    names = list(rows.features)
    if column not in names:
        raise ValueError(f"{name} has no column {column!r}: set column to one of {', '.join(names)}")
    kind = getattr(rows.features[column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise ValueError(f"the column {column!r} of {name} holds {kind or rows.features[column]}, not text")
