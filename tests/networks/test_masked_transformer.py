import copy
import math

import pytest
import torch
from torch import nn

from lightning_sgm.networks.masked_transformer import MaskedTransformer, _attention
from lightning_sgm.testing import check_network
from tests.benchmarks.bench_radd_training import LiteralTransformer

SPEC = {"kind": "text", "length": 12, "vocabulary": 9}


def make(**options):
    """A small network whose head is not zero, in eval mode."""
    torch.manual_seed(0)
    network = MaskedTransformer(SPEC, **{"width": 16, "blocks": 2, "heads": 2, **options}).eval()
    nn.init.normal_(network.output_layer.linear.weight)
    nn.init.normal_(network.output_layer.linear.bias)
    return network


@pytest.fixture
def tokens():
    return torch.randint(10, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("width", "blocks", "heads", "count"), [(768, 12, 12, 162265682), (1024, 24, 16, 405191762)])
def test_parameters_of_the_released_sizes(width, blocks, heads, count):
    with torch.device("meta"):
        network = MaskedTransformer({"kind": "text", "vocabulary": 50257}, width, blocks, heads)
    assert sum(p.numel() for p in network.parameters()) == count


def released_layout(width=8, blocks=2, heads=2, vocabulary=9):
    """A state dict laid out as radd.md section 11 lists it."""
    shapes = {
        "vocab_embed.embedding": (vocabulary + 1, width),
        "output_layer.norm_final.weight": (width,),
        "output_layer.norm_final.bias": (width,),
        "output_layer.linear.weight": (vocabulary + 1, width),
        "output_layer.linear.bias": (vocabulary + 1,),
    }
    for i in range(blocks):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (width,), f"blocks.{i}.{norm}.bias": (width,)}
        shapes |= {
            f"blocks.{i}.attn_qkv.weight": (3 * width, width),
            f"blocks.{i}.attn_out.weight": (width, width),
            f"blocks.{i}.mlp.0.weight": (4 * width, width),
            f"blocks.{i}.mlp.0.bias": (4 * width,),
            f"blocks.{i}.mlp.2.weight": (width, 4 * width),
            f"blocks.{i}.mlp.2.bias": (width,),
        }
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    return state | {"rotary_emb.inv_freq": 10000.0 ** (-torch.arange(0, width // heads, 2) / (width // heads))}


def test_released_weights_load_strictly():
    network, state = MaskedTransformer(SPEC, width=8, blocks=2, heads=2), released_layout()
    network.load_state_dict(state, strict=True)
    assert set(network.state_dict()) == set(state) - {"rotary_emb.inv_freq"}
    with pytest.raises(RuntimeError, match="Unexpected"):
        network.load_state_dict(state | {"sigma_map.mlp.0.weight": torch.zeros(1)}, strict=True)


def test_a_new_network_knows_nothing(tokens):
    network = MaskedTransformer(SPEC, width=16, blocks=1, heads=2)
    logp = network(tokens).log_softmax(-1)
    assert torch.equal(logp, torch.full((3, 12, 9), -math.log(9)).to(logp))
    assert all((p == 1).all() for name, p in network.named_parameters() if "norm" in name)
    assert network.vocab_embed.embedding.abs().max() <= 16**-0.5
    wide = MaskedTransformer({"vocabulary": 500}, width=16, blocks=1, heads=2, embedding_scale=8.0)
    assert 0.99 < float(wide.vocab_embed.embedding.abs().max()) / (8 * 16**-0.5) <= 1


def test_equal_to_the_literal_network(tokens):
    network = make(width=24, blocks=3, heads=3)
    literal = LiteralTransformer(9, 24, 3, 3, 0.0)
    literal.load_state_dict(network.state_dict())
    for length in (12, 7):
        expected = literal(tokens[:, :length])[..., :-1]
        got = network(tokens[:, :length]).log_softmax(-1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_to_the_literal_network(tokens):
    network = make()
    literal = LiteralTransformer(9, 16, 2, 2, 0.0)
    literal.load_state_dict(network.state_dict())
    weights = torch.randn(3, 12, 9)
    (network(tokens).log_softmax(-1) * weights).sum().backward()
    (literal(tokens)[..., :-1] * weights).sum().backward()
    theirs = dict(literal.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_positions_are_rows_of_the_full_answer(tokens):
    network = make()
    positions = torch.tensor([0, 3, 4, 20, 35])
    weights = torch.randn(5, 9)
    gradients = []
    for answer in (network(tokens, positions), network(tokens).flatten(0, 1)[positions]):
        gradients.append(torch.autograd.grad((answer * weights).sum(), list(network.parameters())))
        last = answer
    torch.testing.assert_close(network(tokens, positions), last, atol=1e-6, rtol=1e-6)
    for (name, _), first, second in zip(network.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5, msg=name)


def test_only_wanted_positions_reach_the_last_mlp_and_the_head(tokens):
    network, rows = make(), []
    for module in (network.blocks[-1].mlp, network.output_layer, network.blocks[0].mlp):
        module.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    network(tokens, torch.tensor([1, 30]))
    assert rows == [36, 2, 2]
    assert network(tokens, torch.tensor([], dtype=torch.int64)).shape == (0, 9)


def test_the_row_of_the_mask_takes_no_part(tokens):
    network = make()
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.output_layer.linear.weight[9] = 1e6
        changed.output_layer.linear.bias[9] = torch.inf
    assert torch.equal(network(tokens), changed(tokens))
    network(tokens).log_softmax(-1)[..., 0].sum().backward()
    for parameter in network.output_layer.linear.parameters():
        assert (parameter.grad[9] == 0).all()
        assert (parameter.grad[:9] != 0).any()


def test_the_mask_is_a_token_of_the_input(tokens):
    network = make()
    masked = tokens.masked_fill(tokens == 0, 9)
    assert (tokens == 0).any()
    assert not torch.allclose(network(tokens), network(masked))


def test_far_tokens_and_order_matter(tokens):
    network = make()
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % 9
    assert not torch.allclose(network(tokens)[:, 0], network(changed)[:, 0])
    assert not torch.allclose(network(tokens.flip(1)).flip(1), network(tokens))


def test_satisfies_the_contract():
    check_network(lambda spec: MaskedTransformer(spec, width=16, blocks=2, heads=2), SPEC)


def test_residual_stream_and_norms_stay_float32_under_autocast(tokens):
    network, kinds = make(), []
    for module in network.modules():
        if isinstance(module, nn.LayerNorm) or module in list(network.blocks):
            module.register_forward_hook(lambda module, args, output: kinds.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        answer = network(tokens, torch.tensor([2, 3]))
    assert answer.dtype == torch.bfloat16
    assert set(kinds) == {(torch.float32, torch.float32)}
    torch.testing.assert_close(answer.float(), network(tokens, torch.tensor([2, 3])), atol=0.2, rtol=0.1)


def test_dropout_acts_in_training_only(tokens):
    network = make(dropout=0.5)
    assert torch.equal(network(tokens), network(tokens))
    network.train()
    assert not torch.equal(network(tokens), network(tokens))


def test_compiles_without_graph_breaks(tokens):
    network = make()
    expected = network(tokens, torch.tensor([1, 2]))
    network.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(network(tokens, torch.tensor([1, 2])), expected)


def test_wrong_sizes_and_data_are_refused():
    for options in ({"width": 10, "heads": 4}, {"width": 6, "heads": 2}):
        with pytest.raises(ValueError, match="heads"):
            MaskedTransformer(SPEC, **options)
    with pytest.raises(ValueError, match="at least one block"):
        MaskedTransformer(SPEC, blocks=0)
    with pytest.raises(ValueError, match="MaskedTransformer needs 'vocabulary'"):
        MaskedTransformer({"kind": "image", "shape": [1, 8, 8]})


def test_attention_in_bfloat16_is_that_of_float32(tokens):
    network = make(width=24, blocks=2, heads=3)
    expected = network(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(tokens)
    assert found.dtype == torch.bfloat16
    assert float((found - expected).abs().mean() / expected.abs().mean()) < 0.03
    q, k, v = torch.randn(3, 2, 3, 12, 8)
    low = _attention(*(part.bfloat16() for part in (q, k, v))).float()
    assert torch.allclose(low, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=0.03)
