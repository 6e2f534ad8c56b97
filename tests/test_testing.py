"""The public checks must accept our parts (here and in the tests of each room) and refuse broken ones."""

import pytest
import torch
from torch import nn

from lightning_sgm.networks.base import Network, TokenNetwork
from lightning_sgm.processes.gaussian import VE, VP, Flow, SubVP
from lightning_sgm.samplers.rules import (
    Ancestral,
    DPMpp2M,
    Euler,
    EulerMaruyama,
    Heun,
    ReverseDiffusion,
    Rule,
    euler,
)
from lightning_sgm.testing import check_network, check_process, check_rule

IMAGES = {"kind": "image", "shape": [2, 4, 4], "classes": 3, "levels": 256, "range": [-1.0, 1.0]}
GRAPHS = {"kind": "graph", "nodes": 6, "features": 3, "bonds": 1}
TEXT = {"kind": "text", "length": 6, "vocabulary": 5, "tokenizer": "bytes"}


# Rules.


@pytest.mark.parametrize("process", [VP(), VE(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("rule", [Euler(), DPMpp2M(), Heun(), Ancestral()], ids=lambda r: type(r).__name__)
def test_shipped_rules_pass(rule, process):
    check_rule(rule, process, steps=100, tolerance=0.04)


@pytest.mark.parametrize(
    "rule", [EulerMaruyama(), ReverseDiffusion(), Heun(churn=0.05)], ids=lambda r: type(r).__name__
)
def test_rules_of_the_sde_pass(rule):
    check_rule(rule, steps=120, tolerance=0.05)


def test_the_probability_flow_predictor_is_of_first_order():
    check_rule(ReverseDiffusion(deterministic=True), tolerance=0.12)
    check_rule(ReverseDiffusion(deterministic=True), steps=400, tolerance=0.06)
    with pytest.raises(AssertionError, match="ReverseDiffusion on VP leaves the probability-flow ODE"):
        check_rule(ReverseDiffusion(deterministic=True), steps=50, tolerance=0.12)


class InPlace(Euler):
    def __call__(self, evaluate, x, level, target, draw, memory):
        step = super().__call__(evaluate, x, level, target, draw, memory)[0]
        x.copy_(step)
        return x, x, memory


class Remembers(Euler):
    calls = 0

    def __call__(self, evaluate, x, level, target, draw, memory):
        self.calls += 1
        x, mean, memory = super().__call__(evaluate, x, level, target, draw, memory)
        return x * (1 + 1e-3 * self.calls), mean, memory


class Mixes(Euler):
    def __call__(self, evaluate, x, level, target, draw, memory):
        x, mean, memory = super().__call__(evaluate, x, level, target, draw, memory)
        return x + 1e-3 * x.mean(), mean, memory


class Overshoots(Rule):
    def __call__(self, evaluate, x, level, target, draw, memory):
        x = euler(x, 1.02 * evaluate(x, level), level, target)
        return x, x, memory


class TooNoisy(Ancestral):
    def __call__(self, evaluate, x, level, target, draw, memory):
        x, mean, memory = super().__call__(evaluate, x, level, target, draw, memory)
        return mean + 1.2 * (x - mean), mean, memory


class Biased(Ancestral):
    def __call__(self, evaluate, x, level, target, draw, memory):
        x, mean, memory = super().__call__(evaluate, x, level, target, draw, memory)
        return x + 0.005, mean, memory


class Infinite(Euler):
    def __call__(self, evaluate, x, level, target, draw, memory):
        return x / 0.0, x, memory


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (InPlace(), "changes its input in place"),
        (Remembers(), "two equal runs differ"),
        (Mixes(), "depends on its batch"),
        (Overshoots(), "leaves the probability-flow ODE"),
        (TooNoisy(), "covariance of the samples"),
        (Biased(), "mean of the samples"),
        (Infinite(), "not finite"),
    ],
)
def test_broken_rules_are_refused(rule, message):
    with pytest.raises(AssertionError, match=message):
        check_rule(rule, VE(), steps=60)


# Processes.


class Cancels(VP):
    def sigma(self, t):
        return torch.sqrt(1 - torch.exp(-self.integral(t)))


class Turns(VE):
    def sigma(self, t):
        return super().sigma(0.7 - (t - 0.7).abs())


class Single(VP):
    def alpha(self, t):
        return super().alpha(t).float()


class Flattens(VP):
    def sigma(self, t):
        return super().sigma(t).flatten()


class WrongInverse(VP):
    def t_from_log_snr(self, log_snr):
        return super().t_from_log_snr(log_snr) * 0.999


class Unclamped(Flow):
    def t_from_log_snr(self, log_snr):
        return super().t_from_log_snr(log_snr) * 1.0000001


class WrongDrift(VP):
    def drift(self, t):
        return 2 * super().drift(t)


class WrongDiffusion(SubVP):
    def diffusion(self, t):
        return VP.diffusion(VP(), t)


class WrongTransition(VP):
    def transition(self, s, t):
        return t.alpha / s.alpha, t.sigma


class WrongPosterior(VP):
    def posterior(self, x0, x, level, target):
        mean, std = super().posterior(x0, x, level, target)
        return mean, std * 1.01


class WrongMean(VP):
    def posterior(self, x0, x, level, target):
        mean, std = super().posterior(x0, x, level, target)
        return mean + 0.001 * x0 * target.sigma, std


class WrongPrior(VE):
    def prior(self, shape, draw):
        return draw.normal(shape)


class StartsClean(VP):
    t_min = 0.0


class Grows(VP):
    def alpha(self, t):
        return 1 / super().alpha(t)


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (Cancels(), "Cancels.sigma loses digits in float32"),
        (Turns(), "sigma / alpha does not increase"),
        (Single(), "alpha of float64 times is torch.float32"),
        (Flattens(), "sigma of times of shape"),
        (WrongInverse(), "t_from_log_snr is not the inverse"),
        (Unclamped(), "must stay in \\[0, 1\\]"),
        (WrongDrift(), "drift does not carry the mean"),
        (WrongDiffusion(), "diffusion does not carry the variance"),
        (WrongTransition(), "transition does not carry sigma"),
        (WrongPosterior(), "posterior std"),
        (WrongMean(), "posterior mean"),
        (WrongPrior(), "prior must be"),
        (StartsClean(), "sigma must be positive from t_min"),
        (Grows(), "alpha increases somewhere"),
    ],
)
def test_broken_processes_are_refused(process, message):
    with pytest.raises(AssertionError, match=message):
        check_process(process)


