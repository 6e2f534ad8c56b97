"""Attention in shifted windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sgm.networks.swin_blocks import (
    ResidualBlock,
    SwinBlock,
    WindowAttention,
    from_windows,
    shift_mask,
    to_windows,
)

CPU = torch.device("cpu")


def block(shift: int, released: bool = False) -> SwinBlock:
    """One that is attention alone, so that what it mixes is what attention mixes."""
    torch.manual_seed(0)
    found = SwinBlock(8, heads=2, window=4, shift=shift, released=released, ratio=2.0, dropout=0.0)
    found.norm1, found.mlp = nn.Identity(), nn.Sequential(nn.Conv2d(8, 8, 1))  # type: ignore[assignment]
    for p in found.mlp.parameters():
        nn.init.zeros_(p)
    return found.double()


def touched(found: SwinBlock, sides: tuple[int, int], pixel: tuple[int, int]) -> set[tuple[int, int]]:
    """The pixels whose answers change with one pixel."""
    x = torch.randn(1, 8, *sides, generator=torch.Generator().manual_seed(1)).double()
    other = x.clone()
    other[..., pixel[0], pixel[1]] += 1.0
    changed = (found(other) - found(x)).abs().sum(1)[0] > 1e-12
    return {(int(row), int(column)) for row, column in changed.nonzero()}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_windows_are_cut_row_by_row_and_put_together_again(batch: int, window: int, rows: int, columns: int):
    x = torch.randn(batch, 2, rows * window, columns * window)
    windows = to_windows(x, window)
    assert windows.shape == (batch, rows * columns, window**2, 2)
    assert torch.equal(from_windows(windows, window, *x.shape[2:]), x)
    last = x[:, :, -window:, -window:].flatten(2).transpose(1, 2)
    assert torch.equal(windows[:, -1], last)
    if columns > 1:
        assert torch.equal(windows[:, 1], x[:, :, :window, window : 2 * window].flatten(2).transpose(1, 2))


def test_attention_is_softmax_of_products_and_the_bias_of_each_offset():
    torch.manual_seed(0)
    window, heads, width = 3, 2, 4
    attention = WindowAttention(heads * width, heads, window).double()
    nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(2, 1, window**2, heads * width).double()
    answer = attention(x)
    q, k, v = attention.qkv(x[:, 0]).chunk(3, -1)
    table = attention.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, heads)
    for image in range(2):
        for i in range(window**2):
            parts = []
            for head in range(heads):
                own = slice(head * width, (head + 1) * width)
                logits = torch.stack(
                    [
                        q[image, i, own] @ k[image, j, own] / width**0.5
                        + table[i // 3 - j // 3 + 2, i % 3 - j % 3 + 2, head]
                        for j in range(window**2)
                    ]
                )
                parts.append(logits.softmax(0) @ v[image, :, own])
            torch.testing.assert_close(attention.proj(torch.cat(parts)), answer[image, 0, i])


def test_a_mask_that_hides_nothing_changes_nothing():
    torch.manual_seed(0)
    attention, x = WindowAttention(8, 2, 4), torch.randn(3, 6, 16, 8)
    mask = torch.ones(6, 16, 16, dtype=torch.bool)
    torch.testing.assert_close(attention(x, mask), attention(x))
    # Each window has its own mask: what is hidden in the last one does not touch the others.
    mask[-1] = torch.eye(16, dtype=torch.bool)
    answer = attention(x, mask)
    torch.testing.assert_close(answer[:, :-1], attention(x)[:, :-1])
    alone = attention.proj(attention.qkv(x[:, -1])[..., 16:])
    torch.testing.assert_close(answer[:, -1], alone)


@pytest.mark.parametrize("sides", [(8, 8), (8, 12), (4, 8)])
def test_shifted_windows_do_not_mix_what_the_border_tore_apart(sides: tuple[int, int]):
    """By exact enumeration: pixels see those of their window, whose borders lie at 2, 6, 10, .., and no others."""
    found = block(shift=2)
    place = [[(i + 2) // 4 for i in range(side)] for side in sides]
    for row in range(sides[0]):
        for column in range(0, sides[1], 3):
            expected = {
                (i, j)
                for i in range(sides[0])
                for j in range(sides[1])
                if place[0][i] == place[0][row] and place[1][j] == place[1][column]
            }
            assert touched(found, sides, (row, column)) == expected


def test_windows_that_do_not_shift_start_at_the_border():
    assert touched(block(shift=0), (8, 12), (5, 6)) == {(i, j) for i in range(4, 8) for j in range(4, 8)}


def test_masks_of_released_weights_cut_the_lowest_windows_into_left_and_right():
    mask = shift_mask(8, 12, 4, 2, True, CPU)
    right = torch.arange(16) % 4 >= 2
    halves = right[:, None] == right[None, :]
    assert mask[:3].all()
    assert all(torch.equal(window, halves) for window in mask[3:])
    # So pixels from both ends of the image are mixed, as they are in that code.
    assert (7, 6) in touched(block(shift=2, released=True), (8, 12), (0, 6))


@pytest.mark.parametrize("released", [False, True])
def test_stored_masks_and_offsets_are_compared_and_not_kept(released: bool):
    """What released weights store besides parameters: offsets, and 0 or -100 for pixels that may (not) be seen."""
    found = block(2, released)
    state = dict(found.state_dict())
    assert not any(key.endswith(("attn_mask", "relative_position_index")) for key in state)
    mask = shift_mask(16, 16, 4, 2, released, CPU)
    state["attn_mask"] = torch.where(mask, 0.0, -100.0)
    state["attn.relative_position_index"] = found.attn.relative_position_index.clone()
    found.load_state_dict(state)
    with pytest.raises(RuntimeError, match=f"attn_mask .* try released_masks={released}"):
        block(2, not released).load_state_dict(state)
    with pytest.raises(RuntimeError, match="relative_position_index of the checkpoint is not that"):
        found.load_state_dict(state | {"attn.relative_position_index": state["attn.relative_position_index"].T})


def test_masks_made_in_inference_serve_training():
    shift_mask.cache_clear()
    found, x = block(2), torch.randn(1, 8, 8, 8).double()
    with torch.inference_mode():
        answer = found(x)
    again = found(x)
    again.sum().backward()
    torch.testing.assert_close(again.detach(), answer.clone())
    assert shift_mask.cache_info().hits == 1


def test_a_residual_block_is_scaled_and_shifted_by_the_label():
    torch.manual_seed(0)
    found, x = ResidualBlock(8, 8, 4, 0.0), torch.randn(2, 8, 4, 4)
    label: Tensor = torch.randn(2, 4)
    assert torch.equal(found(x, label), x)  # the second convolution starts at zero
    last = found.out_layers[3]
    assert isinstance(last, nn.Conv2d)
    nn.init.dirac_(last.weight)
    hidden = found.out_layers[0](found.in_layers(x))
    film = found.emb_layers(label)
    expected = x + nn.functional.silu(hidden * (1 + film[:, :8, None, None]) + film[:, 8:, None, None])
    torch.testing.assert_close(found(x, label), expected)
