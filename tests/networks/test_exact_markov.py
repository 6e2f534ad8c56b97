"""The closed form against enumeration and forward-backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from datamodules import MarkovDataModule, TextDataModule
from lightning_sgm.networks import ExactMarkov
from lightning_sgm.random import Draw
from tests.oracles import JointOracle, MarkovOracle


def joint_law(spec):
    """Probabilities (V,) * L of all sequences, by the product of transitions."""
    transition = torch.tensor(spec["transition"], dtype=torch.float64)
    joint = torch.tensor(spec["stationary"], dtype=torch.float64)
    for _ in range(spec["length"] - 1):
        joint = joint[..., None] * transition
    return joint


@pytest.mark.parametrize("law", range(4))
def test_conditionals_are_those_of_the_joint_law(law):
    spec = MarkovDataModule(3, length=4, law=law).spec
    oracle = JointOracle(joint_law(spec))
    x = torch.tensor(list(itertools.product(range(4), repeat=4)))  # every pattern of tokens and masks
    found = ExactMarkov(spec)(x).exp()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.sum(-1), torch.ones(256, 4, dtype=torch.float64))
    masked = x == 3
    torch.testing.assert_close(found[masked], oracle.conditionals(x)[masked], rtol=1e-10, atol=1e-14)
    for i in range(4):  # an unmasked token does not speak for itself
        hidden = x.clone()
        hidden[:, i] = 3
        torch.testing.assert_close(found[:, i], oracle.conditionals(hidden)[:, i], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("states", "length"), [(2, 1), (5, 17), (52, 130)])
def test_long_sequences_agree_with_forward_backward(states, length):
    spec = MarkovDataModule(states, length).spec
    draw = Draw(0)
    x = draw.integers(states, (32, length))
    x = x.masked_fill(draw.uniform((32, length)) < torch.linspace(0, 1.01, 32)[:, None], states)
    oracle = MarkovOracle(torch.tensor(spec["transition"], dtype=torch.float64))
    network = ExactMarkov(spec)
    torch.testing.assert_close(network(x).exp(), oracle.conditionals(x), rtol=1e-8, atol=1e-12)
    positions = (x == states).flatten().nonzero().squeeze(1)
    torch.testing.assert_close(network(x, positions), network(x).flatten(0, 1)[positions], rtol=0, atol=0)
    short = x[:, : length // 2 + 1]
    torch.testing.assert_close(network(short).exp(), oracle.conditionals(short), rtol=1e-8, atol=1e-12)


def test_impossible_steps_have_no_probability_and_stay_finite():
    spec = {"vocabulary": 2, "length": 4, "transition": [[0.0, 1.0], [0.5, 0.5]], "stationary": [1 / 3, 2 / 3]}
    network = ExactMarkov(spec)
    answer = network(torch.tensor([[0, 2, 0, 2], [0, 0, 2, 2], [2, 0, 2, 1]]))
    assert answer.isfinite().all()
    probability = answer.exp()
    assert probability[0, 1].tolist() == [0.0, 1.0]
    assert probability[0, 3].tolist() == [0.0, 1.0]
    assert probability[2, 0].tolist() == [0.0, 1.0]
    assert probability[2, 2].tolist() == [0.0, 1.0]
    torch.testing.assert_close(probability[1, 3], torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="ExactMarkov needs 'transition'"):
        ExactMarkov(TextDataModule().spec)
    with pytest.raises(ValueError, match="up to 4 tokens, got 5"):
        ExactMarkov(MarkovDataModule(3, 4).spec)(torch.zeros(1, 5, dtype=torch.long))


def test_there_is_nothing_to_train_or_to_store():
    network = ExactMarkov(MarkovDataModule(3, 4).spec)
    assert list(network.parameters()) == []
    assert network.state_dict() == {}
