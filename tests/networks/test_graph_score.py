import copy
import itertools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lightning_sgm.io.released.gdss_weights import from_released
from lightning_sgm.networks import graph_groups
from lightning_sgm.networks.graph_groups import cuts, fold, grouped, pairs_of, spread, whole
from lightning_sgm.networks.graph_layers import elu
from lightning_sgm.networks.graph_score import GraphScore
from lightning_sgm.testing import check_network
from tests.benchmarks.bench_graph_score import Arguments, Literal, noisy
from tests.conftest import SHARED

RELEASED = SHARED / "checkpoints" / "gdss"
SMALL: dict[str, Any] = {"depth": 2, "width": 8, "layers": 3, "attention_width": 4, "heads": 2}
VARIANTS = {
    "gcn": {},
    "attention": {"nodes": "attention", "linears": 3},
    "attention of one layer": {"nodes": "attention", "depth": 1},
    "mlp": {"nodes": "attention", "attention_conv": "mlp", "depth": 3},
    "three powers, one linear": {"channels": (3, 5, 6), "linears": 1, "layers": 2},
}
CPU = torch.device("cpu")
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def pair(options, dtype=torch.float64, **more):
    """The written-out networks, and ours with the same weights."""
    arguments = Arguments(3, **(SMALL | options))
    literal = Literal(arguments, torch.Generator().manual_seed(0), **more)
    literal.state = {key: value.to(dtype) for key, value in literal.state.items()}
    network = arguments.network().to(dtype)
    network.load_state_dict(from_released(literal.state, network))
    return literal, network


def batch(sizes, nodes, dtype=torch.float64, features=3):
    """A state and its mask."""
    x, adj, mask = noisy(torch.tensor(sizes), nodes, features, torch.Generator().manual_seed(1))
    return {"x": x.to(dtype), "adj": adj.to(dtype)}, mask


def run(network, state, mask):
    return network(state, torch.ones(len(mask), dtype=state["x"].dtype), node_mask=mask)


def answers(literal, state, mask):
    flags = mask.to(state["x"].dtype)
    return {"x": literal.score_x(**state, mask=flags), "adj": literal.score_adj(**state, mask=flags)}


def close(found, expected, tolerance):
    for key in ("x", "adj"):
        torch.testing.assert_close(found[key], expected[key], rtol=tolerance, atol=tolerance)


@pytest.fixture
def one_block(monkeypatch):
    """As on a GPU."""
    return lambda network: monkeypatch.setattr(network, "_plan", whole)


# Numbers.


@variants
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equal_to_the_networks_written_out(options, dtype, tolerance, one_block):
    literal, network = pair(options, dtype)
    state, mask = batch([7, 3, 7, 1, 2, 0, 6], 9, dtype)
    expected = answers(literal, state, mask)
    assert expected["adj"].abs().max() > 0.1
    close(run(network, state, mask), expected, tolerance)
    one_block(network)
    close(run(network, state, mask), expected, tolerance)


@variants
def test_gradients_are_those_of_the_networks_written_out(options, one_block):
    literal, network = pair(options, unused=False)
    state, mask = batch([5, 3, 5, 1, 6], 6)
    leaves = {key: value.clone().requires_grad_() for key, value in state.items()}
    for value in literal.state.values():
        value.requires_grad_()

    def gradients(answer, parameters):
        loss = sum((value * torch.linspace(-1, 2, value.numel()).view_as(value)).sum() for value in answer.values())
        return torch.autograd.grad(loss, [*parameters, *leaves.values()])

    theirs = gradients(answers(literal, leaves, mask), literal.state.values())
    expected = from_released(dict(zip(literal.state, theirs, strict=False)), network)
    inside = (mask[:, :, None] & mask[:, None, :]) & ~torch.eye(6, dtype=torch.bool)
    for _ in range(2):
        ours = gradients(run(network, leaves, mask), network.parameters())
        for (name, _), found in zip(network.named_parameters(), ours, strict=False):
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-10, msg=name)
        torch.testing.assert_close(ours[-2] * mask[:, :, None], theirs[-2] * mask[:, :, None])
        # The written-out networks read both triangles apart, and so may divide the gradient between them otherwise.
        both = [(g + g.mT) * inside for g in (ours[-1], theirs[-1])]
        torch.testing.assert_close(*both)
        one_block(network)


