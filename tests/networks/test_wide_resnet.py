"""The wide residual network of the noise-conditional classifier."""

from __future__ import annotations

import pytest
import torch

from lightning_sgm.networks import WideResNet

CIFAR = {"kind": "image", "shape": [3, 32, 32], "classes": 10}
DIGITS = {"kind": "image", "shape": [1, 8, 8], "classes": 10}


def small(spec: dict = DIGITS, **arguments) -> WideResNet:
    torch.manual_seed(0)
    options = {"widths": [8, 16], "blocks_per_group": 1, "stem": 4, "embedding": 16, "frequencies": 8}
    return WideResNet(spec, **{**options, **arguments}).eval()


def parameters(network: WideResNet) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_sizes():
    """WideResNet-28-10 has 36.5 million (Zagoruyko and Komodakis 2016); the noise label adds the rest."""
    with torch.device("meta"):
        network = WideResNet(CIFAR)
    assert parameters(network) == 39_181_770
    label = [p.numel() for name, p in network.named_parameters() if name.startswith("embed") or ".shift." in name]
    assert parameters(network) - sum(label) == pytest.approx(36.5e6, rel=0.002)
    # 25 convolutions in blocks and the first, 3 shortcuts, one dense layer: 28 deep without the shortcuts.
    assert sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) == 25 + 3
    assert parameters(WideResNet(DIGITS, widths=[32, 64], blocks_per_group=1)) == pytest.approx(0.5e6, rel=0.05)


@pytest.mark.parametrize("noise", [-4.0, 0.0, 4.0])
def test_scale_and_brightness_of_an_image_do_not_matter(noise: float):
    network, x, label = small(), torch.randn(3, 1, 8, 8), torch.full((3,), noise)
    torch.testing.assert_close(network(7.0 * x + 2.0, label), network(x, label), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(network(-x, label), network(x, label), atol=1e-3)


def test_an_image_of_one_colour_is_not_blown_up():
    network = small()
    answer = network(torch.full((2, 1, 8, 8), 0.3), torch.zeros(2))
    torch.testing.assert_close(answer, network(torch.zeros(2, 1, 8, 8), torch.zeros(2)))
    nearly = torch.full((1, 1, 8, 8), 0.3) + 1e-6 * torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(network(nearly, torch.zeros(1)), answer[:1], atol=1e-3, rtol=1e-3)


def test_channels_are_normed_as_of_clean_images_at_any_noise():
    """x = (x0 + r eps) / sqrt(1 + r^2): the channels' means and deviations are taken off x0's share alone."""
    mean, std, ratio = torch.tensor([0.2, -0.1, 0.4]), torch.tensor([0.5, 0.25, 2.0]), 3.0
    plain, normed = small(CIFAR), small(CIFAR, mean=mean.tolist(), std=std.tolist())
    normed.load_state_dict(plain.state_dict())
    x0, eps = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    label, total = torch.full((2,), ratio).log(), (1 + ratio**2) ** 0.5
    shape = (3, 1, 1)
    x = (std.view(shape) * (x0 + ratio * eps) + mean.view(shape)) / total
    torch.testing.assert_close(normed(x, label), plain((x0 + ratio * eps) / total, label), atol=1e-4, rtol=1e-4)


def test_the_noise_label_matters():
    network, x = small(), torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    logits = network(x, torch.tensor([-2.0, 0.0, 2.0]))
    assert logits.shape == (3, 10)
    assert logits.std(0).min() > 1e-5
    one = network(x[:1], torch.zeros(1))
    torch.testing.assert_close(logits[1:2], one, atol=1e-5, rtol=1e-5)  # rows do not see each other


def test_all_parameters_learn_and_dropout_acts_in_training_only():
    network, x, label = small(dropout=0.5), torch.randn(4, 1, 8, 8), torch.linspace(-2, 2, 4)
    network(x, label).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert torch.equal(network(x, label), network(x, label))
    network.train()
    assert not torch.equal(network(x, label), network(x, label))


def test_unusable_data_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"data\.labels to true"):
        small({**DIGITS, "classes": 0})
    with pytest.raises(ValueError, match="classifies images"):
        small({"kind": "array", "shape": [3], "classes": 2})
    with pytest.raises(ValueError, match="6 channels"):
        small(widths=[6])
    with pytest.raises(ValueError, match="150 channels"):
        small(widths=[150])
    with pytest.raises(ValueError, match="mean of WideResNet needs a value for each of 1"):
        small(mean=[0.0, 0.0])
    with pytest.raises(ValueError, match="blocks_per_group >= 1"):
        small(blocks_per_group=0)
