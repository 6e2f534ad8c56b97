"""Text: splits, windows, file formats, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import TextDataModule
from datamodules.corpus import cut
from tests.datamodules.text_files import blocks, numbered, ready, write

SHAKESPEARE = Path(__file__).parents[2].parent / "shared" / "data" / "text"


# ---- splits


@given(
    length=st.integers(0, 300_000),
    val=st.floats(0.0, 0.4),
    test=st.floats(0.0, 0.4),
)
@settings(max_examples=40, deadline=None)
def test_cut_keeps_every_token_once_and_in_order(length, val, test):
    tokens = np.arange(length, dtype=np.uint32)
    parts = cut(tokens, val, test)
    assert np.array_equal(np.sort(np.concatenate(parts)), tokens)
    assert all((np.diff(part.astype(np.int64)) > 0).all() for part in parts)
    assert abs(len(parts[1]) - val * length) <= 20
    assert abs(len(parts[2]) - test * length) <= 20


def test_cut_spreads_validation_over_a_long_text():
    _, val, test = cut(np.arange(400_000, dtype=np.uint32), 0.05, 0.05)
    for part in (val, test):
        assert np.array_equal(np.unique(part // 20_000), np.arange(20))


def test_default_corpus_splits_are_disjoint_english():
    data = ready()
    assert data.spec == {
        "kind": "text",
        "length": 128,
        "vocabulary": 256,
        "tokenizer": "bytes",
        "bytes_per_token": 1.0,
    }
    counts = [data.count(split) for split in ("train", "val", "test")]
    assert counts[0] > 2000
    assert 0.045 < counts[1] / sum(counts) < 0.055
    assert counts[1] == counts[2]
    text = "".join(data.decode(blocks(data, "val")))
    assert text.count(" the ") > 100


def test_own_validation_and_test_files_leave_the_training_text_whole(tmp_path):
    train, val, test = (write(tmp_path / name, text * 16) for name, text in (("a", "abcd"), ("b", "ef"), ("c", "g")))
    data = ready(path=train, val_path=val, test_path=test, length=4, windows="blocks")
    assert "".join(data.decode(blocks(data, "train"))) == "abcd" * 16
    assert "".join(data.decode(blocks(data, "val"))) == "ef" * 16
    assert "".join(data.decode(blocks(data, "test"))) == "g" * 16
    data = ready(path=train, val_path=val, length=3)
    assert (data.count("train"), data.count("test")) == (61 // 3, 1)


@given(content=st.binary(min_size=40, max_size=400).map(lambda b: b.replace(b"\0", b"\1")), length=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_bytes_round_trip(content, length, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("bytes") / "any.txt", content)
    data = ready(path=path, val_path=path, test_path=path, length=length)
    got = blocks(data, "val")
    assert got.dtype == torch.int64
    assert bytes(got.flatten().tolist()) == content[: len(content) // length * length]
    assert data.count("val") == len(content) // length


def test_remainder_is_dropped_and_reported(tmp_path, caplog):
    path = write(tmp_path / "text.txt", "x" * 1003)
    with caplog.at_level("INFO"):
        ready(path=path, val_path=path, test_path=path, length=10)
    assert "train 1003 (100 blocks, 3 dropped), val 1003 (100 blocks, 3 dropped)" in caplog.text


# ---- windows


def test_random_windows_are_stretches_of_the_training_text_and_change_with_the_epoch(tmp_path):
    text = numbered(500)
    data = ready(path=write(tmp_path / "lines.txt", text), length=16, seed=3)
    train = bytes(data._windows["train"][:: data.length].flatten().tolist()).decode()
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        windows = {
            index: row
            for batch in loader
            for index, row in zip(batch["index"].tolist(), data.decode(batch["x"]), strict=True)
        }
        assert len(windows) == len(loader) * 32
        assert all(row in train for row in windows.values())
        epochs.append(windows)
    assert epochs[0] == epochs[2]
    assert len({*epochs[0].values(), *epochs[1].values()}) > 1.8 * len(epochs[0])  # offsets are not block borders
    assert len({text.find(row) % 16 for row in epochs[0].values()}) == 16
    other = ready(path=str(tmp_path / "lines.txt"), length=16, seed=4)
    assert other.fetch("train", torch.arange(5), 0)["x"].ne(data.fetch("train", torch.arange(5), 0)["x"]).any()


def test_random_windows_reach_both_ends(tmp_path):
    path = write(tmp_path / "text.txt", bytes(range(1, 21)))
    data = ready(path=path, val_path=path, test_path=path, length=4)
    starts = {int(row[0]) for epoch in range(60) for row in data.fetch("train", torch.arange(5), epoch)["x"]}
    assert starts == set(range(1, 18))


def test_window_depends_on_its_index_alone(tmp_path):
    data = ready(length=32)
    together = data.fetch("train", torch.arange(10), 2)["x"]
    assert torch.equal(data.fetch("train", torch.tensor([7]), 2)["x"][0], together[7])


def test_examples_and_evaluation_are_fixed_blocks(tmp_path):
    data = TextDataModule(length=32, windows="random")
    batch = data.examples("train", 6)
    assert batch["x"].shape == (6, 32)
    assert torch.equal(batch["x"], blocks(data, "train")[batch["index"]])
    assert torch.equal(data.fetch("val", torch.arange(9), 5)["x"], blocks(data, "val")[:9])


def test_training_on_blocks_serves_each_once(tmp_path):
    data = ready(path=write(tmp_path / "t.txt", numbered(100)), length=8, windows="blocks", batch_size=5)
    loader = data.train_dataloader()
    rows = [row for batch in loader for row in data.decode(batch["x"])]
    assert len(rows) == len(set(rows)) == data.count("train") == 90


# ---- files


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "1.txt", "second")
    write(tmp_path / "a.txt", "first!")
    write(tmp_path / "c.txt", "")
    write(tmp_path / "readme.md", "not me")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["third", None, "row\n"]}), tmp_path / "d.parquet")
    data = ready(path=str(tmp_path), val_path=str(tmp_path), test_path=str(tmp_path), length=1, windows="blocks")
    assert "".join(data.decode(blocks(data, "val"))) == "first!secondthird\nrow\n"


def test_parquet_column(tmp_path):
    path = str(tmp_path / "rows.parquet")
    rows = [f"row {number} ü" for number in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"body": rows, "id": list(range(2500))}), path)
    data = ready(path=path, val_path=path, column="body", length=1)
    assert bytes(blocks(data, "val").flatten().tolist()).decode() == "".join(row + "\n" for row in rows)
    with pytest.raises(ValueError, match=r"rows.parquet has no column 'text': set column to one of body, id"):
        ready(path=path)
    with pytest.raises(ValueError, match=r"column 'id' of .*rows.parquet holds int64, not text"):
        ready(path=path, column="id")


def test_bin_file_stays_on_disk(tmp_path):
    path = str(tmp_path / "tokens.bin")
    tokens = np.arange(50_000, dtype="<u2")
    tokens.tofile(path)
    data = ready(path=path, tokenizer="gpt2", length=10, windows="blocks")
    assert data.spec["vocabulary"] == 50257
    assert data.spec["bytes_per_token"] is None
    base = data._windows["train"]
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    got = torch.cat([blocks(data, split).flatten() for split in ("train", "val", "test")])
    assert torch.equal(got, torch.arange(50_000))
    assert data.train_dataloader().fetch(torch.tensor([3]), 0)["x"].tolist() == [list(range(30, 40))]


@pytest.mark.skipif(not SHAKESPEARE.is_dir(), reason="no shared data beside this checkout")
def test_shakespeare():
    names = [str(SHAKESPEARE / f"shakespeare_{split}.txt") for split in ("train", "val", "test")]
    data = ready(path=names[0], val_path=names[1], test_path=names[2], length=256)
    assert [data.count(split) for split in ("train", "val", "test")] == [1343465 // 256, 74636 // 256, 74643 // 256]
    counts = blocks(data, "train").flatten().bincount(minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    assert float(-(share * share.log2()).sum()) == pytest.approx(4.763, abs=0.01)  # README of the data
    assert (counts > 0).sum() == 80
    characters = TextDataModule(
        path=names[0], val_path=names[1], test_path=names[2], tokenizer="characters", length=256
    )
    assert characters.spec["vocabulary"] == 80
    assert characters.decode(blocks(characters, "val")) == data.decode(blocks(data, "val"))


# ---- messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"val_fraction": 0.0}, "must be above 0 and sum to less than 1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "must be above 0 and sum to less than 1"),
        ({"tokenizer": "words"}, "no tokenizer 'words'"),
        ({"windows": "all"}, "windows must be random or blocks, got 'all'"),
        ({"tokenizer_path": "."}, "tokenizer_path is for tokenizer: gpt2"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**arguments)


@pytest.mark.parametrize("argument", ["path", "val_path", "test_path", "tokenizer_path"])
def test_missing_paths_are_found_at_construction(argument):
    arguments: dict[str, Any] = {argument: "nowhere/text.txt", "tokenizer": "gpt2"}
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: nowhere/text.txt"):
        TextDataModule(**arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty.txt is empty"),
        ("photo.jpg", b"abc", r"photo.jpg is not a text file"),
        ("data.txt", b"abc\0def", r"data.txt is not a text file"),
        ("odd.bin", b"abc", r"odd.bin has 3 bytes: a .bin file must hold uint16 tokens"),
        ("big.bin", b"\xff\xff" * 10, r"big.bin holds the token 65535 at position 0, outside the vocabulary of 256"),
        ("fake.parquet", b"abc", r"cannot read .*fake.parquet as parquet"),
        ("short.txt", b"abc", r"the train split of .*short.txt has 3 tokens, fewer than one block of length 128"),
        ("medium.txt", b"abc" * 100, r"the val split of .*medium.txt has 15 tokens, fewer than one block"),
    ],
)
def test_refused_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        ready(path=write(tmp_path / name, content))


def test_short_validation_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the test split of .*t.txt has 5 tokens"):
        ready(test_path=write(tmp_path / "t.txt", "short"))


def test_empty_parquet_is_named(tmp_path):
    path = str(tmp_path / "none.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ValueError, match=r"none.parquet is empty"):
        ready(path=path)
    with pytest.raises(ValueError, match=r"none.parquet is empty"):
        TextDataModule(path=path, tokenizer="characters")


def test_folder_without_text(tmp_path):
    write(tmp_path / "picture.png", b"x")
    with pytest.raises(FileNotFoundError, match=r"no .txt, .parquet or .jsonl files with content in the folder"):
        ready(path=str(tmp_path))