@pytest.mark.parametrize("file", sorted(RELEASED.glob("*.json")), ids=lambda file: file.stem)
def test_released_weights(file):
    """Parameters as in the README beside the files, less those that nothing uses; answers as written out."""
    settings, tensors = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
    x, adj = settings["params_x"], settings["params_adj"]
    arguments = Arguments(
        adj["max_feat_num"],
        x["depth"],
        adj["nhid"],
        "gcn" if x["model_type"] == "ScoreNetworkX" else "attention",
        adj["num_layers"],
        adj["num_linears"],
        adj["adim"],
        adj["num_heads"],
        (adj["c_init"], adj["c_hid"], adj["c_final"]),
        adj["conv"].lower(),
    )
    literal, network = Literal(arguments, torch.Generator()), arguments.network()
    state = {key: value for key, value in tensors.items() if not key.startswith("ema_")}
    assert {key: value.shape for key, value in literal.state.items()} == {k: v.shape for k, v in state.items()}
    literal.state = state
    network.load_state_dict(from_released(state, network), strict=True)
    used = Literal(arguments, torch.Generator(), unused=False).state
    assert sum(p.numel() for p in network.parameters()) == sum(value.numel() for value in used.values())
    graphs, mask = batch([14, 9, 9, 3], 15, torch.float32, arguments.features)
    with torch.no_grad():
        close(run(network, graphs, mask), answers(literal, graphs, mask), 1e-5)


def test_elu():
    x = torch.cat([torch.linspace(-100, 100, 20001), torch.tensor([-1e-8, 0.0, 1e-8, 3e38, -3e38])])
    with torch.no_grad():
        torch.testing.assert_close(elu(x), F.elu(x), rtol=0, atol=2e-7)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(elu(x).sum(), x)
    torch.testing.assert_close(gradient, x.clamp(max=0).exp())


# What must not matter.


@variants
@pytest.mark.parametrize("time", [False, True])
def test_a_network_of_graphs(options, time):
    spec = {"kind": "graph", "nodes": 7, "features": 3, "bonds": 1}
    check_network(lambda spec: GraphScore(spec, **(SMALL | options), time=time), spec)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(0, 4), st.integers(0, 1000))
@settings(max_examples=40)
def test_neither_blocks_nor_padding_nor_order_matter(sizes, more, seed):
    _, network = pair({})
    nodes = max(sizes) + more or 1
    state, mask = batch(sizes, nodes)
    found = run(network, state, mask)
    order = torch.rand(len(sizes), nodes, generator=torch.Generator().manual_seed(seed)).argsort(1)
    rows = torch.arange(len(sizes))[:, None]

    def permute(x, adj):
        return {"x": x[rows, order], "adj": adj[rows[:, None], order[:, :, None], order[:, None]]}

    close(run(network, permute(**state), mask.gather(1, order)), permute(**found), 1e-10)
    network._plan = whole
    close(run(network, state, mask), found, 1e-10)
    close(run(network, permute(**state), mask.gather(1, order)), permute(**found), 1e-10)
    assert torch.equal(found["adj"], found["adj"].mT)
    outside = ~(mask[:, :, None] & mask[:, None]) | torch.eye(nodes, dtype=torch.bool)
    assert not found["adj"][outside].any()
    assert not found["x"][~mask].any()


def test_what_is_outside_the_mask_and_on_the_diagonal_is_not_read(one_block):
    _, network = pair({"nodes": "attention"})
    state, mask = batch([4, 2, 4], 5)
    expected = run(network, state, mask)
    outside = ~(mask[:, :, None] & mask[:, None]) | torch.eye(5, dtype=torch.bool)
    dirty = {"x": state["x"] + 3.0 * ~mask[:, :, None], "adj": state["adj"] + 2.0 * outside}
    close(run(network, dirty, mask), expected, 1e-12)
    one_block(network)
    close(run(network, dirty, mask), expected, 1e-12)