# Networks.


class Good(Network):
    conditions: tuple[str, ...] = ("label",)

    def __init__(self, spec):
        super().__init__()
        channels = spec["shape"][0]
        self.first, self.last = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.noise, self.kind = nn.Linear(1, 8), nn.Embedding(spec["classes"] + 1, 8)
        nn.init.zeros_(self.last.weight)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, noise, /, label):
        shift = self.noise(noise[:, None]) + self.kind(label)
        return self.last(self.drop(torch.tanh(self.first(x) + shift[:, :, None, None])))


class BatchNormed(Good):
    def forward(self, x, noise, /, label):
        return super().forward(x, noise, label) - x.mean()


class Idle(Good):
    def __init__(self, spec):
        super().__init__(spec)
        self.spare = nn.Linear(3, 3)


class Crops(Good):
    def forward(self, x, noise, /, label):
        return super().forward(x, noise, label)[..., 1:]


class Explodes(Good):
    def forward(self, x, noise, /, label):
        return super().forward(x, noise, label) / 0.0


class Tokens(TokenNetwork):
    def __init__(self, spec):
        super().__init__()
        self.embed = nn.Embedding(spec["vocabulary"] + 1, 8)
        self.head = nn.Linear(8, spec["vocabulary"])

    def forward(self, x, positions=None):
        hidden = self.embed(x) + self.embed(x).mean(1, keepdim=True)
        return self.head(hidden if positions is None else hidden.flatten(0, 1)[positions])


class ByRow(Tokens):
    def forward(self, x, positions=None):
        return super().forward(x, None if positions is None else positions % x.shape[1])


class Maskless(Tokens):
    def __init__(self, spec):
        super().__init__(spec)
        self.embed = nn.Embedding(spec["vocabulary"], 8)


