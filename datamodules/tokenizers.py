"""From text to token ids and back: bytes, the characters of a file, GPT-2's byte-pair encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.unsignedinteger[Any]]
GPT2_VOCABULARY = 50257
_END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What TextDataModule asks of a tokenizer.

    Attributes:
        vocabulary: number of real tokens V; ids are 0..V-1.
        ends_documents: whether `encode` marks the end of each document by a token of its own.
    """

    vocabulary: int
    ends_documents: bool

    def encode(self, documents: list[bytes]) -> Ids:
        """Ids of all documents in one row. Raises UnicodeDecodeError where a document must be UTF-8 and is not."""

    def encode_text(self, text: str) -> Ids:
        """Ids of a piece of text, such as a prompt: no end of a document. ValueError where it cannot be written."""

    def raw(self, ids: Ids) -> bytes:
        """The bytes that a row of ids stands for; UTF-8 where the tokenizer knows characters."""

    def token_bytes(self) -> NDArray[np.int64]:
        """(V,) number of text bytes that each token stands for; 0 for the end of a document."""


TokenizerName = str | dict[str, str]
"""Entry ``tokenizer`` of a spec: "bytes", "gpt2", {"gpt2": folder of its vocabulary} or {"characters": the set}."""


def tokenizer_for(name: TokenizerName) -> Tokenizer:
    """The tokenizer of a model, from its ``spec["tokenizer"]``.

    Raises:
        ValueError: a name that is none of these.
        FileNotFoundError: the vocabulary of GPT-2 is neither there nor within reach.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer(None)
    if isinstance(name, dict) and len(name) == 1:
        if "characters" in name:
            return CharacterTokenizer(name["characters"])
        if "gpt2" in name:
            return GPT2Tokenizer(name["gpt2"])
    raise ValueError(f"unknown tokenizer {name!r}: use bytes, gpt2, {{gpt2: FOLDER}} or {{characters: THE SET}}")


def described(name: TokenizerName) -> str:
    """A tokenizer in words; the same words where tokens mean the same, wherever a vocabulary lies."""
    if isinstance(name, dict):
        return f"the characters {name['characters']!r}" if "characters" in name else next(iter(name))
    return name


def storage(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned type for ids of this vocabulary; ValueError beyond 65536 tokens."""
    if vocabulary > 1 << 16:
        raise ValueError(f"a vocabulary of {vocabulary} tokens is too large: at most 65536 are supported")
    return np.uint8 if vocabulary <= 1 << 8 else np.uint16


class ByteTokenizer:
    """A token is a byte: V = 256, lossless for every file, nothing to learn or download."""

    vocabulary = 256
    ends_documents = False

    def encode(self, documents: list[bytes]) -> Ids:
        """Concatenated bytes, uint8."""
        return np.frombuffer(b"".join(documents), dtype=np.uint8)

    def encode_text(self, text: str) -> Ids:
        """Its UTF-8 bytes."""
        return self.encode([text.encode()])

    def raw(self, ids: Ids) -> bytes:
        """The bytes themselves."""
        return ids.astype(np.uint8).tobytes()

    def token_bytes(self) -> NDArray[np.int64]:
        """One byte each."""
        return np.ones(self.vocabulary, dtype=np.int64)


class CharacterTokenizer:
    """A token is one of a fixed set of characters, numbered in the order of their code points.

    Args:
        characters: the set, as a string; kept sorted.
    """

    ends_documents = False

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.vocabulary = len(self.characters)
        self._codes = _code_points(self.characters)

    @classmethod
    def observed(cls, documents: list[bytes]) -> CharacterTokenizer:
        """The tokenizer of all characters that occur in UTF-8 documents."""
        return cls("".join(set().union(*(set(document.decode("utf-8")) for document in documents))))

    def encode(self, documents: list[bytes]) -> Ids:
        """Ids of all characters; ValueError for one outside the set."""
        codes = _code_points(b"".join(documents).decode("utf-8"))
        place = np.searchsorted(self._codes, codes).clip(max=max(self.vocabulary - 1, 0))
        unknown = codes[self._codes[place] != codes]
        if len(unknown):
            raise ValueError(
                f"the character {chr(unknown[0])!r} (U+{unknown[0]:04X}) is not among the {self.vocabulary} of the "
                f"training text: use tokenizer: bytes"
            )
        return place.astype(storage(self.vocabulary))

    def encode_text(self, text: str) -> Ids:
        """As ``encode``."""
        return self.encode([text.encode()])

    def raw(self, ids: Ids) -> bytes:
        """The characters of a row of ids in UTF-8."""
        return self._codes[ids].tobytes().decode("utf-32-le").encode()

    def token_bytes(self) -> NDArray[np.int64]:
        """Length of each character in UTF-8."""
        return np.searchsorted(np.array([0x80, 0x800, 0x10000]), self._codes, side="right") + 1


