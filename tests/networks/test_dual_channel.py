"""The two-channel transformer of PaD-TS."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_sgm.networks import DualChannel

SPEC = {"kind": "series", "shape": [7, 4]}


def small(shape=(7, 4), **options):
    torch.manual_seed(0)
    return DualChannel({"kind": "series", "shape": list(shape)}, **{"width": 16, "heads": 4, **options})


@pytest.mark.parametrize(
    ("length", "dimensions", "width", "parameters"),
    [
        (24, 5, 128, 2_289_181),
        (24, 6, 128, 2_289_438),
        (24, 14, 256, 8_973_862),
        (24, 28, 256, 8_981_044),
        (24, 50, 256, 8_992_330),
        (64, 28, 256, 9_022_044),
        (256, 28, 256, 9_218_844),
        (24, 6, 32, 160_734),
    ],
)
def test_sizes(length, dimensions, width, parameters):
    """Those of pad_ts.md section 3, without the table of positions (L, width) that nothing reads (trap 3)."""
    with torch.device("meta"):
        network = DualChannel({"shape": [length, dimensions]}, width=width)
    assert sum(p.numel() for p in network.parameters()) == parameters - length * width
    assert len(network.state_dict()) == 94 - 1


def test_names_are_the_released_ones():
    """pad_ts.md section 11, at one encoder and two blocks."""
    length, dimensions, h = 7, 4, 16
    expected = {
        "time2emb.pos_emb.pe": (1, length, h),
        "time2emb.processing.0.weight": (h, dimensions),
        "time2emb.processing.0.bias": (h,),
        "feature2emb.processing.0.weight": (h, length),
        "feature2emb.processing.0.bias": (h,),
        "fc_time.weight": (dimensions, h),
        "fc_time.bias": (dimensions,),
        "fc_feature.weight": (length, h),
        "fc_feature.bias": (length,),
    }
    inner = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "mlp.fc1": (4 * h, h), "mlp.fc2": (h, 4 * h)}
    for channel in ("time", "feature"):
        layers = {f"{channel}_encoder.encoder_blocks.0.{name}": shape for name, shape in inner.items()}
        for k in (0, 1):
            block = f"{channel}_blocks.encoder_blocks.{k}"
            layers |= {f"{block}.{name}": shape for name, shape in inner.items()}
            layers[f"{block}.adaLN_modulation.1"] = (6 * h, h)
        layers[f"{channel}_blocks.diffusion_step_emb.mlp.0"] = (h, 256)
        layers[f"{channel}_blocks.diffusion_step_emb.mlp.2"] = (h, h)
        for name, shape in layers.items():
            expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(value.shape) for name, value in small(blocks=2).state_dict().items()} == expected


def written_out(state, x, label, heads, encoders, blocks):
    """pad_ts.md section 3, token by token and head by head, in the precision of ``x``."""

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h):
        centred = h - h.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)

    def attend(name, h):
        parts = []
        for q, k, v in zip(*(part.chunk(heads, -1) for part in linear(f"{name}.qkv", h).chunk(3, -1)), strict=True):
            weights = torch.exp(torch.einsum("bid,bjd->bij", q, k) / math.sqrt(q.shape[-1]))
            parts.append(torch.einsum("bij,bjd->bid", weights / weights.sum(-1, keepdim=True), v))
        return linear(f"{name}.proj", torch.cat(parts, -1))

    def mlp(name, h):
        h = linear(f"{name}.fc1", h)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return linear(f"{name}.fc2", h)

    def channel(name, h):
        for k in range(encoders):
            block = f"{name}_encoder.encoder_blocks.{k}"
            h = h + attend(f"{block}.attn", norm(h))
            h = h + mlp(f"{block}.mlp", norm(h))
        phases = label[:, None] * 10000.0 ** (-torch.arange(128, dtype=x.dtype) / 128)
        sinusoid = torch.cat([torch.cos(phases), torch.sin(phases)], -1)
        embedded = F.silu(linear(f"{name}_blocks.diffusion_step_emb.mlp.0", sinusoid))
        embedded = F.silu(linear(f"{name}_blocks.diffusion_step_emb.mlp.2", embedded))
        total = 0
        for k in range(blocks):
            block = f"{name}_blocks.encoder_blocks.{k}"
            modulation = linear(f"{block}.adaLN_modulation.1", embedded)[:, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
            u = h + gate1 * attend(f"{block}.attn", norm(h) * (1 + scale1) + shift1)
            u = u + gate2 * mlp(f"{block}.mlp", norm(u) * (1 + scale2) + shift2)
            total, h = total + u, u + h
        return linear(f"fc_{name}", total)

    time = channel("time", linear("time2emb.processing.0", x) + state["time2emb.pos_emb.pe"])
    feature = channel("feature", linear("feature2emb.processing.0", x.transpose(1, 2)))
    return time + feature.transpose(1, 2)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((7, 4), {}),
        ((5, 1), {"heads": 2}),
        ((3, 9), {"encoders": 0, "blocks": 1, "heads": 1}),
        ((6, 6), {"encoders": 2}),
    ],
)
def test_it_is_the_network_written_out(shape, options):
    options = {"heads": 4, "encoders": 1, "blocks": 3, **options}
    network = small(shape, **options).double().eval()
    x, label = torch.randn(3, *shape).double(), torch.tensor([0.0, 17.0, 249.0]).double()
    expected = written_out(network.state_dict(), x, label, **options)
    torch.testing.assert_close(network(x, label), expected, rtol=1e-10, atol=1e-11)
    single = network.float()(x.float(), label.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_windows_do_not_see_each_other():
    network, x, label = small().eval(), torch.randn(5, 7, 4), torch.tensor([0.0, 3.0, 50.0, 120.0, 249.0])
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(network(x[order], label[order]), network(x, label)[order])


@pytest.mark.parametrize("axis", [1, 2])
def test_time_steps_and_dimensions_permute_with_their_weights(axis):
    """pad_ts.md section 10: positions, the other channel's embedding and its answer permute along."""
    network, x, label = small().eval(), torch.randn(3, 7, 4), torch.tensor([2.0, 90.0, 200.0])
    order = torch.randperm(x.shape[axis])
    expected = network(x, label).index_select(axis, order)
    state = network.state_dict()
    if axis == 1:
        state["time2emb.pos_emb.pe"] = state["time2emb.pos_emb.pe"][:, order]
    of, to = ("feature2emb", "fc_feature") if axis == 1 else ("time2emb", "fc_time")
    state[f"{of}.processing.0.weight"] = state[f"{of}.processing.0.weight"][:, order]
    state |= {f"{to}.{part}": state[f"{to}.{part}"][order] for part in ("weight", "bias")}
    network.load_state_dict(state)
    torch.testing.assert_close(network(x.index_select(axis, order), label), expected, rtol=1e-4, atol=1e-5)


