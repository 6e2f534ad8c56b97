"""Tokenizers: round trips, vocabularies, what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import TextDataModule
from datamodules.tokenizers import ByteTokenizer, CharacterTokenizer, GPT2Tokenizer, storage
from tests.datamodules.text_files import blocks, ready, write


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_characters_round_trip(text):
    tokenizer = CharacterTokenizer.observed([text.encode()])
    ids = tokenizer.encode([text.encode()])
    assert tokenizer.vocabulary == len(set(text))
    assert ids.max() < tokenizer.vocabulary
    assert tokenizer.raw(ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_characters_are_known_at_construction(tmp_path):
    data = TextDataModule(path=write(tmp_path / "t.txt", "aéz" * 100), tokenizer="characters", length=4)
    assert data.spec["tokenizer"] == {"characters": "azé"}
    assert data.spec["vocabulary"] == 3
    assert data.spec["bytes_per_token"] == pytest.approx(4 / 3, abs=0.1)
    assert set("".join(data.decode(blocks(data, "val")))) == set("aéz")
    assert json.loads(json.dumps(data.spec)) == data.spec


def test_unknown_character_is_named(tmp_path):
    train, val = write(tmp_path / "train.txt", "ab" * 100), write(tmp_path / "val.txt", "abc" * 100)
    message = r"val.txt: the character 'c' \(U\+0063\) is not among the 2 of the training text: use tokenizer: bytes"
    with pytest.raises(ValueError, match=message):
        TextDataModule(path=train, val_path=val, tokenizer="characters", length=4)


def test_byte_tokenizer_keeps_broken_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.raw(tokenizer.encode(["é".encode()[:1], b"x"])) == b"\xc3x"


@pytest.mark.parametrize(("vocabulary", "kind"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16)])
def test_storage(vocabulary, kind):
    assert storage(vocabulary) is kind


def test_too_large_vocabulary():
    with pytest.raises(ValueError, match="65537 tokens is too large"):
        storage(65537)


def test_gpt2_files_documents_and_round_trip(small_gpt2, tmp_path):
    documents = ["the cat sat über", "on the mat ♥"]
    for number, text in enumerate(documents):
        write(tmp_path / f"{number}.txt", text)
    tokenizer = GPT2Tokenizer(small_gpt2)
    ids = tokenizer.encode([text.encode() for text in documents])
    assert ids.dtype == np.uint16
    assert tokenizer.raw(ids).decode() == "".join(text + "<|endoftext|>" for text in documents)
    assert tokenizer.token_bytes()[ids].sum() == sum(len(text.encode()) for text in documents)
    assert tokenizer.encode([b"<|endoftext|>"]).tolist() == [ids[-1]] * 2
    data = ready(
        path=str(tmp_path),
        val_path=str(tmp_path),
        test_path=str(tmp_path),
        tokenizer="gpt2",
        tokenizer_path=small_gpt2,
        length=1,
        windows="blocks",
    )
    assert data.spec["tokenizer"] == {"gpt2": small_gpt2}
    assert data.spec["vocabulary"] == tokenizer.vocabulary
    assert data.spec["bytes_per_token"] == sum(len(text.encode()) for text in documents) / len(ids)
    assert blocks(data, "val").flatten().tolist() == ids.tolist()
    assert data.decode(torch.tensor(ids[None].astype(int))) == [tokenizer.raw(ids).decode()]


def test_gpt2_files_under_openais_names(small_gpt2, tmp_path):
    for new, old in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        write(tmp_path / new, (Path(small_gpt2) / old).read_bytes())
    text = [b"the dog sat"]
    assert np.array_equal(GPT2Tokenizer(str(tmp_path)).encode(text), GPT2Tokenizer(small_gpt2).encode(text))


def test_gpt2_offline(monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")

    class Offline:
        @staticmethod
        def from_pretrained(name):
            raise OSError("no network")

    monkeypatch.setattr(tokenizers, "Tokenizer", Offline)
    data = TextDataModule(tokenizer="gpt2")
    assert data.spec["vocabulary"] == 50257
    with pytest.raises(FileNotFoundError, match=r"could not be fetched .* set tokenizer_path to a folder"):
        data.prepare_data()


def test_gpt2_without_the_library(monkeypatch, small_gpt2):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_sgm\[text\]', or use tokenizer: bytes"):
        TextDataModule(tokenizer="gpt2", tokenizer_path=small_gpt2)


def test_gpt2_folder_problems(tmp_path, small_gpt2):
    with pytest.raises(FileNotFoundError, match=r"has no vocab.json or encoder.json"):
        TextDataModule(tokenizer="gpt2", tokenizer_path=str(tmp_path))
    write(tmp_path / "vocab.json", "{}")
    with pytest.raises(FileNotFoundError, match=r"has no merges.txt or vocab.bpe"):
        TextDataModule(tokenizer="gpt2", tokenizer_path=str(tmp_path))
    write(tmp_path / "merges.txt", "")
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|> token"):
        TextDataModule(tokenizer="gpt2", tokenizer_path=str(tmp_path))
    write(tmp_path / "vocab.json", "no json")
    with pytest.raises(ValueError, match=r"vocab.json and .*merges.txt are not a byte-pair vocabulary"):
        TextDataModule(tokenizer="gpt2", tokenizer_path=str(tmp_path))


@pytest.mark.parametrize("tokenizer", ["characters", "gpt2"])
def test_text_that_is_not_utf8_is_for_bytes_only(tmp_path, tokenizer, small_gpt2):
    path = write(tmp_path / "latin.txt", "é".encode("latin-1") * 1000)
    options = {"tokenizer_path": small_gpt2} if tokenizer == "gpt2" else {}
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text: use tokenizer: bytes"):
        ready(path=path, tokenizer=tokenizer, **options)
    assert blocks(ready(path=path, length=4), "val").unique().tolist() == [0xE9]


def test_characters_need_text(tmp_path):
    path = write(tmp_path / "t.bin", b"\0\0" * 10)
    with pytest.raises(ValueError, match=r"characters needs text and .*t.bin holds tokens"):
        TextDataModule(val_path=path, tokenizer="characters")


def test_decode_refuses_the_mask():
    with pytest.raises(ValueError, match="only tokens 0 to 255 stand for text, got 256"):
        TextDataModule().decode(torch.tensor([[65, 256]]))
