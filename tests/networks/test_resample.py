from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sgm.networks.resample import down, down_with_weights, up, up_with_weights

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 8


def zero_stuffed(x, factor, before, after, gain):
    """The definition: zeros after every pixel, zeros around, the full convolution; every channel by itself."""
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h * factor, w * factor)
    wide[:, :, ::factor, ::factor] = x
    wide = F.pad(wide, (before, after, before, after)).flatten(0, 1)[:, None]
    return F.conv2d(wide, gain * torch.outer(TAPS, TAPS)[None, None]).view(b, c, wide.shape[2] - 3, wide.shape[3] - 3)


shapes = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=25)
@given(shapes)
def test_filters_are_zero_stuffing_and_convolution(shape):
    b, c, h, w = shape
    x = torch.randn(b, c, 2 * h, 2 * w, dtype=torch.float64)
    torch.testing.assert_close(down(True).double()(x), zero_stuffed(x, 1, 1, 1, 1.0)[:, :, ::2, ::2])
    torch.testing.assert_close(up(True).double()(x), zero_stuffed(x, 2, 2, 1, 4.0))


@pytest.mark.parametrize("fir", [False, True])
def test_constants_stay_constant_inside(fir):
    x = torch.full((1, 2, 8, 8), 3.0)
    assert torch.equal(down(fir)(x)[:, :, 1:-1, 1:-1], torch.full((1, 2, 2, 2), 3.0))
    assert torch.equal(up(fir)(x)[:, :, 1:-1, 1:-1], torch.full((1, 2, 14, 14), 3.0))


def test_ramps_stay_ramps_inside():
    """The filter is symmetric about the centres of the new pixels; copying pixels is not as smooth."""
    x = torch.arange(16.0).expand(1, 1, 16, 16)
    torch.testing.assert_close(down(True)(x)[0, 0, 2, 1:-1], torch.arange(2.5, 13, 2.0))
    torch.testing.assert_close(up(True)(x)[0, 0, 4, 2:-2], torch.arange(0.75, 14.5, 0.5))
    assert not torch.allclose(up(False)(x)[0, 0, 4, 2:-2], torch.arange(0.75, 14.5, 0.5))


@pytest.mark.parametrize("fir", [False, True])
def test_up_is_four_times_the_adjoint_of_down(fir):
    x, y = torch.randn(2, 3, 8, 12).double(), torch.randn(2, 3, 4, 6).double()
    torch.testing.assert_close((up(fir).double()(y) * x).sum(), 4 * (down(fir).double()(x) * y).sum())


@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 130])
def test_any_number_of_channels_and_layout(fir, channels):
    x = torch.randn(2, channels, 4, 6)
    for module, sides in ((down(fir), (2, 3)), (up(fir), (8, 12))):
        assert not module.state_dict()
        y = module(x)
        assert y.shape == (2, channels, *sides)
        torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), y)


def test_the_filter_is_exact_in_bfloat16():
    x = torch.randint(-4, 4, (1, 2, 4, 4)).float()
    for module in (down(True), up(True)):
        expected = module(x).bfloat16()
        assert torch.equal(module.bfloat16()(x.bfloat16()), expected)


def test_weights_behind_the_filter():
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    module: Any = down_with_weights(3, 5, fir=True).double()
    assert list(module.state_dict()) == ["Conv2d_0.weight", "Conv2d_0.bias"]
    nn.init.normal_(module.Conv2d_0.bias)
    filtered = zero_stuffed(x, 1, 2, 2, 1.0)
    torch.testing.assert_close(
        module(x), F.conv2d(filtered, module.Conv2d_0.weight, module.Conv2d_0.bias, stride=2), rtol=1e-9, atol=1e-9
    )


def test_weights_before_the_filter():
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    module: Any = up_with_weights(3, 5, fir=True).double()
    assert list(module.state_dict()) == ["Conv2d_0.weight", "Conv2d_0.bias"]
    nn.init.normal_(module.Conv2d_0.bias)
    wide = x.new_zeros(2, 3, 5, 7)  # no zero after the last pixel
    wide[:, :, ::2, ::2] = x
    convolved = F.conv2d(wide, module.Conv2d_0.weight, padding=2)
    expected = zero_stuffed(convolved, 1, 1, 1, 4.0) + module.Conv2d_0.bias[:, None, None]
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


def test_weights_without_the_filter():
    x = torch.randn(2, 3, 6, 8)
    halve: Any = down_with_weights(3, 5, fir=False)
    double: Any = up_with_weights(3, 5, fir=False)
    for module in (halve, double):
        assert list(module.state_dict()) == ["Conv_0.weight", "Conv_0.bias"]
    padded = F.pad(x, (0, 1, 0, 1))
    torch.testing.assert_close(halve(x), F.conv2d(padded, halve.Conv_0.weight, stride=2))
    copied = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(double(x), F.conv2d(copied, double.Conv_0.weight, padding=1))


@pytest.mark.parametrize("fir", [False, True])
def test_gradients_reach_images_and_weights(fir):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    for module in (down(fir), up(fir), down_with_weights(2, 3, fir), up_with_weights(2, 3, fir)):
        assert torch.autograd.gradcheck(module.double(), (x,))
        module(x).sum().backward()
        assert all(p.grad is not None and p.grad.ne(0).any() for p in module.parameters())