def test_all_parameters_learn():
    network = small()
    network(torch.randn(4, 7, 4), torch.arange(4.0)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_first_answers():
    """Larger than the data as in the paper (sd 3.5 to 4.3, section 3), or zero but ready to learn."""
    x, label = torch.randn(64, 24, 6), torch.full((64,), 100.0)
    torch.manual_seed(0)
    assert 3.3 < float(DualChannel({"shape": [24, 6]})(x, label).detach().std()) < 4.5
    quiet = DualChannel({"shape": [24, 6]}, zero_init=True)
    answer = quiet(x, label)
    assert not answer.any()
    (answer - x).square().mean().backward()
    for part in (quiet.fc_time, quiet.fc_feature):
        assert part.weight.grad is not None
        assert part.weight.grad.any()
    # With gates closed each block passes its input on, so the sum of three is 1 + 2 + 4 times it.
    h, level = torch.randn(2, 3, 128), torch.randn(2, 256)
    torch.testing.assert_close(quiet.time_blocks(h, level), 7.0 * h)


def test_dropout_is_of_the_time_channel_and_of_training():
    network, x, label = small(dropout=0.5), torch.randn(2, 7, 4), torch.zeros(2)
    assert not torch.equal(network(x, label), network(x, label))
    network.eval()
    assert torch.equal(network(x, label), network(x, label))
    network.train()
    torch.nn.init.zeros_(network.fc_time.weight)
    assert torch.equal(network(x, label), network(x, label))


def test_autocast_keeps_the_residual_stream():
    network, x, label = small((24, 6), width=32), torch.randn(8, 24, 6), torch.full((8,), 40.0)
    network.eval()
    seen = []
    network.feature_blocks.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected = network(x, label)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, label)
    assert seen == [torch.float32, torch.float32]
    assert float((found - expected).std()) < 0.02 * float(expected.std())


def test_under_autocast_the_answer_is_added_up_in_float32():
    """In bfloat16 an answer near 1 moves in steps of 1 / 128: too coarse for the correlations of small movements."""
    network, x, label = small((24, 6), width=32).eval(), torch.randn(8, 24, 6), torch.full((8,), 40.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, label)
    assert found.dtype == torch.float32
    on_the_grid = (found == found.bfloat16().float()).double().mean()
    assert on_the_grid < 0.01
    # Both last layers, on what the channels gave: the sum of two float32 products, not of rounded ones.
    seen: dict[str, torch.Tensor] = {}
    for name in ("time", "feature"):
        part = getattr(network, f"{name}_blocks")
        part.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output.double()))
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, label)
    last = network.double()
    expected = last.fc_time(seen["time"]) + last.fc_feature(seen["feature"]).mT
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({"kind": "image", "shape": [1, 8, 8]}, {}, r"DualChannel is for series \(L, D\), got data of shape"),
        ({"kind": "text"}, {}, "DualChannel needs 'shape'"),
        (SPEC, {"width": 10}, "width 10 of DualChannel must be a multiple of the number of heads, 4"),
        (SPEC, {"heads": 0}, "multiple of the number of heads"),
        (SPEC, {"blocks": 0}, "blocks >= 1"),
        (SPEC, {"encoders": -1}, "encoders >= 0"),
        (SPEC, {"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments(spec, options, message):
    with pytest.raises(ValueError, match=message):
        DualChannel(spec, **options)
