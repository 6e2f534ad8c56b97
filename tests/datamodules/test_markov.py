"""Markov chains: their law as the spec says it, their entropy by enumeration, their sequences by counting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from datamodules import MarkovDataModule
from datamodules.base import SPLITS, Split
from datamodules.tokenizers import tokenizer_for
from tests.samplers.test_unmasking import assert_law


def law_of(spec):
    return (torch.tensor(spec[name], dtype=torch.float64) for name in ("transition", "stationary"))


@pytest.mark.parametrize("states", [2, 8, 52])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0, 6.0])
def test_the_spec_is_a_stationary_chain(states, sharpness):
    for law in range(20):
        transition, stationary = law_of(MarkovDataModule(states, sharpness=sharpness, law=law).spec)
        assert transition.shape == (states, states)
        assert (transition > 0).all()
        assert (stationary > 0).all()
        torch.testing.assert_close(transition.sum(1), torch.ones(states, dtype=torch.float64))
        assert stationary.sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(stationary @ transition, stationary, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_entropy_is_that_of_all_sequences(length):
    spec = MarkovDataModule(3, length, law=4).spec
    transition, stationary = (table.tolist() for table in law_of(spec))
    total = 0.0
    for x in itertools.product(range(3), repeat=length):
        p = stationary[x[0]] * math.prod(transition[a][b] for a, b in itertools.pairwise(x))
        total -= p * math.log(p)
    assert spec["entropy"] == pytest.approx(total / length, rel=1e-12)


def test_sharpness_goes_from_independence_to_a_narrow_law():
    entropies = [MarkovDataModule(sharpness=s).spec["entropy"] for s in (0.0, 1.0, 3.0, 6.0)]
    assert entropies[0] == pytest.approx(math.log(8), rel=1e-12)
    assert all(a - b > 0.2 for a, b in itertools.pairwise(entropies))


@pytest.mark.parametrize("split", SPLITS)
def test_sequences_follow_the_law(split):
    data = MarkovDataModule(5, length=20, law=2)
    transition, stationary = law_of(data.spec)
    x = data.fetch(split, torch.arange(40_000), 3)["x"]
    assert x.dtype == torch.int64
    assert x.shape == (40_000, 20)
    for i in (0, 7, 19):
        counts = torch.bincount(x[:, i], minlength=5)
        assert_law(counts, stationary)
    for i, apart in ((0, 1), (18, 1), (4, 3)):
        law = (stationary[:, None] * torch.linalg.matrix_power(transition, apart)).flatten()
        counts = torch.bincount(5 * x[:, i] + x[:, i + apart], minlength=25)
        assert_law(counts, law)
    log_law = stationary.log()[x[:, 0]] + transition.log()[x[:, :-1], x[:, 1:]].sum(1)
    error = (log_law / 20).std().item() / 200
    assert -log_law.mean().item() / 20 == pytest.approx(data.spec["entropy"], abs=4 * error)


def test_training_is_endless_and_evaluation_fixed():
    index = torch.arange(100)
    one, other = MarkovDataModule(seed=1), MarkovDataModule(seed=2)
    train = [data.fetch("train", index, epoch)["x"] for data in (one, other) for epoch in (0, 1)]
    names: tuple[Split, ...] = ("val", "test")
    splits = [one.fetch(split, index, None)["x"] for split in names]
    different = torch.cat([*train, *splits])
    assert len(different.unique(dim=0)) == 600
    assert torch.equal(one.fetch("train", index, None)["x"], train[0])
    for split, x in zip(names, splits, strict=True):
        assert torch.equal(other.fetch(split, index, None)["x"], x)
        assert torch.equal(one.fetch(split, index[50:], None)["x"], x[50:])
        assert not torch.equal(MarkovDataModule(law=1).fetch(split, index, None)["x"], x)


def test_loaders_and_letters():
    data = MarkovDataModule(30, length=10, sequences=70, val_sequences=5, test_sequences=7, batch_size=32)
    assert data.spec["vocabulary"] == 30
    assert [len(batch["x"]) for batch in data.train_dataloader()] == [32, 32]
    assert [data.count(split) for split in SPLITS] == [70, 5, 7]
    (batch,) = data.val_dataloader()
    assert batch["x"].shape == (5, 10)
    tokenizer = tokenizer_for(data.spec["tokenizer"])
    assert tokenizer.vocabulary == 30
    text = tokenizer.raw(batch["x"][0].numpy().astype("uint8"))
    assert len(text) == 10
    assert text.isalpha()
    assert tokenizer.encode_text(text.decode()).tolist() == batch["x"][0].tolist()


@pytest.mark.parametrize(
    "arguments",
    [{"states": 1}, {"states": 53}, {"length": 0}, {"sharpness": -1.0}, {"sharpness": 7.0}, {"sequences": 0}],
)
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MarkovDataModule(**arguments)
