"""Streams of documents: packing, shuffling, disjoint processes, exact continuation, data sets by name."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import spawn

from datamodules import TextDataModule, streaming
from datamodules.streaming import Packer, StreamLoader, hold_out, start
from datamodules.tokenizers import ByteTokenizer
from tests.callbacks.test_resume import Interrupt, differences, final, run
from tests.callbacks.tiny import module
from tests.datamodules.text_files import blocks, write


class Lists:
    """Shards in memory: their documents are lines without the line feed."""

    name = "lists"

    def __init__(self, sizes):
        numbers = iter(range(sum(sizes)))
        self.lists = [[f"{n}:".encode() + b"x" * (n * 7 % 5) for n in islice(numbers, size)] for size in sizes]
        self.shards = len(sizes)

    def documents(self, shard, skip, step):
        return iter(self.lists[shard][skip::step])

    @property
    def lines(self):
        return [text.decode() for part in self.lists for text in part]


def packer(shards, length=7, window=5, taken=None, seed=0):
    return Packer(shards, taken or [0] * shards.shards, ByteTokenizer(), length, window, seed)


def one_round(stream, ranks, lines, length):
    """The lines of the first round of a process."""
    size = sum(len(line) + 1 for line in lines)
    rows = [block for block, _ in islice(stream.blocks(start(), ranks), -(-size // length))]
    return np.concatenate(rows)[:size].tobytes().decode().splitlines()


SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


@given(sizes=SIZES, length=st.integers(1, 40), window=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_each_round_has_every_document_once_and_no_token_is_lost(sizes, length, window):
    shards = Lists(sizes)
    tokens = sum(len(line) + 1 for line in shards.lines)
    rows = [block for block, _ in islice(packer(shards, length, window).blocks(start()), 3 * tokens // length + 1)]
    assert {row.shape for row in rows} == {(length,)}
    text = np.concatenate(rows).tobytes().decode()
    for number in range(3):
        assert sorted(text[number * tokens : (number + 1) * tokens].splitlines()) == sorted(shards.lines)


def test_order_is_shuffled_and_depends_on_round_and_seed():
    shards = Lists([40, 40, 40])
    orders = [one_round(packer(shards, window=30, seed=seed), (0, 1), shards.lines, 7) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != shards.lines
    tokens = sum(len(line) + 1 for line in shards.lines)
    text = b"".join(block.tobytes() for block, _ in islice(packer(shards, window=30).blocks(start()), 2 * tokens // 7))
    assert text[:500] != text[tokens : tokens + 500]
    near = [abs(int(a.split(":")[0]) - int(b.split(":")[0])) for a, b in zip(orders[0], orders[0][1:], strict=False)]
    assert np.median(near) > 5  # neighbours come from all over a window


@given(sizes=SIZES, world=st.integers(1, 4), taken=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_processes_share_the_documents_of_a_round(sizes, world, taken):
    shards = Lists(sizes)
    held = [min(taken, size) for size in sizes]
    expected = [part[skip:] for part, skip in zip(shards.lists, held, strict=True)]
    stream = packer(shards, length=1, taken=held)
    found = []
    for rank in range(world):
        mine = [text for _, _, text in stream._documents(start(), (rank, world))]
        if mine:
            lines = one_round(stream, (rank, world), mine, 1)
            assert sorted(lines) == sorted(text.decode() for text in mine)
            found += lines
    assert sorted(found) == sorted(text.decode() for part in expected for text in part)


@given(sizes=SIZES, length=st.integers(1, 15), window=st.integers(1, 9), world=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_every_cursor_leads_on_exactly(sizes, length, window, world):
    shards = Lists([size + world for size in sizes])
    stream = packer(shards, length, window)
    ranks = (world - 1, world)
    run = list(islice(stream.blocks(start(), ranks), 30))
    for number, (_, cursor) in enumerate(run):
        cursor = json.loads(json.dumps(cursor))
        onward = [block.tolist() for block, _ in islice(stream.blocks(cursor, ranks), 5)]
        assert onward == [block.tolist() for block, _ in run[number + 1 : number + 6]] or number > 24


def test_process_without_documents_is_told():
    with pytest.raises(ValueError, match="lists has no documents for process 2 of 4"):
        next(packer(Lists([2])).blocks(start(), (2, 4)))


def test_held_out_documents_are_the_first_and_never_trained_on():
    shards = Lists([3, 1, 6])
    (val, test), taken = hold_out(shards, [2, 3])
    lines = [line.encode() for line in shards.lines]
    assert (val, test) == (lines[:2], lines[2:5])
    assert taken == [3, 1, 1]
    trained = one_round(packer(shards, taken=taken), (0, 1), shards.lines[5:], 7)
    assert sorted(trained) == sorted(shards.lines[5:])
    with pytest.raises(ValueError, match="lists has 10 documents and 11 are to be held out"):
        hold_out(shards, [11])


# ---- loader


def loader(ranks=(0, 1), examples=22, **options):
    return StreamLoader(packer(Lists([9, 9, 9])), examples, 3, ranks, **options)


def batches(stream, epochs, skip=0):
    found = []
    for epoch in epochs:
        stream.set_epoch(epoch)
        found += [(batch["index"].tolist(), batch["x"].tolist()) for batch in stream]
    return found[skip:]


def test_an_epoch_has_whole_batches_and_the_next_goes_on():
    stream = loader()
    assert len(stream) == 7
    found = batches(stream, [0, 1])
    assert len(found) == 14
    assert [row for index, _ in found[:7] for row in index] == list(range(21))
    expected = [block.tolist() for block, _ in islice(packer(Lists([9, 9, 9])).blocks(start()), 42)]
    assert [row for _, x in found for row in x] == expected


@pytest.mark.parametrize("exchange", [1, 3, 50])
@pytest.mark.parametrize("at", [1, 3, 6, 7, 8, 13, 14])
def test_loader_resumes_exactly(monkeypatch, exchange, at):
    monkeypatch.setattr(streaming, "_EXCHANGE", exchange)
    straight = batches(loader(), [0, 1, 2])
    stream = loader()
    for epoch in range(3):
        stream.set_epoch(epoch)
        for number, _ in enumerate(stream, start=epoch * 7 + 1):
            if number == at:
                state = json.loads(json.dumps(stream.state_dict()))
    again = loader()
    again.load_state_dict(state)
    assert again.state_dict() == state
    epochs = range((at - 1) // 7, 3)  # Lightning may begin with the epoch that ended ...
    assert batches(again, epochs) == straight[at:]
    if at % 7 == 0:
        again = loader()
        again.load_state_dict(state)
        assert batches(again, range(at // 7, 3)) == straight[at:]  # ... or with the next


def test_batch_whose_step_did_not_finish_comes_again():
    stream = loader(finished=lambda: 3)
    seen = iter(stream)
    found = [next(seen)["x"].tolist() for _ in range(4)]
    again = loader()
    again.load_state_dict(stream.state_dict())
    assert next(iter(again))["x"].tolist() == found[3]


def test_stream_that_fails_right_after_an_exchange_loses_nothing(monkeypatch):
    monkeypatch.setattr(streaming, "_EXCHANGE", 3)

    def broken():
        raise OSError("the network is gone")

    stream = loader(finished=lambda: 2)
    seen = iter(stream)
    found = [next(seen)["x"].tolist() for _ in range(3)]
    monkeypatch.setattr(stream, "_next", broken)
    with pytest.raises(OSError, match="gone"):
        next(seen)
    again = loader()
    again.load_state_dict(stream.state_dict())
    assert next(iter(again))["x"].tolist() == found[2]


def test_epoch_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="an epoch of 5 examples of a stream is less than one batch of 3 on each of 2"):
        len(loader((0, 2), examples=5))


def test_another_number_of_processes_is_refused():
    stream = loader()
    next(iter(stream))
    again = loader(ranks=(0, 2))
    again.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match="a stream goes on with as many processes as it was saved with: 1, not 2"):
        next(iter(again))


def _process(rank, folder, resume):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{resume}", rank=rank, world_size=2)
    streaming._EXCHANGE = 2
    stream = StreamLoader(packer(Lists([9, 9, 9])), 60, 3)
    if resume:
        stream.load_state_dict(torch.load(f"{folder}/state", weights_only=True))
    found = []
    for number, batch in enumerate(stream):
        found.append(batch["x"])
        if number == 4 and not resume and rank == 0:
            torch.save(stream.state_dict(), f"{folder}/state")
    torch.save(torch.stack(found), f"{folder}/{rank}{resume}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_resume_from_the_state_of_one(tmp_path):
    for resume in (False, True):
        spawn(_process, (str(tmp_path), resume), nprocs=2)
    whole, onward = ([torch.load(tmp_path / f"{rank}{resume}") for rank in (0, 1)] for resume in (False, True))
    for rank in (0, 1):
        assert len(whole[rank]) == 10
        assert torch.equal(onward[rank], whole[rank][5:])
    assert not torch.equal(whole[0], whole[1])


# ---- data sets by name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as the hub has it: three files of training documents, two of other splits."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = tmp_path / "texts"
    place.mkdir()
    for number in range(3):
        table = pyarrow.table({"text": [f"train {number} {row:02d}" for row in range(20)]})
        pyarrow.parquet.write_table(table, place / f"train-{number:05d}-of-00003.parquet")
    for split in ("validation", "test"):
        table = pyarrow.table({"text": [f"{split} {row:02d}" for row in range(9)]})
        pyarrow.parquet.write_table(table, place / f"{split}-00000-of-00001.parquet")
    return str(place)


def lines(data, split):
    return "".join(data.decode(blocks(data, split))).splitlines()


def made(**arguments: Any) -> TextDataModule:
    data = TextDataModule(**{"length": 1, "windows": "blocks", **arguments})
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("cached", [False, True])
def test_data_set_is_split_or_has_splits(folder, tmp_path, cached):
    cache = str(tmp_path / "cache") if cached else None
    data = made(dataset=folder, val_split="validation", test_split="test", cache=cache)
    assert lines(data, "train") == [f"train {number} {row:02d}" for number in range(3) for row in range(20)]
    assert lines(data, "val") == [f"validation {row:02d}" for row in range(9)]
    assert lines(data, "test") == [f"test {row:02d}" for row in range(9)]
    data = made(dataset=folder, cache=cache)
    assert lines(data, "train")[:50] == [f"train {number} {row:02d}" for number in range(3) for row in range(20)][:50]
    assert data.count("val") == data.count("test") == 33
    if cached:
        assert len(list((tmp_path / "cache").glob("*.tokens"))) == 3


def stream(folder, **arguments):
    data = made(dataset=folder, streaming=True, batch_size=2, stream_examples=330, held_out=2, **arguments)
    return data


def test_streamed_data_set(folder, tmp_path):
    data = stream(folder, length=2)
    assert lines(data, "val") == ["train 0 00", "train 0 01"]
    assert lines(data, "test") == ["train 0 02", "train 0 03"]
    assert data.spec["bytes_per_token"] == 1.0
    assert data.count("train") == 330
    trained = "".join(text for batch in data.train_dataloader() for text in data.decode(batch["x"]))
    all_lines = [f"train {number} {row:02d}" for number in range(3) for row in range(20)]
    assert sorted(trained.splitlines()[:56]) == all_lines[4:]
    first = data.examples("train", 5)
    assert first["x"].tolist() == [row.tolist() for b in islice(data.train_dataloader(), 3) for row in b["x"]][:5]
    data = stream(folder, val_split="validation", test_path=write(tmp_path / "t.txt", "own\n"))
    assert lines(data, "val") == [f"validation {row:02d}" for row in range(9)]
    assert lines(data, "test") == ["own"]
    assert data._packer is not None
    assert data._packer.taken == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 5, "limit_val_batches": 0}], ids=["whole", "limited"])
def test_training_on_a_stream_resumes_exactly(folder, tmp_path, monkeypatch, options):
    """Epochs of 8 or 5 batches through Lightning; a stop within an epoch, at its end and in the next."""
    monkeypatch.setattr(streaming, "_EXCHANGE", 3)

    def data():
        return TextDataModule(
            dataset=folder, streaming=True, batch_size=4, length=5, stream_examples=34, held_out=3, stream_window=7
        )

    run(tmp_path / "straight", module(), **options).fit(module(), data())
    for at in (2, 5, 6, 8, 9):
        place = tmp_path / f"{at}"
        with pytest.raises(SIGTERMException):
            run(place, module(), Interrupt("signal", at), **options).fit(module(), data())
        model = module(seed=1)
        run(place, model, **options).fit(model, data(), ckpt_path=str(place / "last.ckpt"))
        assert differences(final(tmp_path / "straight"), final(place)) == [], at


# ---- messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "x", "path": "."}, "give path or dataset, not both"),
        ({"dataset": "x", "val_path": ".", "val_split": "y"}, "give val_path or val_split, not both"),
        ({"val_split": "x"}, "belong to a data set: give its name as dataset"),
        ({"dataset_split": "x"}, "belong to a data set: give its name as dataset"),
        ({"streaming": True}, "streaming needs a dataset and a tokenizer with a fixed vocabulary"),
        ({"streaming": True, "dataset": "x", "tokenizer": "characters"}, "streaming needs a dataset and a tokenizer"),
        ({"held_out": 0}, "held_out must be at least 1"),
        ({"stream_window": 0}, "stream_window must be at least 1"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**arguments)


@pytest.mark.parametrize("streaming_", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_split": "dev"}, r"texts: .*\bdev\b.*\['train', 'validation', 'test'\]"),
        ({"dataset_config": "dev"}, r"texts: BuilderConfig 'dev' not found"),
        ({"column": "body"}, r"texts \(train\) has no column 'body': set column to one of text"),
    ],
)
def test_what_the_set_has_not(folder, streaming_, arguments, message):
    with pytest.raises(ValueError, match=message):
        made(dataset=folder, streaming=streaming_, held_out=1, **arguments)


def test_script_and_network(folder, tmp_path, monkeypatch):
    import datasets

    (tmp_path / "script").mkdir()
    write(tmp_path / "script" / "script.py", "raise SystemExit('this must never run')")
    with pytest.raises(
        ValueError, match=r"script is a script, and none is run here: try .*script@refs/convert/parquet"
    ):
        made(dataset=str(tmp_path / "script"))

    asked = []

    def offline(path, config, **options):
        asked.append((path, options["revision"]))
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        FileNotFoundError, match=r"data set a/b could not be reached \(no route\): check its name and the"
    ):
        made(dataset="a/b", streaming=True)
    with pytest.raises(FileNotFoundError):
        made(dataset="a/b@refs/x")
    assert asked == [("a/b", None), ("a/b", "refs/x")]


def test_stream_has_no_numbered_examples_and_does_not_overfit(folder):
    data = stream(folder)
    with pytest.raises(ValueError, match="the training examples of a stream have no numbers"):
        data.fetch("train", torch.arange(2), None)
