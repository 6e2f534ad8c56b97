import copy
import math
from typing import Any

import pytest
import torch

from lightning_sgm.networks import DDPM, NCSNpp
from lightning_sgm.networks.score_blocks import NIN, ResidualBlock, SelfAttention, norm
from lightning_sgm.testing import check_network

DIGITS = {"kind": "image", "shape": [1, 8, 8], "classes": 10}
CIFAR = {"kind": "image", "shape": [3, 32, 32], "classes": 10}
LARGE = {"kind": "image", "shape": [3, 256, 256]}
HUGE = {"kind": "image", "shape": [3, 1024, 1024]}

SHALLOW = {"channels": [128, 256, 256, 256], "layers_per_block": 4, "attention": [16], "dropout": 0.1}
DEEP = {**SHALLOW, "layers_per_block": 8}
RESIDUAL = {"fir": True, "input_pyramid": "residual"}
SKIP: dict[str, Any] = {
    "fir": True,
    "input_pyramid": "input_skip",
    "output_pyramid": "output_skip",
    "embedding": "fourier",
}
FOURIER = {**RESIDUAL, "embedding": "fourier"}


def perturbed(kind=NCSNpp, spec=DIGITS, **options):
    """A small network whose vanishing layers do not vanish."""
    torch.manual_seed(0)
    network = kind(spec, **{"channels": [8, 16], **options}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize(
    ("kind", "spec", "options", "parameters", "modules"),
    [
        (NCSNpp, CIFAR, {**SHALLOW, **FOURIER}, 62_758_915, 59),
        (NCSNpp, CIFAR, {**DEEP, **FOURIER}, 107_587_075, 95),
        (NCSNpp, CIFAR, {**SHALLOW, **RESIDUAL}, 62_693_251, 58),
        (NCSNpp, CIFAR, {**DEEP, **RESIDUAL}, 107_521_411, 94),
        (NCSNpp, CIFAR, SHALLOW, 61_804_419, 55),
        (NCSNpp, CIFAR, DEEP, 106_632_579, 91),
        (DDPM, CIFAR, {**SHALLOW, "layers_per_block": 2}, 35_218_947, None),
        (
            NCSNpp,
            LARGE,
            {"channels": [128, 128] + [256] * 5, "layers_per_block": 2, "attention": [16], **SKIP},
            65_574_549,
            None,
        ),
        (NCSNpp, HUGE, {"channels": [16, 32, 64, 128, 256] + [512] * 3, "attention": [16], **SKIP}, 105_785_896, None),
        (NCSNpp, DIGITS, {"channels": [16, 32], "attention": [4]}, 188_769, None),
    ],
)
def test_sizes_are_those_of_the_reference(kind, spec, options, parameters, modules):
    with torch.device("meta"):
        network = kind(spec, **options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert modules is None or len(network.all_modules) == modules
    assert sum(value.numel() for value in network.state_dict().values()) == parameters


@pytest.mark.parametrize(("options", "entries"), [({**SHALLOW, **FOURIER}, 572), (SHALLOW, 565)])
def test_state_entries_are_those_of_the_reference(options, entries):
    with torch.device("meta"):
        state = NCSNpp(CIFAR, **options).state_dict()
    assert len(state) == entries - 1  # the reference has its noise levels there
    assert all(name.startswith("all_modules.") for name in state)


def names(network):
    """For each module its entries in order; ``weight`` and ``bias`` are left out."""
    found: dict[int, list[str]] = {}
    for name in network.state_dict():
        _, index, *rest = name.split(".")
        entry = ".".join(rest).removesuffix("weight").removesuffix("bias").rstrip(".")
        entries = found.setdefault(int(index), [])
        if not entries or entries[-1] != entry:
            entries.append(entry)
    return [" ".join(found[i]) for i in range(len(found))]


BLOCK = "GroupNorm_0 Conv_0 Dense_0 GroupNorm_1 Conv_1"
ATTENTION = "GroupNorm_0 NIN_0.W NIN_0.b NIN_1.W NIN_1.b NIN_2.W NIN_2.b NIN_3.W NIN_3.b"
WIDER = f"{BLOCK} Conv_2"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {**FOURIER, "attention": [4]},
            ["W", "", "", "", BLOCK, WIDER, "Conv2d_0", WIDER, ATTENTION, BLOCK, ATTENTION, BLOCK]
            + [WIDER, WIDER, ATTENTION, WIDER, WIDER, WIDER, "", ""],
        ),
        (
            SKIP,
            ["W", "", "", "", BLOCK, WIDER, "Conv_0", WIDER, BLOCK, ATTENTION, BLOCK]
            + [WIDER, WIDER, "", "", WIDER, WIDER, WIDER, "", ""],
        ),
        (
            {"block": "ddpm", "attention": [8]},
            ["", "", "", BLOCK, ATTENTION, "Conv_0", f"{BLOCK} NIN_0.W NIN_0.b", BLOCK, ATTENTION, BLOCK]
            + [f"{BLOCK} NIN_0.W NIN_0.b"] * 2
            + ["Conv_0", *[f"{BLOCK} NIN_0.W NIN_0.b"] * 2, ATTENTION, "", ""],
        ),
    ],
)
def test_names_are_those_of_released_checkpoints(options, expected):
    assert names(NCSNpp(DIGITS, channels=[8, 16], **options)) == expected


