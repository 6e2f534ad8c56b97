"""What masked models are worth and what they draw, against exact laws: chains, wrong models, rare tokens.

With exact conditionals every order of the tokens gives the same law, so an order that is not followed goes unseen.
Hence also a model whose conditionals fit no joint law: there every order has its own, by enumeration.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from datamodules import MarkovDataModule
from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.networks import ExactMarkov
from lightning_sgm.networks.base import TokenNetwork
from lightning_sgm.objectives.masked import MaskedObjective
from lightning_sgm.processes.absorbing import AbsorbingProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers.unmasking import UnmaskingSampler
from tests.oracles import ConstantOracle, JointOracle, oracle_denoiser
from tests.samplers.test_unmasking import assert_law, blank

V, L = 3, 4
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))
LOSSES = ("t_DSE", "t_DCE", "lambda_DCE", "k_DCE")
ORDERS = ("random", "forward", "backward", [2, 0, 3, 1], [1, 3, 0, 2])


class Whimsical(TokenNetwork):
    """Conditionals of no joint law: a table of strong preferences, one row per pattern of tokens and masks."""

    def __init__(self):
        super().__init__()
        self.vocabulary = V
        self.table = 2.0 * Draw(1).normal(((V + 1) ** L, L, V), torch.float64)

    def forward(self, x, positions=None):
        answer = self.table[(x * (V + 1) ** torch.arange(L - 1, -1, -1)).sum(1)].log_softmax(-1)
        return answer if positions is None else answer.flatten(0, 1)[positions]


def law_of_order(network, order):
    """Law (81,) of sequences whose tokens are drawn in this order, one by one."""
    x, law = torch.full_like(SEQUENCES, V), torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for i in order:
        law += network(x)[:, i].gather(1, SEQUENCES[:, i, None])[:, 0]
        x[:, i] = SEQUENCES[:, i]
    return law.exp()


def law_of_all_orders(network):
    return sum(law_of_order(network, order) for order in itertools.permutations(range(L))) / math.factorial(L)


def counts_of(x):
    return torch.bincount((x * V ** torch.arange(L - 1, -1, -1)).sum(1), minlength=V**L)


def law_named(network, order):
    if order == "random":
        return law_of_all_orders(network)
    named = {"forward": range(L), "backward": range(L)[::-1]}
    return law_of_order(network, named[order] if isinstance(order, str) else order)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_each_order_draws_from_its_own_law(order):
    network = Whimsical()
    sampler = UnmaskingSampler(rule="any_order", order=order)
    counts = counts_of(sampler(oracle_denoiser(network), blank(20_000), Draw(2)))
    assert_law(counts, law_named(network, order))
    for other in ORDERS:
        if other != order:  # the laws differ enough to be told apart
            with pytest.raises(AssertionError):
                assert_law(counts, law_named(network, other))


@pytest.mark.parametrize("rule", ["tweedie", "euler"])
def test_many_steps_draw_from_the_average_over_orders_and_one_step_from_the_marginals(rule):
    network = Whimsical()
    counts = counts_of(UnmaskingSampler(50_000, rule)(oracle_denoiser(network), blank(20_000), Draw(3)))
    assert_law(counts, law_of_all_orders(network))
    counts = counts_of(UnmaskingSampler(1, rule)(oracle_denoiser(network), blank(20_000), Draw(3)))
    marginals = network(blank(1))[0].exp()
    assert_law(counts, torch.einsum("a,b,c,d->abcd", *marginals).flatten())


def test_two_steps_draw_tokens_together_that_do_not_see_each_other():
    network = Whimsical()
    law = torch.zeros(V**L, dtype=torch.float64)
    for first in itertools.product(
        [True, False], repeat=L
    ):  # every position is revealed in step 1 with probability 1/2
        now, x = torch.tensor(first), torch.full_like(SEQUENCES, V)
        token = SEQUENCES[:, :, None]
        probability = network(x).gather(2, token)[:, :, 0][:, now].sum(1)
        x[:, now] = SEQUENCES[:, now]
        probability = probability + network(x).gather(2, token)[:, :, 0][:, ~now].sum(1)
        law += probability.exp() / 2**L
    counts = counts_of(UnmaskingSampler(2)(oracle_denoiser(network), blank(20_000), Draw(4)))
    assert_law(counts, law)
    with pytest.raises(AssertionError):
        assert_law(counts, law_of_all_orders(network))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_with_true_conditionals_every_order_draws_the_chain(order):
    spec = MarkovDataModule(V, L).spec
    transition, stationary = (torch.tensor(spec[name], dtype=torch.float64) for name in ("transition", "stationary"))
    joint = torch.einsum("a,ab,bc,cd->abcd", stationary, transition, transition, transition).flatten()
    sampler = UnmaskingSampler(rule="any_order", order=order)
    x = sampler(TokenDenoiser(ExactMarkov(spec), AbsorbingProcess(), V), blank(20_000), Draw(5))
    assert_law(counts_of(x), joint)


@pytest.mark.parametrize("arguments", [{"rule": "any_order"}, {"steps": 20_000}], ids=["any_order", "many steps"])
def test_pairs_of_letters_come_as_often_as_in_the_chain(arguments):
    data = MarkovDataModule(8, 24)
    transition, stationary = (torch.tensor(data.spec[n], dtype=torch.float64) for n in ("transition", "stationary"))
    denoiser = TokenDenoiser(ExactMarkov(data.spec), AbsorbingProcess(), 8)
    x = UnmaskingSampler(**arguments)(denoiser, blank(4000, 24, 8), Draw(6))
    for i, apart in ((0, 1), (11, 1), (22, 1), (0, 2), (9, 5), (0, 23)):
        law = (stationary[:, None] * torch.linalg.matrix_power(transition, apart)).flatten()
        assert_law(torch.bincount(8 * x[:, i] + x[:, i + apart], minlength=64), law)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("states", [3, 8])
def test_exact_conditionals_cost_the_entropy(states, loss):
    data = MarkovDataModule(states, 16, law=1)
    denoiser = TokenDenoiser(ExactMarkov(data.spec), AbsorbingProcess(), states)
    objective, draw, found = MaskedObjective(loss), Draw(7), []
    for epoch in range(40):
        x = data.fetch("train", torch.arange(1000), epoch)["x"]
        found.append(objective(denoiser, x, draw)["nll"].double().mean())
    means = torch.stack(found)
    error = means.std().item() / math.sqrt(len(means))
    assert error < 0.012 * data.spec["entropy"]
    # The times below t_min = 1e-3 are worth at most about ln V / 1000 per token.
    assert means.mean().item() == pytest.approx(data.spec["entropy"], abs=4 * error + 0.002)


def any_order_nll(network):
    """(81,) the mean over orders of the negative log-likelihoods of all sequences, nats: radd.md 2.3 over subsets."""
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for k in range(1, L + 1):
        for masked in itertools.combinations(range(L), k):
            x = SEQUENCES.clone()
            x[:, masked] = V
            n = -network(x).log_softmax(-1).gather(2, SEQUENCES[:, :, None])[:, :, 0]
            total += n[:, masked].sum(1) / (k * math.comb(L, k))
    return total


def test_the_any_order_bound_of_all_sequences():
    """The formula is the mean over orders, the losses have it as their mean, and true conditionals make it exact."""
    network = Whimsical()
    bound = any_order_nll(network)
    orders = [law_of_order(network, order).log() for order in itertools.permutations(range(L))]
    torch.testing.assert_close(bound, -torch.stack(orders).mean(0))
    assert (bound >= -law_of_all_orders(network).log()).all()  # Jensen
    objective, draw = MaskedObjective("k_DCE"), Draw(8)
    draws = torch.stack([objective(oracle_denoiser(network), SEQUENCES, draw)["loss"] for _ in range(3000)]).double()
    z = (draws.mean(0) - bound) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 5
    assert z.square().mean() < 1.7
    joint = torch.rand(V**L, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4 + 1e-3
    joint = joint / joint.sum()
    torch.testing.assert_close(any_order_nll(JointOracle(joint.view((V,) * L))), -joint.log())


class FirstStep(Draw):
    """All positions are revealed in the first of N steps."""

    def __init__(self, seed, steps):
        super().__init__(seed)
        self.scale = 1.0 / steps

    def uniform(self, shape, dtype=torch.float32):
        scale, self.scale = self.scale, 1.0
        return scale * super().uniform(shape, dtype)


@pytest.mark.parametrize("steps", [128, 1024, 4096])
def test_rare_tokens_come_in_the_first_step_too(steps):
    # Where reveal and token are drawn at once with 24 random bits, and probabilities stored in float16 (radd.md 2.7),
    # the first step knows 22812, 2871 and 718 of these tokens.
    possible = {128: 22812, 1024: 2871, 4096: 718}[steps]
    probs = 1.0 / torch.arange(1, 50258, dtype=torch.float64)
    probs /= probs.sum()
    oracle = ConstantOracle(probs)
    x = UnmaskingSampler(steps)(oracle_denoiser(oracle), blank(2, 400, 50257), FirstStep(9, steps)).flatten()
    assert oracle.calls == 1
    beyond = probs[possible:].sum().item()
    error = math.sqrt(beyond * (1 - beyond) / len(x))
    assert (x >= possible).double().mean().item() == pytest.approx(beyond, abs=4 * error)
    surprise = -probs.log()[x]
    assert surprise.mean().item() == pytest.approx(7.566, abs=3 * surprise.std().item() / math.sqrt(len(x)))