class GPT2Tokenizer:
    """Byte-level byte-pair encoding with the vocabulary of GPT-2 (Radford et al. 2019), by the `tokenizers` library.

    Every document is followed by the end-of-text token (50256 in the released vocabulary).

    Args:
        folder: with `encoder.json` or `vocab.json` and `vocab.bpe` or `merges.txt`; None fetches the released
            vocabulary from the Hugging Face hub, or takes it from the hub's cache.

    Raises:
        FileNotFoundError: the folder lacks a file, or the hub cannot be reached.
        ModuleNotFoundError: the `tokenizers` library is not installed.
    """

    ends_documents = True

    def __init__(self, folder: str | None) -> None:
        self._tokenizer = _released_gpt2() if folder is None else _gpt2_from_folder(Path(folder))
        self.vocabulary: int = self._tokenizer.get_vocab_size()
        end = self._tokenizer.token_to_id(_END_OF_TEXT)
        if end is None:
            raise ValueError(f"the vocabulary in {folder} has no {_END_OF_TEXT} token")
        self._end: int = end

    def encode(self, documents: list[bytes]) -> Ids:
        """Ids of all documents, each followed by the end-of-text token."""
        kind = storage(self.vocabulary)
        encodings = self._tokenizer.encode_batch_fast([document.decode("utf-8") for document in documents])
        rows = [np.array([*encoding.ids, self._end], dtype=kind) for encoding in encodings]
        return np.concatenate([np.empty(0, dtype=kind), *rows])

    def encode_text(self, text: str) -> Ids:
        """Ids of a text without the end-of-text token at its end."""
        return np.array(self._tokenizer.encode(text).ids, dtype=storage(self.vocabulary))

    def raw(self, ids: Ids) -> bytes:
        """UTF-8 of a row of ids, with the end-of-text token written out; halves of characters become U+FFFD."""
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text.encode()

    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of each token: its spelling in the vocabulary has one printable character per byte."""
        lengths = np.zeros(self.vocabulary, dtype=np.int64)
        for token, number in self._tokenizer.get_vocab().items():
            lengths[number] = 0 if number == self._end else len(token)
        return lengths


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tokenizer: gpt2 needs the tokenizers library: pip install 'lightning_sgm[text]', or use tokenizer: bytes"
        ) from error
    return tokenizers


def _released_gpt2() -> Any:
    library = _library()
    try:
        return library.Tokenizer.from_pretrained("openai-community/gpt2")
    except Exception as error:  # the library raises bare Exception, the hub its own kinds
        raise FileNotFoundError(
            "the GPT-2 vocabulary could not be fetched from the Hugging Face hub: set tokenizer_path to a folder with "
            "vocab.json and merges.txt (or encoder.json and vocab.bpe), or use tokenizer: bytes"
        ) from error


def _gpt2_from_folder(folder: Path) -> Any:
    vocabulary = _first_file(folder, ("vocab.json", "encoder.json"))
    merges = _first_file(folder, ("merges.txt", "vocab.bpe"))
    library = _library()
    try:
        tokenizer = library.Tokenizer(library.models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{vocabulary} and {merges} are not a byte-pair vocabulary: {error}") from error
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if tokenizer.token_to_id(_END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([_END_OF_TEXT])
    return tokenizer


def _first_file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"tokenizer_path {folder} has no {' or '.join(names)}")
