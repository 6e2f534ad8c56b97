"""Attention in shifted windows (Swin: Liu et al. 2021, 2103.14030) and residual blocks, named as in ResShift's weights.

Sizes of images are free: windows that wrap around the border after a shift are kept apart by a mask which is made for
each size. It and the table of relative positions are no part of the state dict; released weights that have them load.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.score_blocks import norm

_EPS = 1e-5


def to_windows(x: Tensor, window: int) -> Tensor:
    """Images (B, C, H, W), sides multiples of ``window``, to (B, windows, pixels of a window, C), row by row."""
    x = x.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # (B, C, rows, window, columns, window)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`to_windows`."""
    x = windows.unflatten(2, (window, window)).unflatten(1, (height // window, width // window))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(windows), -1, height, width)


@lru_cache(maxsize=16)
def shift_mask(height: int, width: int, window: int, shift: int, released: bool, device: torch.device) -> Tensor:
    """Which pixels may see each other in windows of an image that was rolled up and left by ``shift`` pixels.

    Those of one window which were neighbours before. The code behind the released weights has it otherwise, by mistake
    (the axes of its table of regions are confused): only windows of the lowest row are cut, and into a left part and a
    right one, though it is their upper and lower parts that come from opposite ends of the image.

    Args:
        height: of the image.
        width: of the image.
        window: side of a window.
        shift: pixels.
        released: mask as the code behind the released weights does.
        device: of the answer.

    Returns:
        (windows, L, L) bool with L = window^2.
    """
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    if released:
        region = (row >= height - window) & (column % window >= window - shift)
    else:
        region = 2 * (row >= height - shift) + (column >= width - shift)
    region = to_windows(region[None, None].long(), window)[0, :, :, 0]
    return region[:, :, None] == region[:, None, :]


class WindowAttention(nn.Module):
    """Attention among the pixels of each window, with a learnt bias for every offset between two of them.

    Args:
        channels: of input and output, a multiple of ``heads``.
        heads: of attention.
        window: side of a window.
    """

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = place[:, None] - place[None, :] + window - 1
        index = offset[..., 0] * (2 * window - 1) + offset[..., 1]
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.register_load_state_dict_pre_hook(_check_index)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pixels to pixels.

        Args:
            x: (B, windows, L, C).
            mask: (windows, L, L) bool, true where a pixel (row) may see another (column); None for everywhere.

        Returns:
            (B, windows, L, C).
        """
        bias = self.relative_position_bias_table[self.relative_position_index].movedim(2, 0)[None]  # (1, heads, L, L)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None], -torch.inf)
        qkv = self.qkv(x).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (3, B, windows, heads, L, D)
        # Four dimensions, as fused kernels want: windows that share a bias are a batch, others are heads.
        q, k, v = qkv.flatten(1, 2) if mask is None else qkv.flatten(2, 3)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype))
        h = h.unflatten(0, x.shape[:2]) if mask is None else h.unflatten(1, (-1, self.heads))
        return self.proj(h.transpose(2, 3).flatten(3))


class SwinBlock(nn.Module):
    """Attention in windows, then two 1 x 1 convolutions, each normed and with a shortcut.

    Args:
        channels: of input and output.
        heads: of attention.
        window: side of a window, of which the sides of images must be multiples.
        shift: pixels by which the windows are off the border; 0 for none.
        released: see :func:`shift_mask`.
        ratio: hidden channels of the convolutions over ``channels``.
        dropout: behind attention and each convolution, in training.
    """

    def __init__(
        self, channels: int, heads: int, window: int, shift: int, released: bool, ratio: float, dropout: float
    ) -> None:
        super().__init__()
        self.window, self.shift, self.released, self.dropout = window, shift, released, dropout
        self.norm1, self.norm2 = norm(channels, _EPS), norm(channels, _EPS)
        self.attn = WindowAttention(channels, heads, window)
        hidden = int(channels * ratio)
        layers = {"fc1": nn.Conv2d(channels, hidden, 1), "act": nn.GELU(), "drop": nn.Dropout(dropout)}
        self.mlp = nn.Sequential(OrderedDict(layers | {"fc2": nn.Conv2d(hidden, channels, 1)}))
        self.register_load_state_dict_pre_hook(_check_mask)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        height, width = x.shape[2:]
        h, mask = self.norm1(x), None
        if self.shift:
            h = h.roll((-self.shift, -self.shift), (2, 3))
            mask = shift_mask(height, width, self.window, self.shift, self.released, x.device)
        h = self.attn(to_windows(h, self.window), mask)
        h = from_windows(h, self.window, height, width).roll((self.shift, self.shift), (2, 3))
        x = x + F.dropout(h, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class SwinLayer(nn.Module):
    """Blocks of attention in other channels than its input's; every second block has shifted windows.

    There is no shortcut around it.

    Args:
        channels: of input and output.
        inside: channels of the blocks.
        depth: blocks.
        heads: of attention.
        window: side of a window.
        shifted: whether windows shift; needless where one window is the whole image.
        released: see :func:`shift_mask`.
        ratio: hidden channels of the blocks' convolutions over ``inside``.
        dropout: in the blocks, in training.
    """

    def __init__(
        self,
        channels: int,
        inside: int,
        depth: int,
        heads: int,
        window: int,
        shifted: bool,
        released: bool,
        ratio: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, inside, 1)))
        shifts = [window // 2 if shifted and block % 2 else 0 for block in range(depth)]
        self.blocks = nn.Sequential(
            *(SwinBlock(inside, heads, window, shift, released, ratio, dropout) for shift in shifts)
        )
        self.patch_unembed = nn.Sequential(OrderedDict(proj=nn.Conv2d(inside, channels, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return self.patch_unembed(self.blocks(self.patch_embed(x)))


class ResidualBlock(nn.Module):
    """Two normed 3 x 3 convolutions, the second normed as the embedded label scales and shifts it, and a shortcut.

    Args:
        channels: of the input.
        out: channels of the output.
        embedded: features of the embedded label.
        dropout: before the second convolution, in training.
    """

    def __init__(self, channels: int, out: int, embedded: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(norm(channels, _EPS), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedded, 2 * out))
        self.out_layers = nn.Sequential(
            norm(out, _EPS), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(out, out, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Images (B, C, H, W) and embedded labels (B, F) to (B, out, H, W)."""
        scale, shift = self.emb_layers(embedded)[:, :, None, None].chunk(2, 1)
        h = self.out_layers[0](self.in_layers(x)) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, answering 0 at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


def _check_index(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Take the offsets out of a checkpoint's state, which they are no part of here, and see whether they are ours."""
    stored = state.pop(prefix + "relative_position_index", None)
    ours = cast(Tensor, module.relative_position_index)
    if stored is not None and not torch.equal(stored.to(ours), ours):
        args[-1].append(f"{prefix}relative_position_index of the checkpoint is not that of windows of this size")


def _check_mask(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Take the mask out of a checkpoint's state, which it is no part of here, and see whether it is of our kind."""
    stored = state.pop(prefix + "attn_mask", None)
    assert isinstance(module, SwinBlock)
    if stored is None or not module.shift:
        return
    # The last window has all there is to tell, at any size of the image. What may not be seen is at -100 there.
    side, released = 2 * module.window, module.released
    expected = shift_mask(side, side, module.window, module.shift, released, torch.device("cpu"))[-1]
    if stored.shape[1:] != expected.shape or not torch.equal(stored[-1].cpu() > -50.0, expected):
        args[-1].append(
            f"{prefix}attn_mask of the checkpoint is not what released_masks={released} makes: these weights were "
            f"trained with other masks, try released_masks={not released}"
        )