def test_frequencies_are_saved_and_never_trained():
    network = NCSNpp(DIGITS, channels=[8, 8], embedding="fourier")
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["all_modules.0.W"]
    for scale in (None, 1.0):
        fourier: Any = NCSNpp(DIGITS, channels=[2048], embedding="fourier", fourier_scale=scale).all_modules[0]
        assert fourier.W.std().item() == pytest.approx(scale or 16, rel=0.1)


def test_initial_scales():
    network = NCSNpp(DIGITS, channels=[64], attention=[8])
    state = network.state_dict()

    def ratio(name, fan):
        return state[f"all_modules.{name}"].std().item() / math.sqrt(1 / fan)

    assert ratio("0.weight", (64 + 256) / 2) == pytest.approx(1, rel=0.05)
    assert ratio("3.Conv_0.weight", 9 * 64) == pytest.approx(1, rel=0.05)
    assert ratio("4.NIN_0.W", 64) == pytest.approx(math.sqrt(0.1), rel=0.05)
    for last in ("3.Conv_1.weight", "4.NIN_3.W"):
        assert 0 < state[f"all_modules.{last}"].abs().max() < 1e-5
    assert all((state[name] == 0).all() for name in state if name.rpartition(".")[2] in ("b", "bias"))


@pytest.mark.parametrize("options", [{}, FOURIER, SKIP, {"block": "ddpm"}, {"rescale": False}])
def test_untrained_networks_answer_almost_nothing(options):
    network = NCSNpp(CIFAR, channels=[8, 16], attention=[16], **options)
    answer = network(torch.randn(2, 3, 32, 32), torch.tensor([0.5, 2.0]))
    assert answer.shape == (2, 3, 32, 32)
    assert 0 < answer.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ([1, 8, 8], {"channels": [8, 16], "attention": [4]}),
        ([3, 16, 8], {"channels": [8, 8, 12], "layers_per_block": 2, "attention": [16], **FOURIER}),
        ([2, 8, 8], {"channels": [8, 16], **SKIP}),
        ([5, 4, 4], {"channels": [8, 8], "input_pyramid": "residual", "output_pyramid": "output_skip"}),
        ([1, 8, 8], {"channels": [8, 12], "input_pyramid": "input_skip"}),
        ([1, 8, 8], {"channels": [8, 16], "block": "ddpm", "fir": True, "attention": [8]}),
        ([2, 5, 5], {"channels": [16], "conditional": True}),
    ],
)
def test_satisfies_the_contract(shape, options):
    spec = {"kind": "image", "shape": shape, "classes": 4}
    check_network(lambda spec: NCSNpp(spec, **options), spec)


def test_ddpm_satisfies_the_contract():
    spec = {"kind": "image", "shape": [3, 8, 8], "classes": 4}
    check_network(lambda spec: DDPM(spec, channels=[8, 16], attention=[4], conditional=True), spec)


