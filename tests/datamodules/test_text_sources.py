"""Text files of all kinds: documents, packing, pieces of large files, places of mistakes, memory."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules import TextDataModule, text_sources
from datamodules.corpus import encode, map_tokens, tokenize
from datamodules.text_sources import Files
from datamodules.tokenizers import ByteTokenizer, CharacterTokenizer, GPT2Tokenizer
from tests.datamodules.text_files import blocks, numbered, ready, write

VISIBLE = st.characters(exclude_characters="\0", exclude_categories=["Cs"])


def documents(path, column="text"):
    return [text.decode() for chunk in Files(str(path), column).chunks() for text in chunk.documents]


def whole(path, tokenizer, **options):
    return tokenize(Files(str(path), "text", **options), tokenizer, "bytes", None)


# ---- kinds of files


@given(texts=st.lists(st.text(VISIBLE, max_size=20), max_size=9))
@settings(max_examples=40, deadline=None)
def test_jsonl_objects_strings_and_parquet_rows_are_the_same_documents(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    objects = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)
    strings = "\n".join(json.dumps(text, ensure_ascii=False) for text in texts)
    write(folder / "objects.jsonl", objects + "\n" + json.dumps({"text": None}) + "\n")
    write(folder / "strings.jsonl", strings + "\n\n")
    table = pyarrow.table({"text": pyarrow.array([*texts, None], pyarrow.string())})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    for name in ("objects.jsonl", "strings.jsonl", "rows.parquet"):
        assert documents(folder / name) == texts


def test_folder_of_all_kinds_in_sorted_order(tmp_path):
    write(tmp_path / "a.txt", "first\n")
    write(tmp_path / "b.jsonl", '{"body": "second"}\n"third"\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["fourth"]}), tmp_path / "c.parquet")
    write(tmp_path / "d.json", "not me")
    path = str(tmp_path)
    data = ready(path=path, val_path=path, test_path=path, column="body", length=1, windows="blocks")
    assert "".join(data.decode(blocks(data, "val"))) == "first\nsecond\nthird\nfourth\n"


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    assert documents(write(tmp_path / "a.jsonl", '"x\\ud800y"\n')) == ["x?y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"a"\n{"text": "b"\n', r"a.jsonl line 2: not JSON"),
        (b'{"body": "a", "id": 1}\n', r"a.jsonl line 1: no key 'text': set column to one of body, id"),
        (b'"a"\n\n{"text": 3}\n', r"a.jsonl line 3: 3 is not text"),
        (b'"a"\n"\xe9"\n', r"a.jsonl line 2 is not UTF-8 text"),
        (b"\n \n", r"a.jsonl is empty"),
    ],
)
def test_refused_jsonl(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        ready(path=write(tmp_path / "a.jsonl", content))


# ---- packing


@given(
    texts=st.lists(st.text(st.sampled_from("the cat\n ü1"), max_size=30), min_size=1, max_size=12),
    length=st.integers(1, 9),
    kind=st.sampled_from(["txt", "jsonl", "parquet"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gpt2_packs_each_document_with_its_end_and_drops_the_remainder_only(
    texts, length, kind, small_gpt2, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("packing")
    if kind == "txt":
        texts = [text or "x" for text in texts]  # empty files are skipped
        for number, text in enumerate(texts):
            write(folder / f"{number:03d}.txt", text)
    elif kind == "jsonl":
        write(folder / "rows.jsonl", "".join(json.dumps(text) + "\n" for text in texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "rows.parquet")
    tokenizer = GPT2Tokenizer(small_gpt2)
    expected = [int(token) for text in texts for token in [*tokenizer.encode_text(text), tokenizer._end]]
    if len(expected) < length:
        return
    arguments = {"path": str(folder), "val_path": str(folder), "test_path": str(folder)}
    data = ready(**arguments, tokenizer="gpt2", tokenizer_path=small_gpt2, length=length)
    assert blocks(data, "val").flatten().tolist() == expected[: len(expected) // length * length]
    assert data.spec["tokenizer"] == {"gpt2": small_gpt2}


# ---- large text files


@given(
    text=st.lists(
        st.sampled_from(
            ["the", "cat", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "ü", "。", "12", "'s", "!\n"]
        ),
        max_size=80,
    ).map("".join)
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_in_pieces_has_the_tokens_of_the_whole(text, small_gpt2, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("pieces") / "a.txt", text or "x")
    tokenizer = GPT2Tokenizer(small_gpt2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_sources, "_PIECE", 16)
        patch.setattr(text_sources, "_LONGEST", 1000)
        assert whole(path, tokenizer).tolist() == tokenizer.encode([(text or "x").encode()]).tolist()
        assert whole(path, ByteTokenizer()).tobytes() == (text or "x").encode()


def test_large_file_is_cut_often_and_ends_once(tmp_path, monkeypatch, small_gpt2):
    monkeypatch.setattr(text_sources, "_PIECE", 64)
    chunks = list(Files(write(tmp_path / "a.txt", "the cat sat\n" * 100), "text").chunks())
    assert len(chunks) > 15
    assert [chunk.open for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    tokenizer = GPT2Tokenizer(small_gpt2)
    ids = np.concatenate([encode(chunk, tokenizer) for chunk in chunks])
    assert (ids == tokenizer._end).sum() == 1
    assert ids[-1] == tokenizer._end


def test_text_without_blanks_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "_PIECE", 10)
    text = "é" * 1000
    chunks = list(Files(write(tmp_path / "a.txt", text), "text").chunks())
    assert len(chunks) > 10
    assert "".join(chunk.documents[0].decode() for chunk in chunks) == text


@pytest.mark.parametrize("tokenizer", ["gpt2", "characters"])
@pytest.mark.parametrize("place", [3, 100, 250])
def test_wrong_byte_of_a_text_is_named(tmp_path, monkeypatch, small_gpt2, tokenizer, place):
    monkeypatch.setattr(text_sources, "_PIECE", 64)
    content = bytearray(numbered(40).encode())
    content[place] = 0xE9
    path = write(tmp_path / "latin.txt", bytes(content))
    options = {"tokenizer_path": small_gpt2} if tokenizer == "gpt2" else {}
    message = rf"latin.txt is not UTF-8 text: use tokenizer: bytes \(wrong at byte {place}\)"
    with pytest.raises(ValueError, match=message):
        ready(path=path, tokenizer=tokenizer, length=4, **options)
    data = ready(path=path, val_path=path, test_path=path, length=1)  # bytes take anything
    assert bytes(blocks(data, "val").flatten().tolist()) == bytes(content)


def test_wrong_document_of_a_parquet_file_is_named(tmp_path, small_gpt2):
    rows = pyarrow.array([b"a", None, b"b", b"\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet is not UTF-8 text: .*wrong at document 3"):
        ready(path=str(tmp_path), tokenizer="gpt2", tokenizer_path=small_gpt2)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    line = "the cat sat on the mat and so on " * 30
    path = str(tmp_path / f"a.{kind}")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [line] * 40_000}), path, row_group_size=1000)
    else:
        write(tmp_path / f"a.{kind}", (f"{line}\n" if kind == "txt" else json.dumps(line) + "\n") * 40_000)
    tracemalloc.start()
    tokens = tokenize(Files(path, "text"), ByteTokenizer(), "bytes", str(tmp_path / "cache"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tokens) == 40_000 * (len(line) + 1) > 39e6
    assert peak < 16e6


# ---- files of tokens


@pytest.mark.parametrize("place", [0, 77, (1 << 24) + 5])
def test_every_token_of_a_bin_file_is_checked(tmp_path, place):
    tokens = np.zeros(place + 3, dtype="<u2")
    tokens[place] = 300
    tokens.tofile(tmp_path / "t.bin")
    path = str(tmp_path / "t.bin")
    with pytest.raises(ValueError, match=rf"t.bin holds the token 300 at position {place}, outside .* of 256"):
        map_tokens(path, 256)
    assert len(map_tokens(path, 301)) == place + 3


# ---- characters


def test_characters_of_rows_include_the_line_feed_between_them(tmp_path):
    path = write(tmp_path / "a.jsonl", '"ab"\n"ba"\n' * 20)
    data = TextDataModule(path=path, val_path=path, test_path=path, tokenizer="characters", length=3)
    assert data.spec["tokenizer"] == {"characters": "\nab"}
    assert "".join(data.decode(blocks(data, "val"))) == "ab\nba\n" * 20
    assert isinstance(data._tokenizer, CharacterTokenizer)
