"""Token sequences as text, in files and in TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.tokenizers import Tokenizer, TokenizerName, tokenizer_for
from lightning_sgm.io.files import atomic_write
from lightning_sgm.io.writers import Batch, Writer, names_of, numbers_of, shown_name, with_suffix

_MASK = "\N{LIGHT SHADE}"


class TextWriter(Writer):
    """Token sequences as text.

    Single files hold exactly the bytes of the text. Overviews are for reading: sections under a numbered line; bytes
    that are not UTF-8 and control characters, which a terminal would obey, appear as ``\\xNN``, and a token that is
    still the mask as a gray box. Where the vocabulary cannot be had, the numbers of the tokens are written.

    Of a batch with ``length`` (B,), row i is shown up to its length; a batch with ``evaluations`` (B,) shows one sample
    after so many network evaluations.

    Args:
        tokenizer: as in a data specification: "bytes" (token = byte), "gpt2" or {"gpt2": folder} (needs the extra
            ``text`` and the vocabulary) or {"characters": "abc..."} (token i = i-th of them by code point).
    """

    def __init__(self, tokenizer: TokenizerName = "bytes") -> None:
        self.tokenizer = tokenizer
        gpt2 = tokenizer == "gpt2" or (isinstance(tokenizer, dict) and "gpt2" in tokenizer)
        # The vocabulary of GPT-2 may have to be fetched: only when there is something to write.
        self._tokenizer: Tokenizer | None = None if gpt2 else tokenizer_for(tokenizer)
        self._missing = False

    def save(self, batch: Batch, stem: Path) -> list[Path]:
        """All samples in ``stem.txt``."""
        return self._write_sections(_titles(batch), self.decode(batch["x"], batch.get("length")), stem)

    def save_each(self, batch: Batch, folder: Path) -> list[Path]:
        """``folder/NAME.txt``, the exact bytes."""
        files = []
        for name, raw in zip(names_of(batch), self.decode(batch["x"], batch.get("length")), strict=True):
            files.append(with_suffix(folder / name, ".txt"))
            with atomic_write(files[-1]) as file:
                file.write(raw)
        return files

    def collect(self, files: Sequence[Path], stem: Path) -> list[Path]:
        """All samples in ``stem.txt``, called by their file names."""
        titles = [f"sample {shown_name(file)}" for file in files]
        return self._write_sections(titles, [file.read_bytes() for file in files], stem)

    def log(self, logger: Logger, tag: str, batch: Batch, step: int) -> None:
        """One Markdown text with a code block per sample, which keeps spaces and newlines."""
        if isinstance(logger, TensorBoardLogger):
            sections = zip(_titles(batch), self.decode(batch["x"], batch.get("length")), strict=True)
            text = "\n\n".join(f"{title}\n\n{_code(readable(raw))}" for title, raw in sections)
            logger.experiment.add_text(tag, text, step)

    def decode(self, x: Tensor, length: Tensor | None = None) -> list[bytes]:
        """The texts of tokens as bytes (UTF-8 where the tokenizer knows characters).

        Args:
            x: (B, L) tokens in [0, V], V the mask.
            length: (B,) how many tokens of each row to show; all by default.
        """
        lengths = [x.shape[1]] * len(x) if length is None else length.tolist()
        return [self._text(row[:end]) for row, end in zip(x.tolist(), lengths, strict=True)]

    def _text(self, row: list[int]) -> bytes:
        if self._tokenizer is None and not self._missing:
            try:
                self._tokenizer = tokenizer_for(self.tokenizer)
            except (FileNotFoundError, ModuleNotFoundError) as error:  # a run of days must not end here
                self._missing = True
                rank_zero_warn(f"token numbers are written in place of text: {error}")
        if self._tokenizer is None:
            return " ".join(map(str, row)).encode()
        vocabulary = self._tokenizer.vocabulary
        pieces = ((masked, list(run)) for masked, run in groupby(row, lambda token: token == vocabulary))
        raw = self._tokenizer.raw
        return b"".join(
            (_MASK * len(run)).encode() if masked else raw(np.array(run, dtype=np.uint16)) for masked, run in pieces
        )

    def _write_sections(self, titles: Sequence[str], raws: Sequence[bytes], stem: Path) -> list[Path]:
        path = with_suffix(stem, ".txt")
        rule = "=" * 20
        sections = [f"{rule} {title} {rule}\n{readable(raw)}\n" for title, raw in zip(titles, raws, strict=True)]
        with atomic_write(path) as file:
            file.write("\n".join(sections).encode())
        return [path]


def _titles(batch: Batch) -> list[str]:
    if "evaluations" in batch:
        return [f"after {count} evaluations" for count in batch["evaluations"].tolist()]
    return [f"sample {number}" for number in numbers_of(batch)]


# Everything that moves a terminal's cursor or breaks a line, but not tab and newline.
_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}


def readable(raw: bytes) -> str:
    """Text for the eye: what is not UTF-8, and control characters, as ``\\xNN``."""
    return raw.decode("utf-8", errors="backslashreplace").translate(_CONTROLS)


def _code(text: str) -> str:
    """A Markdown code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
