"""The residual network for super-resolution."""

from __future__ import annotations

import pytest
import torch

from lightning_sgm.networks import SRResNet
from lightning_sgm.networks.base import Spec
from lightning_sgm.testing import check_network

SMALL = {"kind": "image", "shape": [4, 6, 8], "low_shape": [3, 6, 8]}


def small(spec: Spec = SMALL, trained: bool = True, **arguments) -> SRResNet:
    torch.manual_seed(0)
    network = SRResNet(spec, **{"channels": 8, "blocks": 3, **arguments})
    if trained:
        torch.nn.init.normal_(network.last.weight, std=0.1)
    return network


def inputs(rows: int = 3, height: int = 6, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 4, height, width), torch.randn(rows), torch.rand(rows, 3, height, width)


def test_the_defaults_have_the_size_of_the_paper_page():
    network = SRResNet({"shape": [48, 16, 16], "low_shape": [3, 16, 16]})
    assert sum(p.numel() for p in network.parameters()) == 1_109_208
    assert network.feature_channels == (72, 72, 72)


@pytest.mark.parametrize("low", [[3, 6, 8], [3, 3, 4], [3, 12, 16]], ids=["same", "smaller", "larger"])
def test_it_is_a_network(low: list[int]):
    """Shapes, finite answers, gradients everywhere, no mixing in a batch."""
    spec = {**SMALL, "low_shape": low}
    check_network(small(spec), spec, {"low": torch.rand(3, *low)})


def test_an_untrained_network_answers_zero():
    x, noise, low = inputs()
    network = small(trained=False)
    assert not network(x, noise, low=low).any()
    # ... but its features, which feed discriminators, are there.
    assert all(level.std() > 0.1 for level in network.features(x, noise, low=low))


@pytest.mark.parametrize(("blocks", "places"), [(1, [1]), (2, [1]), (4, [1, 2]), (6, [1, 2, 3]), (10, [2, 4, 5])])
def test_features_are_means_over_squares_of_what_the_first_half_says(blocks: int, places: list[int]):
    x, noise, low = inputs()
    network, seen = small(blocks=blocks), []
    for block in network.blocks:
        block.register_forward_hook(lambda module, given, answer: seen.append(answer))
    features = network.features(x, noise, low=low)
    assert len(seen) == places[-1], "blocks behind the features are not asked"
    assert len(features) == len(network.feature_channels) == len(places)
    for level, place, channels in zip(features, places, network.feature_channels, strict=True):
        squares = seen[place - 1].reshape(3, channels, 3, 2, 4, 2)
        torch.testing.assert_close(level, squares.mean((3, 5)))


def test_features_of_odd_sizes():
    x, noise, low = inputs(1, 7, 5)
    assert [level.shape[2:] for level in small(blocks=6).features(x, noise, low=low)] == [(4, 3)] * 3


def test_what_is_far_away_does_not_matter_whatever_the_size():
    """Crops of a larger picture have the same answer inside: 2 + 2 x blocks convolutions see as many pixels around."""
    x, noise, low = inputs(1, 20, 24)
    network = small(blocks=2)
    whole = network(x, noise, low=low)
    part = network(x[..., :14], noise, low=low[..., :14])
    torch.testing.assert_close(part[..., :8], whole[..., :8], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(part[..., 8:], whole[..., 8:14], atol=1e-5)


@pytest.mark.parametrize("embedding", ["fourier", "positional"])
def test_the_noise_and_the_degraded_image_matter(embedding: str):
    x, noise, low = inputs()
    network = small(embedding=embedding)
    answer = network(x, noise, low=low)
    assert not torch.allclose(network(x, noise + 1, low=low), answer, atol=1e-4)
    assert not torch.allclose(network(x, noise, low=low.flip(3)), answer, atol=1e-4)


def test_half_precision_and_double_labels():
    x, noise, low = inputs()
    network = small()
    expected = network(x, noise, low=low)
    torch.testing.assert_close(network(x, noise.double(), low=low), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(x, noise, low=low).float(), expected, atol=0.05, rtol=0.05)


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="even channels and blocks >= 1, got 7 and 3"):
        small(channels=7)
    with pytest.raises(ValueError, match="blocks >= 1"):
        small(blocks=0)
    with pytest.raises(ValueError, match="SRResNet needs 'low_shape'"):
        small({"kind": "image", "shape": [3, 8, 8]})
    x, noise, low = inputs()
    with pytest.raises(ValueError, match=r"SRResNet needs degraded images 'low' of 3 channels and sides \[6, 8\]"):
        small()(x, noise, low=low[..., :4])
