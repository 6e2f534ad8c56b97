"""The U-Net of ResShift. It was compared with the reference's own code: answers and features agree to 1e-5."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sgm.networks import SwinUNet
from lightning_sgm.networks.base import Spec
from lightning_sgm.testing import check_network

X4 = {"kind": "image", "shape": [3, 64, 64], "low_shape": [3, 64, 64]}
FACES = {"kind": "image", "shape": [8, 64, 64], "low_shape": [3, 512, 512]}
SMALL = {"kind": "image", "shape": [4, 16, 16], "low_shape": [3, 16, 16]}


def small(spec: Spec = SMALL, trained: bool = True, **arguments) -> SwinUNet:
    torch.manual_seed(0)
    options = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "swin_channels": 16, "head_channels": 8, "window": 4}
    network = SwinUNet(spec, **{**options, **arguments}).eval()
    if trained:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def inputs(rows: int = 2, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 4, height, width), torch.arange(1.0, rows + 1), torch.rand(rows, 3, height, width)


def shapes(spec: Spec) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {key: list(value.shape) for key, value in SwinUNet(spec, released_masks=True).state_dict().items()}


def test_sizes_and_names_are_those_of_the_released_weights():
    """564 entries at x4, of which the 18 tables of offsets and 6 masks are no part of ours."""
    found = shapes(X4)
    with torch.device("meta"):
        network = SwinUNet(X4)
    assert sum(p.numel() for p in network.parameters()) == 118_593_583
    assert network.multiple == 64
    assert network.feature_channels == (160, 320, 320, 640, 640)
    swin_blocks = [key for key in found if key.endswith("relative_position_bias_table")]
    # Every block has a table of offsets, and every second one of levels larger than a window a mask.
    swin_layers = [key for key in swin_blocks if ".blocks.1." in key]
    on_last_level = ("input_blocks.10.", "middle_block.", "output_blocks.0.")
    masks = [key for key in swin_layers if not key.startswith(on_last_level)]
    assert (len(found), len(swin_blocks), len(masks)) == (540, 18, 6)
    assert len(found) + len(swin_blocks) + len(masks) == 564
    expected = {
        "time_embed.0.weight": [640, 160],
        "time_embed.2.weight": [640, 640],
        "input_blocks.0.0.weight": [160, 6, 3, 3],
        "input_blocks.1.0.in_layers.0.weight": [160],
        "input_blocks.1.0.in_layers.2.weight": [160, 160, 3, 3],
        "input_blocks.3.0.op.weight": [160, 160, 3, 3],
        "input_blocks.4.0.emb_layers.1.weight": [640, 640],
        "input_blocks.4.0.out_layers.0.bias": [320],
        "input_blocks.4.0.out_layers.3.weight": [320, 320, 3, 3],
        "input_blocks.4.0.skip_connection.weight": [320, 160, 1, 1],
        "input_blocks.10.1.patch_embed.proj.weight": [192, 640, 1, 1],
        "input_blocks.10.1.patch_unembed.proj.weight": [640, 192, 1, 1],
        "input_blocks.7.1.blocks.1.norm1.weight": [192],
        "input_blocks.7.1.blocks.1.norm2.weight": [192],
        "input_blocks.7.1.blocks.1.attn.relative_position_bias_table": [225, 6],
        "input_blocks.7.1.blocks.1.attn.qkv.weight": [576, 192],
        "input_blocks.7.1.blocks.1.attn.proj.weight": [192, 192],
        "input_blocks.7.1.blocks.1.mlp.fc1.weight": [768, 192, 1, 1],
        "input_blocks.7.1.blocks.1.mlp.fc2.weight": [192, 768, 1, 1],
        "middle_block.0.in_layers.2.weight": [640, 640, 3, 3],
        "middle_block.1.blocks.0.attn.qkv.bias": [576],
        "middle_block.2.out_layers.3.weight": [640, 640, 3, 3],
        "output_blocks.0.0.in_layers.2.weight": [640, 1280, 3, 3],
        "output_blocks.2.1.conv.weight": [640, 640, 3, 3],
        "output_blocks.3.1.patch_embed.proj.weight": [192, 320, 1, 1],
        "output_blocks.11.0.in_layers.2.weight": [160, 320, 3, 3],
        "out.0.weight": [160],
        "out.2.weight": [3, 160, 3, 3],
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not any(key.startswith("feature_extractor") for key in found)


def test_larger_degraded_images_come_down_through_convolutions():
    found = shapes(FACES)
    stem = {key: value for key, value in found.items() if key.startswith("feature_extractor") and "weight" in key}
    assert stem == {
        "feature_extractor.0.weight": [16, 3, 3, 3],
        "feature_extractor.2.op.weight": [32, 16, 3, 3],
        "feature_extractor.3.weight": [32, 32, 3, 3],
        "feature_extractor.5.op.weight": [64, 32, 3, 3],
        "feature_extractor.6.weight": [64, 64, 3, 3],
        "feature_extractor.8.op.weight": [128, 64, 3, 3],
    }
    assert found["input_blocks.0.0.weight"] == [160, 8 + 128, 3, 3]
    assert found["out.2.weight"] == [8, 160, 3, 3]


@pytest.mark.parametrize("low", [[3, 16, 16], [3, 8, 8], [3, 64, 64]], ids=["same", "smaller", "larger"])
def test_it_is_a_network(low: list[int]):
    """Shapes, finite answers, gradients everywhere, no mixing in a batch."""
    spec = {**SMALL, "low_shape": low}
    check_network(small(spec, trained=False), spec, {"low": torch.rand(3, *low)})


def test_an_untrained_network_answers_zero():
    x, noise, low = inputs()
    network = small(trained=False)
    assert not network(x, noise, low=low).any()
    assert all(level.std() > 0.01 for level in network.features(x, noise, low=low))


def test_features_are_halved_images_the_last_and_the_middle():
    x, noise, low = inputs()
    network, seen = small(multipliers=[1, 2, 2], window=2, blocks=2), {}
    for name in ("input_blocks.3", "input_blocks.6", "input_blocks.8", "middle_block"):
        stage = network.get_submodule(name)
        stage.register_forward_hook(lambda module, given, answer, name=name: seen.update({name: answer}))
    decoded = []
    network.output_blocks[0].register_forward_hook(lambda *given: decoded.append(given))
    features = network.features(x, noise, low=low)
    assert all(found is expected for found, expected in zip(features, seen.values(), strict=True))
    assert [level.shape[1:] for level in features] == [(16, 8, 8), (32, 4, 4), (32, 4, 4), (32, 4, 4)]
    assert tuple(level.shape[1] for level in features) == network.feature_channels
    assert not decoded  # the encoder only


def test_other_sizes_work_and_leave_no_trace():
    network = small()
    x, noise, low = inputs()
    before = network(x, noise, low=low)
    wide = inputs(height=8, width=24)
    assert network(wide[0], wide[1], low=wide[2]).shape == (2, 4, 8, 24)
    assert torch.equal(network(x, noise, low=low), before)
    assert torch.equal(small()(x, noise, low=low), before)


def test_levels_of_one_window_do_not_shift():
    """As in the reference, where it is the spec's size that decides, not the image's."""
    shifts = {name: module.shift for name, module in small().named_modules() if hasattr(module, "shift")}
    larger = small({**SMALL, "shape": [4, 8, 8], "low_shape": [3, 8, 8]})
    assert {name: shift for name, shift in shifts.items() if shift} == {
        "input_blocks.1.1.blocks.1": 2,
        "input_blocks.3.1.blocks.1": 2,
        "middle_block.1.blocks.1": 2,
        "output_blocks.0.1.blocks.1": 2,
        "output_blocks.2.1.blocks.1": 2,
    }
    found = [name for name, module in larger.named_modules() if getattr(module, "shift", 0)]
    assert found == ["input_blocks.1.1.blocks.1", "output_blocks.2.1.blocks.1"]


def test_noise_degraded_image_and_masks_matter():
    x, noise, low = inputs()
    network = small()
    answer = network(x, noise, low=low)
    assert not torch.allclose(network(x, noise + 1, low=low), answer, atol=1e-4)
    assert not torch.allclose(network(x, noise, low=low.flip(3)), answer, atol=1e-4)
    other = small(released_masks=True)
    other.load_state_dict(network.state_dict())
    assert not torch.allclose(other(x, noise, low=low), answer, atol=1e-5)


def test_half_precision():
    x, noise, low = inputs()
    network = small()
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, noise, low=low).float()
    torch.testing.assert_close(half, network(x, noise, low=low), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 15}, "channels of SwinUNet must be even, got 15"),
        ({"blocks": 0}, "blocks of SwinUNet must be at least 1, got 0"),
        ({"multipliers": []}, "at least one of multipliers"),
        ({"swin_channels": 20}, "swin_channels 20 of SwinUNet cannot be split into heads of 8"),
        ({"window": 16}, r"multiples of 32 .* got \[16, 16\]"),
        ({"spec": {**SMALL, "low_shape": [3, 48, 48]}}, "3 times as long, no power of 2"),
        ({"spec": {"kind": "image", "shape": [4, 16, 16]}}, "SwinUNet needs 'low_shape'"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_images_that_do_not_fit_are_refused():
    x, noise, low = inputs(height=12)
    with pytest.raises(ValueError, match=r"multiples of 8 .* got \[12, 16\]: pad or crop"):
        small()(x, noise, low=low)
    x, noise, low = inputs()
    with pytest.raises(ValueError, match="SwinUNet needs degraded images 'low' of 3 channels"):
        small({**SMALL, "low_shape": [3, 64, 64]})(x, noise, low=low)
