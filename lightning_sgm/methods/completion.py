"""Completion of text: what is given of a sequence, and where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.tokenizers import Tokenizer, tokenizer_for
from lightning_sgm.networks.base import Spec

_KEYS = ("prompt", "suffix", "template")


class Given(NamedTuple):
    """What is known of n sequences.

    Attributes:
        x: (n, L) int64, the mask where nothing is known.
        wanted: (n, L) bool, the masks to replace; what is neither known nor wanted is behind the text.
        length: (n,) int64, tokens of each text, known and wanted.
    """

    x: Tensor
    wanted: Tensor
    length: Tensor


class Complete:
    """Texts of which some tokens are given: a beginning, an end, both, or any pattern.

    The network sees a whole block as in training. Positions behind the text stay masked, so the answer is averaged over
    what could follow, and only positions that are asked for cost network evaluations.

    Sample number i completes text i modulo their number.

    Args:
        prompt: how texts begin.
        suffix: how they end.
        template: a whole text in which every blank is one token to find: ``"To be ___ or"``.
        file: many of these. In a .jsonl file each line is an object with "prompt", "suffix" or "template" and
            perhaps "length"; in any other each line that is not empty is a prompt.
        length: tokens of a text with what is given; by default the block the model was trained on. Not for templates.
        blank: the character that stands for one free token in a template.

    Raises:
        ValueError: nothing to complete is given, or in more than one way.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        prompt: str = "",
        suffix: str = "",
        template: str = "",
        file: str = "",
        length: int | None = None,
        blank: str = "_",
    ) -> None:
        if len(blank) != 1:
            raise ValueError(f"blank must be one character, got {blank!r}")
        self.blank = blank
        # Not None for what is not given: the command line would take "null" and "# text" for it.
        text: dict[str, Any] = {"prompt": prompt, "suffix": suffix, "template": template, "length": length}
        text = {key: value for key, value in text.items() if value not in ("", None)}
        if not file:
            self.texts = [_checked(text, "")]
        elif set(text) - {"length"}:
            raise ValueError("give either a file of texts to complete or one text, not both")
        else:
            self.texts = [_checked(text | line, f"{file}, line {i}: ") for i, line in _lines(Path(file))]
        self._known: tuple[list[int], ...] | None = None

    def given(self, indices: Tensor, spec: Spec) -> Given:
        """What is known of the samples ``indices`` (n,).

        Raises:
            ValueError: a text does not fit into the model's block, has nothing to find, or cannot be written in its
                tokens.
        """
        if self._known is None:
            tokenizer = tokenizer_for(spec["tokenizer"])
            self._known = tuple(self._tokens(text, tokenizer, spec["length"]) for text in self.texts)
        mask, known = spec["vocabulary"], [self._known[i % len(self._known)] for i in indices.tolist()]
        x = torch.full((len(known), spec["length"]), mask)
        length = torch.tensor([len(row) for row in known])
        for row, tokens in zip(x, known, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        inside = torch.arange(spec["length"]) < length[:, None]
        return Given(x, inside & (x == mask), length)

    def _tokens(self, text: dict[str, Any], tokenizer: Tokenizer, block: int) -> list[int]:
        """Tokens of a text, the mask for those to find."""
        mask, what = tokenizer.vocabulary, " and ".join(key for key in _KEYS if key in text)
        if "template" in text:
            pieces = re.split(f"({re.escape(self.blank)}+)", text["template"])
            tokens = [
                token
                for i, piece in enumerate(pieces)
                for token in ([mask] * len(piece) if i % 2 else tokenizer.encode_text(piece).tolist())
            ]
        else:
            before, after = (tokenizer.encode_text(text.get(key, "")).tolist() for key in ("prompt", "suffix"))
            free = text.get("length", block) - len(before) - len(after)
            tokens = before + [mask] * max(0, free) + after
            if "length" in text and free < 1:
                raise ValueError(
                    f"the {what} has {len(tokens)} tokens, so length {text['length']} leaves none to find: raise it"
                )
        if len(tokens) > block:
            raise ValueError(f"the {what} has {len(tokens)} tokens, and the model's block {block}: shorten the {what}")
        if mask not in tokens:
            hint = f"put a {self.blank} for each token to find" if "template" in text else f"the block has {block}"
            raise ValueError(f"the {what} has {len(tokens)} tokens and leaves none to find: {hint}")
        return tokens


def _checked(text: dict[str, Any], where: str) -> dict[str, Any]:
    """A text to complete that says what to do."""
    if unknown := sorted(set(text) - {*_KEYS, "length"}):
        raise ValueError(f"{where}unknown {', '.join(unknown)}: a text to complete has {', '.join(_KEYS)}, length")
    if wrong := [key for key in _KEYS if key in text and not isinstance(text[key], str)]:
        raise ValueError(f"{where}{wrong[0]} must be text, got {text[wrong[0]]!r}")
    if "length" in text and (not isinstance(text["length"], int) or text["length"] < 1):
        raise ValueError(f"{where}length of a text must be at least 1 token, got {text['length']!r}")
    if not set(text) & set(_KEYS):
        raise ValueError(f"{where}nothing to complete: give a prompt, a suffix, a template or a file of them")
    if "template" in text and len(text) > 1:
        raise ValueError(f"{where}a template is a whole text: it goes without prompt, suffix and length")
    return text


def _lines(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Texts of a file with the numbers of their lines."""
    if not file.is_file():
        raise FileNotFoundError(f"no such file of texts to complete: {file}")
    try:
        lines = file.read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{file} is empty: one prompt per line")
    return [(i, _object(line, file, i) if file.suffix == ".jsonl" else {"prompt": line}) for i, line in numbered]


def _object(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}, line {number} must be an object with one of {', '.join(_KEYS)}")
    return found