def test_good_networks_pass_and_are_not_changed():
    check_network(Good, IMAGES)
    check_network(Tokens, TEXT)
    network = Good(IMAGES)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    check_network(network, IMAGES)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("network", "spec", "message"),
    [
        (BatchNormed, IMAGES, "alone gives another answer"),
        (Idle, IMAGES, "no gradient reaches the parameter spare.weight"),
        (Crops, IMAGES, "returned shape"),
        (Explodes, IMAGES, "not finite"),
        (ByRow, TEXT, "logits at positions"),
    ],
)
def test_broken_networks_are_refused(network, spec, message):
    with pytest.raises(AssertionError, match=message):
        check_network(network, spec)


def test_a_token_network_must_know_the_mask():
    with pytest.raises(IndexError):
        check_network(Maskless, TEXT)


def test_frozen_parameters_need_no_gradient_and_conditions_can_be_given():
    network = Idle(IMAGES)
    network.spare.requires_grad_(False)
    check_network(network, IMAGES, conditions={"label": torch.tensor([1, 1, 2])})
    network.conditions = ("label", "low")
    with pytest.raises(ValueError, match="asks for the condition 'low'"):
        check_network(network, IMAGES)
    with pytest.raises(ValueError, match="kind image, text, graph and molecule"):
        check_network(Good(IMAGES), {"kind": "series"})


class Graphs(Network):
    conditions = ("node_mask",)

    def __init__(self, spec):
        super().__init__()
        self.nodes, self.pairs = nn.Linear(spec["features"], spec["features"]), nn.Linear(2, 1)

    def forward(self, state, label, /, node_mask):
        x, adj = state["x"], state["adj"]
        both = node_mask[:, :, None] & node_mask[:, None, :] & ~torch.eye(len(adj[0]), dtype=torch.bool)
        pairs = self.pairs(torch.stack([adj, adj @ adj], -1)).squeeze(-1)
        return {"x": torch.tanh(self.nodes(adj @ x)) * node_mask[..., None], "adj": (pairs + pairs.mT) * both}


class Changed(Graphs):
    def forward(self, state, label, /, node_mask):
        return self.change(super().forward(state, label, node_mask=node_mask), state, node_mask)

    def change(self, out, state, mask):
        raise NotImplementedError


class OneSided(Changed):
    def change(self, out, state, mask):
        return out | {"adj": out["adj"].triu()}


class SelfLoops(Changed):
    def change(self, out, state, mask):
        return out | {"adj": out["adj"] + torch.diag_embed(mask.float())}


class Unmasked(Changed):
    def change(self, out, state, mask):
        return out | {"x": out["x"] + 1}


class UnmaskedEdges(Changed):
    def change(self, out, state, mask):
        return out | {"adj": out["adj"] + 1 - torch.eye(len(mask[0]))}


class CountsPlaces(Changed):
    def change(self, out, state, mask):
        return out | {"x": out["x"] / len(mask[0])}


class Numbered(Changed):
    def change(self, out, state, mask):
        return out | {"x": out["x"] * torch.arange(1, len(mask[0]) + 1)[:, None]}


class Crowded(Changed):
    def change(self, out, state, mask):
        return out | {"adj": out["adj"] / len(mask)}


class Forgets(Changed):
    def change(self, out, state, mask):
        return {"x": out["x"]}


class Squeezed(Changed):
    def change(self, out, state, mask):
        return out | {"x": out["x"].sum(-1)}


class Overflows(Changed):
    def change(self, out, state, mask):
        return out | {"x": out["x"] / 0}


class IdleGraphs(Graphs):
    def __init__(self, spec):
        super().__init__(spec)
        self.spare = nn.Linear(3, 3)


@pytest.mark.parametrize("kind", ["graph", "molecule"])
def test_good_networks_of_graphs_pass(kind):
    check_network(Graphs, GRAPHS | {"kind": kind})


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (OneSided, "not symmetric"),
        (SelfLoops, "diagonal that is not zero"),
        (Unmasked, "not zero outside the mask"),
        (UnmaskedEdges, "not zero outside the mask"),
        (CountsPlaces, "more padding gives another answer"),
        (Numbered, "nodes in another order"),
        (Crowded, "graph 0 alone gives another answer"),
        (Forgets, "must return x and adj, found x"),
        (Squeezed, "returned x of shape"),
        (Overflows, "not finite"),
        (IdleGraphs, "no gradient reaches the parameter spare.weight"),
    ],
)
def test_broken_networks_of_graphs_are_refused(network, message):
    with pytest.raises(AssertionError, match=message):
        check_network(network, GRAPHS)