@pytest.mark.parametrize("kind", [NCSNpp, DDPM])
def test_classes_and_the_null_class(kind):
    network = perturbed(kind, conditional=True)
    plain = kind(DIGITS, channels=[8, 16])
    assert (network.conditions, network.classes, plain.conditions, plain.classes) == (("label",), 10, (), 0)
    assert set(network.state_dict()) - set(plain.state_dict()) == {"label_embedding.weight"}
    x, noise = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 2.0, 3.0])
    null = torch.full((3,), 10)
    torch.testing.assert_close(network(x, noise), network(x, noise, label=null))
    assert not torch.allclose(network(x, noise, label=null), network(x, noise, label=torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize(("embedding", "near", "far"), [("positional", 400.0, 500.0), ("fourier", 0.2, 0.4)])
def test_the_noise_label_matters_and_may_be_fractional(embedding, near, far):
    network = perturbed(embedding=embedding)
    x = torch.randn(1, 1, 8, 8)
    first, same, other = (network(x, torch.tensor([label])) for label in (near, near * 1.0001, far))
    assert 0 < (first - same).norm() < 0.1 * (first - other).norm()


@pytest.mark.parametrize("options", [FOURIER, SKIP, {"block": "ddpm"}])
def test_layouts_compilation_and_copies_change_nothing(options):
    network = perturbed(attention=[4], **options)
    x, noise = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    expected = network(x, noise)
    torch.testing.assert_close(copy.deepcopy(network)(x, noise), expected)
    compiled = copy.deepcopy(network)
    compiled.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, noise), expected)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    answer = last(x.to(memory_format=torch.channels_last), noise)
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [FOURIER, SKIP, {"block": "ddpm"}])
def test_keeps_the_memory_format(options):
    seen = []
    network = perturbed(attention=[4], **options)
    for module in network.all_modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for format in (torch.contiguous_format, torch.channels_last):
        seen.clear()
        network.to(memory_format=format)
        network(torch.randn(2, 1, 8, 8).to(memory_format=format), torch.tensor([0.5, 2.0]))
        assert all(y.is_contiguous(memory_format=format) for y in seen if y.ndim == 4)


@pytest.mark.parametrize("options", [FOURIER, SKIP, {"block": "ddpm"}])
def test_half_precision(options):
    network = perturbed(attention=[4], **options)
    x, noise = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    expected = network(x, noise)
    with torch.autocast("cpu", torch.bfloat16):
        answer = network(x, noise)
    answer.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
    torch.testing.assert_close(answer.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0)
    assert network.bfloat16()(x.bfloat16(), noise).dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    network = perturbed(dropout=0.5)
    x, noise = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    assert torch.equal(network(x, noise), network(x, noise))
    network.train()
    assert not torch.equal(network(x, noise), network(x, noise))


def test_attention_where_asked_and_in_the_middle():
    def count(**options):
        network = NCSNpp({"shape": [1, 16, 16]}, channels=[8, 8, 8], layers_per_block=2, **options)
        return sum(isinstance(module, SelfAttention) for module in network.modules())

    assert count() == 1
    assert count(attention=[8]) == 1 + 2 + 1
    assert count(attention=[16, 4]) == 1 + 2 * (2 + 1)


