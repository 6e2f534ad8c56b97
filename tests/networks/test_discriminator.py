"""Heads of discriminators on features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import parametrize

from lightning_sgm.networks import TimeAwareHeads

CHANNELS = (8, 12, 6)


def features(rows: int = 3, side: int = 8) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, count, side >> level, side >> level) for level, count in enumerate(CHANNELS)]


def heads(trained: bool = True, **arguments) -> TimeAwareHeads:
    torch.manual_seed(0)
    found = TimeAwareHeads(CHANNELS, **{"hidden": 5, "embed": 16, **arguments})
    if trained:
        for head in parts(found):
            torch.nn.init.normal_(head.conv.weight, std=0.2)
    return found


def parts(found: TimeAwareHeads) -> list[Any]:
    return list(found.heads)


def gradients(found: TimeAwareHeads) -> list[Tensor]:
    return [torch.full((), torch.nan) if p.grad is None else p.grad for p in found.parameters()]


def hinge(logits_real: Tensor, logits_made: Tensor) -> Tensor:
    return (1 - logits_real).relu().mean() + (1 + logits_made).relu().mean()


@pytest.mark.parametrize("train", [True, False])
def test_untrained_heads_say_the_same_of_everything(train: bool):
    found, levels = heads(trained=False).train(train), features()
    others = [level.flip(0) * 3 + 1 for level in levels]
    real, made = found(levels, torch.tensor([0.0, 3.0, 14.0])), found(others, torch.tensor([7.0, 1.0, 0.0]))
    assert real.shape == (3, 5 * (64 + 16 + 4))
    # One number for each logit of a head, whatever the pixel, image or time; spectral norms move a bit in training.
    for part in real.split([5 * 64, 5 * 16, 5 * 4], 1):
        spread = part.unflatten(1, (5, -1))
        torch.testing.assert_close(spread, spread[:1, :, :1].expand_as(spread), atol=1e-5, rtol=0)
    assert max(real.abs().max(), made.abs().max()) < 0.2
    torch.testing.assert_close(hinge(real, made), torch.tensor(2.0), atol=0.3 * train + 1e-5, rtol=0)
    torch.testing.assert_close(hinge(real, real), torch.tensor(2.0))


def test_untrained_heads_give_features_no_gradient_but_learn():
    found = heads(trained=False)
    levels = [level.requires_grad_() for level in features()]
    found(levels, torch.zeros(3)).square().sum().add(found(levels, torch.ones(3)).sum()).backward()
    assert all(level.grad is not None and not level.grad.any() for level in levels)
    for head in parts(found):
        assert head.conv.weight.grad.any()
        torch.nn.init.normal_(head.conv.weight, std=0.1)
    found(levels, torch.zeros(3)).mean().backward()
    assert all(level.grad is not None and level.grad.any() for level in levels)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(found))


def test_time_matters_and_examples_do_not_mix():
    found, levels = heads().eval(), features()
    label = torch.tensor([0.0, 3.0, 14.0])
    logits = found(levels, label)
    assert not torch.allclose(found(levels, label + 1), logits, atol=1e-3)
    for row in range(3):
        alone = found([level[row : row + 1] for level in levels], label[row : row + 1])
        torch.testing.assert_close(alone[0], logits[row], atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 5), width=st.integers(1, 5), shift=st.integers(0, 24))
def test_pixels_are_a_ring_of_any_length(height: int, width: int, shift: int):
    """Rolled sequences have rolled logits; a ring that is gone around twice has its logits twice."""
    head, length = parts(heads().eval())[0], height * width
    torch.manual_seed(length)
    sequence = torch.randn(2, 8, length)
    logits = head._logits(sequence)
    assert logits.shape == (2, 5, length)
    torch.testing.assert_close(head._logits(sequence.roll(shift, 2)), logits.roll(shift, 2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head._logits(sequence.repeat(1, 1, 2)), logits.repeat(1, 1, 2), atol=1e-4, rtol=1e-4)


def test_convolutions_have_spectral_norm_one():
    found = heads()
    with torch.no_grad():
        for head in parts(found):
            head.second.parametrizations.weight.original.mul_(7.0)
    for _ in range(50):
        found(features(), torch.zeros(3))
    for head in parts(found.eval()):
        for layer in (head.first, head.second, head.last):
            largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            torch.testing.assert_close(largest, torch.tensor(1.0), atol=1e-2, rtol=0)


def test_evaluation_changes_nothing_and_copies_agree():
    found = heads().eval()
    before, label = copy.deepcopy(found.state_dict()), torch.zeros(3)
    logits = found(features(), label)
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in before.items())
    other = heads(trained=False).eval()
    other.load_state_dict(before)
    assert torch.equal(other(features(), label), logits)
    assert torch.equal(copy.deepcopy(found)(features(), label), logits)


def test_two_forwards_before_one_backward():
    """Real and made images pass one after the other; spectral norms must not spoil the first one's graph."""
    found = heads()
    hinge(found(features(), torch.zeros(3)), found(features(), torch.ones(3))).backward()
    assert all(parametrize.is_parametrized(head.second) for head in parts(found))
    assert all(gradient.isfinite().all() for gradient in gradients(found))


def test_a_few_steps_tell_two_kinds_of_features_apart():
    found = heads(trained=False)
    optimiser = torch.optim.Adam(found.parameters(), 1e-2)
    real, made, label = features(), [level.flip(2).abs() for level in features()], torch.zeros(3)
    for _ in range(60):
        optimiser.zero_grad()
        loss = hinge(found(real, label), found(made, label))
        loss.backward()
        optimiser.step()
    assert loss < 0.6


def test_half_precision():
    found, label = heads().eval(), torch.tensor([0.0, 3.0, 14.0])
    with torch.autocast("cpu", torch.bfloat16):
        half = found(features(), label).float()
    torch.testing.assert_close(half, found(features(), label), atol=0.1, rtol=0.1)


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match=r"features of \[8, 12, 6\] channels, got \[8, 12\]"):
        heads()(features()[:2], torch.zeros(3))
    with pytest.raises(ValueError, match="a positive number of channels for each level"):
        TimeAwareHeads(())
    with pytest.raises(ValueError, match="hidden >= 1"):
        TimeAwareHeads((4,), hidden=0)


def test_features_with_channels_last_in_memory_are_read_too() -> None:
    """Torch's own backward pass crashes the interpreter there (2.13, CPU)."""
    heads = TimeAwareHeads([72])
    level = torch.randn(4, 72, 16, 16)
    label = torch.arange(4.0)
    heads.eval()
    plain = heads([level], label)
    last = heads([level.to(memory_format=torch.channels_last)], label)
    last.square().mean().backward()
    assert torch.equal(plain, last)
