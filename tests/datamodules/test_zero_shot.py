"""Further corpora of a test run: names, detokenizers, loaders, messages."""

from __future__ import annotations

import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from datamodules import TextDataModule, hub, zero_shot
from datamodules.tokenizers import GPT2Tokenizer
from datamodules.zero_shot import lambada, lm1b, ptb, wikitext
from tests.datamodules.text_files import numbered, ready, write

# ---- detokenizers


@pytest.mark.parametrize(
    ("spaced", "plain"),
    [
        ("the 12 @-@ year @-@ old", "the 12-year-old"),
        ("1 @,@ 000 @.@ 5", "1,000.5"),
        ("Yes , no ; a : b . c ! d ? e", "Yes, no; a: b. c! d? e"),
        ("( a b ) [ c ] { d }", "(a b) [c] {d}"),
        ("he said \" go on \" and ' halt ' .", "he said \"go on\" and 'halt' ."),
        ("and ' stop ' .", "and'stop' ."),  # a quote before an s is taken for a genitive, as published
        (" = = = Title = = = \n", " === Title ===\n"),
        ("5 ° C", "5°C"),
        ("the boys ' books , it is", "the boys' books, it is"),
        ("the boys ' books , it 's", "the boys'books, it's"),  # two apostrophes are taken for quotes, as published
        ("a N b", "a 1 b"),
        ("", ""),
        (" . \n", ".\n"),
        ("sea ' 8 / ' 5", "sea '8 /' 5"),
    ],
)
def test_wikitext(spaced, plain):
    assert wikitext(spaced) == plain


@pytest.mark.parametrize(
    ("spaced", "plain"),
    [
        ("it 's the boys ' idea and did n't", "it's the boys' idea and didn't"),
        ("about $ N million N N N N to N", "about $1 million 1 1 1 1 to N"),  # the last one has no blank behind
        ("N first # N <unk>", "N first #1 ?"),
        ("1\\/2", "1/2"),
        ("a \n b", "a\nb"),
    ],
)
def test_ptb(spaced, plain):
    assert ptb(spaced) == plain


@pytest.mark.parametrize(
    ("spaced", "plain"),
    [
        ("see http : / / a or https : / / b", "see http://a or https://b"),
        ("It 's over . Then , he left .", "It's over. Then, he left."),
        ("Why ? He said ! Now ?", "Why? He said! Now?"),
        ("Stop !", "Stop!"),
        ("a : b ; c / d", "a: b; c/d"),
        ('" go on " ( x ) [ y ]', '"go on" (x) [y]'),
        ("$ 5 and £ 6", "$5 and £6"),
    ],
)
def test_lm1b(spaced, plain):
    assert lm1b(spaced) == plain


def test_lambada():
    assert lambada("  “ yes ” he said\n") == '\n" yes " he said'


# ---- own files


def test_test_split_and_corpora_in_one_run(tmp_path):
    text = write(tmp_path / "t.txt", numbered(200))
    write(tmp_path / "other.txt", "abcdef" * 20)
    np.arange(64, dtype="<u2").tofile(tmp_path / "ids.bin")
    corpora = [
        str(tmp_path / "other.txt"),
        f"ptb={write(tmp_path / 'x.txt', 'a N b' + chr(10))}",
        str(tmp_path / "ids.bin"),
    ]
    data = ready(path=text, corpora=corpora, length=6, batch_size=4)
    assert data.test_sets == ("", "other", "ptb", "ids")
    loaders = data.test_dataloader()
    assert isinstance(loaders, list)
    sets = dict(zip(data.test_sets, loaders, strict=True))
    batches = list(sets["other"])
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(20))
    assert "".join(data.decode(torch.cat([batch["x"] for batch in batches]))) == "abcdef" * 20
    assert data.decode(next(iter(sets["ptb"]))["x"]) == ["a 1 b\n"]
    assert torch.cat([batch["x"] for batch in sets["ids"]]).flatten().tolist() == list(range(60))
    assert len(sets[""]) == len(data.eval_loader("test"))
    assert [data.bytes_per_token_of(name) for name in data.test_sets] == [1.0] * 4


def test_without_corpora_there_is_one_loader(tmp_path):
    data = ready(path=write(tmp_path / "t.txt", numbered(200)), length=6)
    assert data.test_sets == ("",)
    assert not isinstance(data.test_dataloader(), list)