@pytest.mark.parametrize("rescale", [False, True])
def test_attention_is_softmax_over_all_pixels(rescale):
    torch.manual_seed(0)
    module = SelfAttention(8, rescale)
    x = torch.randn(2, 8, 3, 4)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    h = module.GroupNorm_0(x).flatten(2)

    def mapped(layer, h):
        return torch.einsum("bcp,cd->bdp", h, layer.W) + layer.b[:, None]

    q, k, v = (mapped(layer, h) for layer in (module.NIN_0, module.NIN_1, module.NIN_2))
    weights = torch.softmax(torch.einsum("bcp,bcq->bpq", q, k) / math.sqrt(8), -1)
    expected = x + mapped(module.NIN_3, torch.einsum("bpq,bcq->bcp", weights, v)).view_as(x)
    torch.testing.assert_close(module(x), expected / (math.sqrt(2) if rescale else 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rescale", "factor"), [(False, 1.0), (True, math.sqrt(0.5))])
def test_a_new_block_passes_its_input_on(rescale, factor):
    x = torch.randn(2, 8, 4, 4)
    block = ResidualBlock(8, 8, embedded=6, dropout=0.0, rescale=rescale)
    torch.testing.assert_close(block(x, torch.randn(2, 6)), x * factor, atol=1e-4, rtol=1e-4)


def test_a_named_in_network_maps_the_last_dimension():
    layer = NIN(3, 2)
    torch.nn.init.normal_(layer.b)
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(layer(x), x @ layer.W + layer.b)


def test_norm_groups():
    assert [norm(c).num_groups for c in (3, 8, 16, 48, 128, 512, 130, 144)] == [1, 2, 4, 12, 32, 32, 26, 24]


def test_unusable_data_and_options_are_refused():
    for kind in (NCSNpp, DDPM):
        with pytest.raises(ValueError, match=f"{kind.__name__} of 3 levels needs image sides divisible by 4"):
            kind({"shape": [1, 8, 6]}, channels=[8, 8, 8])
        with pytest.raises(ValueError, match="for images"):
            kind({"shape": [1, 8, 8, 8]}, channels=[8])
        with pytest.raises(ValueError, match="needs 'shape'"):
            kind({"kind": "text", "vocabulary": 5})
        with pytest.raises(ValueError, match="no classes"):
            kind({"shape": [1, 8, 8]}, channels=[8], conditional=True)
    for option in ("embedding", "block", "input_pyramid", "output_pyramid"):
        wrong: dict[str, Any] = {option: "nearest"}
        with pytest.raises(ValueError, match=f"{option} of a NCSNpp is one of .*, got 'nearest'"):
            NCSNpp(DIGITS, **wrong)


BLOCK_NAMES = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time_emb_proj": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "conv_shortcut": "Conv_2",
    "group_norm": "GroupNorm_0",
}


def in_order(model):
    """Modules of diffusers' NCSN++ in the order of execution."""
    yield from (model.time_proj, model.time_embedding.linear_1, model.time_embedding.linear_2, model.conv_in)
    for level in model.down_blocks:
        for i, block in enumerate(level.resnets):
            yield block
            if hasattr(level, "attentions"):
                yield level.attentions[i]
        if level.resnet_down is not None:
            yield from (level.resnet_down, level.skip_conv)
    yield from (model.mid_block.resnets[0], model.mid_block.attentions[0], model.mid_block.resnets[1])
    for level in model.up_blocks:
        yield from level.resnets
        if hasattr(level, "attentions"):
            yield level.attentions[0]
        if level.resnet_up is not None:
            yield from (level.skip_norm, level.skip_conv, level.resnet_up)
    yield from (model.conv_norm_out, model.conv_out)


def renamed(module, name):
    """Name of the entry ``name`` of one of diffusers' modules in ours."""
    first, _, rest = name.partition(".")
    if type(module).__name__ == "GaussianFourierProjection":
        return "W"
    if type(module).__name__ == "Conv2d" and module.kernel_size == (1, 1):
        return f"Conv_0.{name}"
    if first.startswith("to_"):
        index = ("to_q", "to_k", "to_v", "to_out").index(first)
        return f"NIN_{index}.{'W' if name.endswith('weight') else 'b'}"
    return f"{BLOCK_NAMES[first]}.{rest}" if first in BLOCK_NAMES else name


def test_equals_the_skip_networks_of_diffusers():
    """UNet2DModel takes sigma and images in [0, 1], and divides by sigma."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    channels = [128, 128, 160]
    theirs = UNet2DModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
        center_input_sample=True,
        norm_eps=1e-6,
        mid_block_scale_factor=math.sqrt(2),
        norm_num_groups=None,
        attention_head_dim=None,
        resnet_time_scale_shift="default",
    ).eval()
    spec = {"kind": "image", "shape": [3, 8, 8]}
    ours = NCSNpp(spec, channels=channels, layers_per_block=2, attention=[4], **SKIP).eval()
    state = {
        f"all_modules.{i}.{renamed(module, name)}": value.t() if ".W" in renamed(module, name) else value
        for i, module in enumerate(in_order(theirs))
        for name, value in module.state_dict().items()
    }
    ours.load_state_dict(state, strict=True)
    x, sigma = torch.rand(4, 3, 8, 8), torch.tensor([0.02, 0.6, 4.0, 40.0])
    with torch.no_grad():
        expected = theirs(x, sigma).sample * sigma[:, None, None, None]
        answer = ours(2 * x - 1, sigma.log())
    assert (answer - expected).abs().max() < 1e-5 * expected.abs().max()