def test_the_label_only_matters_with_time():
    arguments = Arguments(3, **SMALL)
    plain = arguments.network()
    timed = arguments.network(time=True)
    timed.load_state_dict(plain.state_dict(), strict=False)
    state, mask = batch([4, 2, 4, 5], 5, torch.float32)
    expected = run(plain, state, mask)
    early, late = torch.tensor([3.0, 5.0, 700.0, 9.0]), torch.tensor([3.0, 5.0, 1.0, 9.0])
    close(plain(state, early, node_mask=mask), expected, 0)
    close(timed(state, early, node_mask=mask), expected, 0)
    with torch.no_grad():
        for name, parameter in timed.named_parameters():
            if ".time" in name:
                parameter.normal_()
    first, second = timed(state, early, node_mask=mask), timed(state, late, node_mask=mask)
    for key in ("x", "adj"):
        changed = (first[key] - second[key]).flatten(1).abs().amax(1)
        assert changed[2] > 0.01
        assert changed[[0, 1, 3]].max() < 1e-5


def test_the_network_of_nodes_has_no_gradient_from_the_edges():
    _, network = pair({})
    state, mask = batch([4, 2], 4)
    run(network, state, mask)["adj"].square().sum().backward()
    assert all(parameter.grad is None for parameter in network.x.parameters())
    assert all(parameter.grad is not None for parameter in network.adj.parameters())


# How it runs.


def test_plans_are_kept_until_the_mask_changes():
    _, network = pair({})
    state, mask = batch([4, 2, 3], 5)
    before = run(network, state, mask)
    plan = network._plan(mask)
    assert network._plan(mask) is plan
    assert network._plan(mask.clone()) is plan
    mask[1, 3] = True
    assert network._plan(mask) is not plan
    after = run(network, state, mask)
    close(after, run(copy.deepcopy(network), state, mask), 0)
    assert not before["x"][1, 3].any()
    assert after["x"][1, 3].any()
    assert network._plan(mask[:, :4]).shape == (3, 4)


def test_what_was_first_made_without_gradients_serves_training():
    graph_groups._kept_pairs.cache_clear()
    _, network = pair({})
    state, mask = batch([4, 2], 4)
    with torch.inference_mode():
        run(network, state, mask)
    run(network, state, mask)["adj"].sum().backward()
    assert network.adj.layers[0].values.weight.grad.any()


def test_a_batch_without_nodes():
    _, network = pair({})
    state, mask = batch([0, 0], 3)
    found = run(network, state, mask)
    assert found["x"].shape == (2, 3, 3)
    assert not found["x"].any()
    assert not found["adj"].any()


def test_half_precision(one_block):
    _, network = pair({"nodes": "attention"}, torch.float32)
    state, mask = batch([5, 3, 5], 5, torch.float32)
    expected = run(network, state, mask)
    half = copy.deepcopy(network).bfloat16()
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = run(network, state, mask)
        assert found["x"].dtype == found["adj"].dtype == torch.float32
        close(found, expected, 0.1)
        found = run(half, {key: value.bfloat16() for key, value in state.items()}, mask)
        assert found["adj"].dtype == torch.bfloat16
        close({key: value.float() for key, value in found.items()}, expected, 0.15)
        one_block(network)
        one_block(half)


