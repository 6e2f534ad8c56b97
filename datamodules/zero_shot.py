"""The five text sets of zero-shot perplexity (RADD, SEDD, MDLM): where they are and how their text is restored.

The sets come split into words and signs; a detokenizer undoes that before a model's own tokenizer sees the text. What
these functions do, slips included, is what published numbers rest on, so they stay as they are: in WikiText a quote
behind an "s" loses its blank like a plural's, and in PTB an "N" at the end of a line stays, having no blank behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.hub import HubRows
from datamodules.text_sources import Chunk, Files, Line, Source, require_path

# What stands between a pair of signs, with the blanks that do not belong there around the group.
_WIKITEXT_PAIRS: tuple[str, ...] = (r"\(\s*([^)]*?)\s*\)", r"\[\s*([^\]]*?)\s*\]", r"{\s*([^}]*?)\s*}")
_WIKITEXT_PAIRS += (r'"\s*([^"]*?)\s*"', r"'\s*([^']*?)\s*'")
_LM1B_PAIRS = (r'" ([^"]+) "', r"' ([^']+) '", r"\( ([^()]+) \)", r"\[ ([^\[\]]+) \]")


def wikitext(text: str) -> str:
    """A row of WikiText: joined words and numbers, signs, brackets, quotes, headings."""
    text = text.replace("s '", "s'")
    for spaced, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(spaced, plain)
    for sign in ":;.!?,":
        text = text.replace(f" {sign} ", f"{sign} ")
    text = _tighten(text, _WIKITEXT_PAIRS)
    for spaced, plain in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")):
        text = text.replace(spaced, plain)
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def ptb(text: str) -> str:
    """A line of the Penn Treebank: contractions, numbers (N), unknown words ("?")."""
    for spaced, plain in ((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")):
        text = text.replace(spaced, plain)
    for _ in range(2):  # neighbours share a blank: one round takes every other one
        text = text.replace(" N ", " 1 ")
    return text.replace("$ 1", "$1").replace("# 1", "#1").replace("<unk>", "?")


def lm1b(text: str) -> str:
    """A line of the One Billion Word benchmark: addresses, contractions, signs, quotes, brackets, currencies."""
    text = text.replace("http : / / ", "http://").replace("https : / / ", "https://")
    text = re.sub(r" '(\w+)", r"'\1", text)
    text = re.sub(r" (\w+) \. ", r" \1. ", text)
    text = re.sub(r" (\w+) \.$", r" \1.", text)
    for sign in "?!":
        text = re.sub(rf" \{sign}$", sign, text.replace(f" {sign} ", f"{sign} "))
    for sign in ",:;":
        text = text.replace(f" {sign} ", f"{sign} ")
    text = _tighten(text.replace(" / ", "/"), _LM1B_PAIRS)
    return text.replace("$ ", "$").replace("£ ", "£")


def lambada(text: str) -> str:
    """A passage of LAMBADA: straight quotes, no blanks around it, a line feed before it."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def _tighten(text: str, pairs: tuple[str, ...]) -> str:
    for pair in pairs:
        text = re.sub(pair, lambda match: match[0][0] + match[1] + match[0][-1], text)
    return text


def _line_or_nothing(line: str) -> str:
    return line if line.strip() else ""


@dataclass(frozen=True)
class ZeroShotSet:
    """A set on the Hugging Face hub.

    Attributes:
        builder: of the `datasets` library: "parquet" or "json", which run no code of the set.
        files: of the split that is measured.
        column: that holds the text.
        detokenize: restores the text of a row.
        line: makes a line of the set's original text file what the hub's row is.
    """

    builder: str
    files: str
    column: str
    detokenize: Line
    line: Line = str.strip


# PTB and LM1B are published as scripts; the hub keeps its own copy of such sets in parquet under this revision.
_CONVERTED = "@refs/convert/parquet"
# The articles of WikiText2's test split are those of WikiText103's, so the train split is measured, as the paper does.
ZERO_SHOT = {
    "lambada": ZeroShotSet(
        "json", "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl", "text", lambada
    ),
    "wikitext2": ZeroShotSet(
        "parquet",
        "hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1/train-*.parquet",
        "text",
        wikitext,
        _line_or_nothing,
    ),
    "ptb": ZeroShotSet(
        "parquet",
        f"hf://datasets/ptb-text-only/ptb_text_only{_CONVERTED}/penn_treebank/test/*.parquet",
        "sentence",
        ptb,
    ),
    "wikitext103": ZeroShotSet(
        "parquet",
        "hf://datasets/Salesforce/wikitext/wikitext-103-raw-v1/test-*.parquet",
        "text",
        wikitext,
        _line_or_nothing,
    ),
    "lm1b": ZeroShotSet(
        "parquet",
        f"hf://datasets/billion-word-benchmark/lm1b{_CONVERTED}/plain_text/test/*.parquet",
        "text",
        lm1b,
    ),
}


class Detokenized:
    """A source whose documents have been restored by a detokenizer.

    Args:
        source: whole documents in UTF-8.
        detokenize: what to do with each.
    """

    def __init__(self, source: Source, detokenize: Line) -> None:
        self.name, self.size = source.name, source.size
        self.identity = [*source.identity, detokenize.__name__]
        self._source, self._detokenize = source, detokenize

    def chunks(self) -> Iterator[Chunk]:
        """The chunks of the source, restored."""
        for chunk in self._source.chunks():
            try:
                documents = [self._detokenize(document.decode()).encode() for document in chunk.documents]
            except UnicodeDecodeError as error:
                raise ValueError(f"{chunk.name} is not UTF-8 text behind {chunk.unit} {chunk.place}") from error
            yield chunk._replace(documents=documents)

    def fingerprint(self) -> list[Any]:
        """That of the source."""
        return self._source.fingerprint()


def named_corpora(entries: list[str]) -> dict[str, str | None]:
    """Names and paths of ``corpora``: "wikitext2", "FILE" or "NAME=FILE"; no path for a set of the hub.

    Raises:
        FileNotFoundError: an entry is neither a set nor a path that exists.
        ValueError: two of one name.
    """
    corpora: dict[str, str | None] = {}
    for entry in entries:
        name, sign, path = entry.partition("=")
        if entry in ZERO_SHOT:
            known: str | None = None
        elif sign and not Path(entry).exists():
            require_path(path)
            known = path
        elif Path(entry).exists():
            name, known = Path(entry).stem, entry
        else:
            raise FileNotFoundError(f"no such file or folder: {entry}; sets known by name: {', '.join(ZERO_SHOT)}")
        if not name or name in corpora:
            raise ValueError(f"corpora need a name of their own each: write {entry} as another_name={path or entry}")
        corpora[name] = known
    return corpora


def corpus_source(name: str, path: str | None, column: str) -> Source:
    """Text of an entry of ``corpora``; a known name has its own column and detokenizer, from the hub or own files.

    Raises:
        FileNotFoundError: the hub is out of reach.
    """
    known = ZERO_SHOT.get(name)
    if path is None:
        assert known is not None
        try:
            return Detokenized(HubRows(known.builder, None, "train", known.column, files=known.files), known.detokenize)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; or give files of your own: corpora: [{name}=FOLDER_OR_FILE]") from error
    if known is None:
        return Files(path, column)
    return Detokenized(Files(path, known.column, known.line), known.detokenize)
