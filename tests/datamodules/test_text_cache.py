"""Tokens on disk: written once, used again, written anew when anything has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from datamodules import corpus
from datamodules.corpus import tokenize
from datamodules.text_sources import Files
from datamodules.tokenizers import ByteTokenizer, CharacterTokenizer
from tests.datamodules.text_files import blocks, numbered, ready, write

BYTES = ByteTokenizer()


class Counted(Files):
    """Counts how often it is read."""

    reads = 0

    def chunks(self):
        self.reads += 1
        return super().chunks()


def kept(path, cache, tokenizer=BYTES, name="bytes"):
    """Tokens and whether the text was read for them."""
    source = Counted(str(path), "text")
    tokens = tokenize(source, tokenizer, name, str(cache))
    return tokens, source.reads == 1


def test_text_is_tokenized_once_and_mapped_from_then_on(tmp_path):
    path = write(tmp_path / "a.txt", "abc")
    for fresh in (True, False, False):
        tokens, read = kept(path, tmp_path / "cache")
        assert read is fresh
        assert isinstance(tokens, np.memmap)
        assert tokens.tobytes() == b"abc"
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_same_splits_and_decoding_with_and_without_cache(tmp_path):
    path = write(tmp_path / "a.txt", numbered(300))
    plain = ready(path=path, val_path=path, test_path=path, length=16)
    for _ in range(2):
        data = ready(path=path, val_path=path, test_path=path, length=16, cache=str(tmp_path / "cache"))
        assert data.spec == plain.spec
        for split in ("train", "val", "test"):
            assert blocks(data, split).equal(blocks(plain, split))


@pytest.mark.parametrize("change", ["content", "time", "longer"])
def test_changed_file_is_tokenized_again(tmp_path, change):
    path = tmp_path / "a.txt"
    write(path, "abc")
    kept(path, tmp_path / "cache")
    facts = path.stat()
    text = {"content": "xyz", "time": "abc", "longer": "abcd"}[change]
    write(path, text)
    later = facts.st_mtime_ns + (0 if change == "longer" else 1000)
    os.utime(path, ns=(later, later))
    tokens, read = kept(path, tmp_path / "cache")
    assert read
    assert tokens.tobytes() == text.encode()
    assert len(os.listdir(tmp_path / "cache")) == 2  # in place of the old one


def test_new_file_in_a_folder_is_noticed(tmp_path):
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.txt", "abc")
    kept(tmp_path / "texts", tmp_path / "cache")
    write(tmp_path / "texts" / "b.txt", "def")
    assert kept(tmp_path / "texts", tmp_path / "cache")[0].tobytes() == b"abcdef"


def test_columns_do_not_share_tokens(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "ab", "body": "xyz"}\n')
    for column, expected in (("text", b"ab\n"), ("body", b"xyz\n"), ("text", b"ab\n")):
        source = Files(str(tmp_path / "a.jsonl"), column)
        assert tokenize(source, BYTES, "bytes", str(tmp_path / "cache")).tobytes() == expected


def test_tokenizers_do_not_share_tokens(tmp_path):
    path = write(tmp_path / "a.txt", "cab")
    assert kept(path, tmp_path)[0].tolist() == [99, 97, 98]
    for characters, expected in (("abc", [2, 0, 1]), ("abcd", [2, 0, 1]), ("1abc", [3, 1, 2])):
        name = {"characters": characters}
        tokens, read = kept(path, tmp_path, CharacterTokenizer(characters), name)
        assert read
        assert tokens.tolist() == expected
    assert not kept(path, tmp_path)[1]  # nor does one take the place of another


@pytest.mark.parametrize("damage", ["short", "no record", "torn record", "other record", "list"])
def test_torn_cache_is_written_again(tmp_path, damage):
    path = write(tmp_path / "a.txt", "abcdef")
    kept(path, tmp_path / "cache")
    tokens, record = (next((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("tokens", "json"))
    if damage == "short":
        tokens.write_bytes(b"abc")
    elif damage == "no record":
        record.unlink()
    else:
        text = record.read_text()
        other = json.dumps({**json.loads(text), "type": "<u2"})
        record.write_text({"torn record": text[:20], "other record": other, "list": "[]"}[damage])
    found, read = kept(path, tmp_path / "cache")
    assert read
    assert found.tobytes() == b"abcdef"


def test_failure_on_the_way_leaves_nothing(tmp_path):
    path = write(tmp_path / "a.txt", "abc\xe9")
    with pytest.raises(ValueError, match="is not among"):
        kept(path, tmp_path / "cache", CharacterTokenizer("abc"), {"characters": "abc"})
    assert os.listdir(tmp_path / "cache") == []
    write(tmp_path / "rows.jsonl", "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl is empty"):
        kept(tmp_path / "rows.jsonl", tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_mapped_tokens_survive_a_rewrite(tmp_path):
    path = write(tmp_path / "a.txt", "abc")
    old, _ = kept(path, tmp_path / "cache")
    write(tmp_path / "a.txt", "wxyz")
    assert kept(path, tmp_path / "cache")[0].tobytes() == b"wxyz"
    assert old.tobytes() == b"abc"


def test_gpt2_vocabulary_that_changed_is_noticed(tmp_path, small_gpt2):
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        write(folder / name, (Path(small_gpt2) / name).read_bytes())
    path = write(tmp_path / "a.txt", "the cat sat on the mat" * 20)
    options = {"tokenizer": "gpt2", "tokenizer_path": str(folder), "length": 2, "cache": str(tmp_path / "cache")}
    before = ready(path=path, val_path=path, test_path=path, **options)
    merges = (folder / "merges.txt").read_text().splitlines()[:3]
    write(folder / "merges.txt", "\n".join(merges) + "\n")
    after = ready(path=path, val_path=path, test_path=path, **options)
    assert after.count("val") > before.count("val")
    assert after.decode(blocks(after, "val").reshape(1, -1)) == before.decode(blocks(before, "val").reshape(1, -1))


def test_progress_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(corpus, "_SECONDS", -1)
    path = write(tmp_path / "a.txt", "abcd" * 250_000)
    with caplog.at_level("INFO"):
        kept(path, tmp_path / "cache")
    assert "100.0% made into 1.0 M tokens, 0 min left" in caplog.text