def test_torch_compile_sees_one_graph():
    torch.compiler.reset()
    _, network = pair({"layers": 2, "depth": 1})
    state, mask = batch([5, 3, 5], 6)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found, expected = run(compiled, state, mask), run(network, state, mask)
    close(found, expected, 1e-10)
    gradients = [torch.autograd.grad(o["adj"].square().sum(), network.adj.parameters()) for o in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


# Blocks.


def costs(sizes, ends):
    edges = [0, *ends, len(sizes)]
    return sum(graph_groups._BLOCK + (b - a) * sizes[b - 1] ** 2 for a, b in itertools.pairwise(edges))


@given(st.lists(st.sampled_from([1, 4, 5, 9, 30, 33]), min_size=1, max_size=9))
def test_blocks_cost_least(sizes):
    sizes = sorted(sizes)
    blocks = cuts(sizes)
    ends = list(itertools.accumulate(count for count, _ in blocks))
    assert ends[-1] == len(sizes)
    assert [size for _, size in blocks] == [sizes[end - 1] for end in ends]
    inner = range(1, len(sizes))
    choices = itertools.chain.from_iterable(itertools.combinations(inner, k) for k in range(len(sizes)))
    assert costs(sizes, ends[:-1]) == min(costs(sizes, choice) for choice in choices)


def test_large_blocks_are_cut():
    blocks = cuts([60] * 50 + [200] * 2)
    assert sum(count for count, _ in blocks) == 52
    assert all(count * size**2 <= graph_groups._LARGEST or count == 1 for count, size in blocks)
    assert [size for _, size in blocks].count(60) == -(-50 // (graph_groups._LARGEST // 3600))


def test_a_plan_returns_what_it_splits():
    state, mask = batch([4, 2, 30, 31, 0], 33)
    plan = grouped(mask)
    assert any(block.edge_mask is not None for block in plan.blocks)
    assert len(plan.blocks) > 1
    nodes, pairs = plan.split(**state)
    x, adj = plan.join([part.flatten(0, 1) for part in nodes], pairs)
    assert torch.equal(x, state["x"])
    assert torch.equal(adj, state["adj"])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_fold_and_spread(size):
    pairs = pairs_of(size, CPU)
    square = torch.randn(3, size, size, dtype=torch.float64)
    values = fold(square.flatten(1), pairs)
    i, j = torch.triu_indices(size, size, 1)
    assert torch.equal(values, square[:, i, j] + square[:, j, i])
    diagonal = torch.diag_embed(torch.full((3, size), 2.0, dtype=torch.float64))
    expected = square + square.mT - torch.diag_embed(2 * square.diagonal(dim1=1, dim2=2)) + diagonal
    assert torch.equal(spread(values, pairs, 2.0).view_as(square), expected)


def test_derivatives_of_fold_and_spread():
    pairs = pairs_of(4, CPU)
    square = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda s: fold(s, pairs).sin(), (square,))
        assert check(lambda v: spread(v, pairs, 1.0).sin(), (values,))


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6, "heads": 4}, "width 6 cannot be split into 4 heads"),
        ({"nodes": "gat"}, "nodes is 'gcn' or 'attention', got 'gat'"),
        ({"attention_conv": "gat"}, "attention_conv is 'gcn' or 'mlp', got 'gat'"),
        ({"layers": 1}, "layers >= 2, got 3 and 1"),
        ({"linears": 0}, "at least one linear layer, got 0"),
        ({"channels": (2, 8)}, "channels are three numbers, got"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        GraphScore({"features": 3}, **options)


def test_data_without_features():
    with pytest.raises(ValueError, match="GraphScore needs 'features' in the data's spec, but data of kind 'image'"):
        GraphScore({"kind": "image"})


def test_weights_of_another_network():
    literal, network = pair({})
    good = literal.state
    parallel = {key.replace(".", ".module.", 1): value for key, value in good.items()}
    assert set(from_released(parallel, network)) == set(network.state_dict())
    with pytest.raises(ValueError, match=r"the weights lack adj.layers.1.mlp.linears.0.bias: give the network"):
        from_released({k: v for k, v in good.items() if k != "adj.layers.1.mlp.linears.0.bias"}, network)
    with pytest.raises(ValueError, match=r"no place for the weights adj.embed.weight: "):
        from_released(good | {"adj.embed.weight": torch.zeros(2)}, network)
    with pytest.raises(ValueError, match=r"no place for the weights x.layers.2.bias, x.layers.2.weight: "):
        from_released(pair({"depth": 3})[0].state | {k: good[k] for k in good if "final" in k}, network)
    with pytest.raises(ValueError, match=r"gives x.layers.0.weight the shape \(3, 16\) instead of \(3, 8\)"):
        from_released(pair({"width": 16})[0].state, network)
    with pytest.raises(ValueError, match="are of different shapes"):
        from_released(good | {"adj.layers.0.attn.1.gnn_v.weight": torch.zeros(4, 8)}, network)
    with pytest.raises(ValueError, match=r"released networks have no adj.layers.0.time.weight, "):
        from_released(good, Arguments(3, **SMALL).network(time=True))