def test_own_copies_of_the_sets_are_restored_line_by_line(tmp_path, small_gpt2):
    lines = [" = cat = \n", "\n", "the cat , the mat \n"]
    write(tmp_path / "wiki.test.raw", "".join(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": [lines[0], "", lines[2]]}), tmp_path / "wiki.parquet")
    write(tmp_path / "l.jsonl", json.dumps({"text": " “ the cat ” "}) + "\n")
    corpora = [
        f"wikitext2={tmp_path}/wiki.test.raw",
        f"wikitext103={tmp_path}/wiki.parquet",
        f"lambada={tmp_path}/l.jsonl",
    ]
    text = write(tmp_path / "t.txt", "the cat sat on the mat" * 50)
    data = ready(path=text, corpora=corpora, length=1, tokenizer="gpt2", tokenizer_path=small_gpt2)
    end = "<|endoftext|>"
    found = {}
    for name, loader in zip(data.test_sets, data.test_dataloader(), strict=True):
        found[name] = "".join(text for batch in loader for text in data.decode(batch["x"]))
    wiki = f" = cat =\n{end}{end}the cat, the mat\n{end}"
    assert found["wikitext2"] == found["wikitext103"] == wiki
    assert found["lambada"] == f'\n" the cat "{end}'
    tokens = len(GPT2Tokenizer(small_gpt2).encode([b" = cat =\n", b"", b"the cat, the mat\n"]))
    assert data.bytes_per_token_of("wikitext2") == pytest.approx(len(wiki.replace(end, "")) / tokens)
    assert data.bytes_per_token_of("") == data.spec["bytes_per_token"]


def test_corpora_are_cached_and_read_when_asked_for(tmp_path, monkeypatch):
    text = write(tmp_path / "t.txt", numbered(200))
    other = write(tmp_path / "o.txt", "a N b\n")
    data = ready(path=text, corpora=[f"ptb={other}"], length=2, cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("*.tokens"))) == 1
    data.test_dataloader()
    assert len(list((tmp_path / "cache").glob("*.tokens"))) == 2
    again = ready(path=text, corpora=[f"lm1b={other}"], length=2, cache=str(tmp_path / "cache"))
    assert again.decode(next(iter(again.test_dataloader()[1]))["x"][1:3]) == ["N ", "b\n"]  # not ptb's


# ---- messages


@pytest.mark.parametrize(
    ("corpora", "error", "message"),
    [
        (
            ["nowhere.txt"],
            FileNotFoundError,
            "no such file or folder: nowhere.txt; sets known by name: lambada, wikitext2",
        ),
        (["ptb=nowhere.txt"], FileNotFoundError, "no such file or folder: nowhere.txt"),
        (["ptb", "ptb"], ValueError, "corpora need a name of their own each: write ptb as another_name=ptb"),
    ],
)
def test_refused_corpora(corpora, error, message):
    with pytest.raises(error, match=message):
        TextDataModule(corpora=corpora)


def test_short_corpus_is_named(tmp_path):
    data = ready(path=write(tmp_path / "t.txt", numbered(200)), corpora=[write(tmp_path / "o.txt", "ab")], length=5)
    with pytest.raises(ValueError, match="o has 2 tokens, fewer than one block of length 5"):
        data.test_dataloader()


@pytest.mark.parametrize("name", list(zero_shot.ZERO_SHOT))
def test_set_out_of_reach_says_how_to_give_files(tmp_path, monkeypatch, name):
    datasets = pytest.importorskip("datasets")
    asked: dict[str, str] = {}

    def offline(path, config, **options):
        asked.update(options, path=path)
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    data = ready(path=write(tmp_path / "t.txt", numbered(200)), corpora=[name], length=5)
    message = rf"could not be reached \(Couldn't reach the hub\).*or give files of your own: corpora: \[{name}="
    with pytest.raises(FileNotFoundError, match=message):
        data.test_dataloader()
    assert asked["path"] in ("json", "parquet")
    split = "train-" if name == "wikitext2" else "test"  # the paper's choice
    assert split in asked["data_files"]


def test_set_of_the_hub_is_read_by_a_general_builder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a N b", "it 's"]}), tmp_path / "p.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    known = zero_shot.ZeroShotSet("parquet", str(tmp_path / "p.parquet"), "sentence", ptb)
    monkeypatch.setitem(zero_shot.ZERO_SHOT, "ptb", known)
    data = ready(path=write(tmp_path / "t.txt", numbered(200)), corpora=["ptb"], length=2)
    loader = data.test_dataloader()[1]
    assert "".join(text for batch in loader for text in data.decode(batch["x"])) == "a 1 b\nit's\n"[:10]


def test_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the datasets library: pip install 'lightning_sgm\[text\]'"):
        hub.HubRows("x", None, "train", "text")
