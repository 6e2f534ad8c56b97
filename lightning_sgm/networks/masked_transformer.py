"""The time-free bidirectional transformer of RADD (Ou et al. 2024, 2406.03736), for tokens with masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.base import Spec, TokenNetwork, entry
from lightning_sgm.networks.embed import Rotary

_SHORT = 512  # tokens up to which a table of all pairs is no burden


class MaskedTransformer(TokenNetwork):
    """Pre-norm transformer with rotary positions, no time input and a zero-initialised, untied head.

    At initialisation every token has probability 1 / V. Parameters are named as in the released checkpoints of RADD
    (``JingyangOu/radd-*``), which load strictly into ``width=768, blocks=12, heads=12`` (162,265,682 parameters); the
    embedding and the head keep a row for the mask V, but the head's row takes no part in anything. Any length works.

    Where ``positions`` are given, the out-projection and MLP of the last block and the head run only there. Under
    autocast the residual stream and LayerNorm stay float32.

    Args:
        spec: of text data; ``vocabulary`` is used.
        width: features of a token.
        blocks: number of transformer blocks.
        heads: attention heads; ``width / heads`` must be even.
        dropout: after attention and after the MLP of each block, in training.
        embedding_scale: of the table of tokens at first, which is uniform in +-scale / sqrt(width). 1 is the paper's; a
            small network that is trained for minutes learns faster from 8 unless the table's learning rate is high.
    """

    def __init__(
        self,
        spec: Spec,
        width: int = 128,
        blocks: int = 4,
        heads: int = 4,
        dropout: float = 0.02,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} must be an even multiple of the number of heads, {heads}")
        if blocks < 1:
            raise ValueError(f"a transformer needs at least one block, got {blocks}")
        self.vocabulary = int(entry(spec, "vocabulary", "MaskedTransformer"))
        self.vocab_embed = _TokenTable(self.vocabulary + 1, width, embedding_scale)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList([_Block(width, heads, dropout) for _ in range(blocks)])
        self.output_layer = _Head(width, self.vocabulary)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens (B, L) to logits (B, L, V), or (N, V) at the flat ``positions``."""
        tables = self.rotary_emb(x.shape[1], x.device)
        h = F.embedding(x, self.vocab_embed.embedding)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            h = block(h, tables, positions if i == last else None)
        return self.output_layer(h)


class _TokenTable(nn.Module):
    """Rows of the V tokens and the mask, uniform at first."""

    def __init__(self, rows: int, width: int, scale: float) -> None:
        super().__init__()
        end = scale * width**-0.5
        self.embedding = nn.Parameter(torch.empty(rows, width).uniform_(-end, end))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = _norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = _norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], positions: Tensor | None) -> Tensor:
        """(B, L, width) to the same, or to (N, width) at the flat ``positions``."""
        h = self._attend(self.norm1(x), tables)
        if positions is not None:
            h, x = (tensor.flatten(0, 1).index_select(0, positions) for tensor in (h, x))
        x = x + F.dropout(self.attn_out(h), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)

    def _attend(self, h: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Full attention among all positions, (B, L, width) to (B, L, width), before the out-projection."""
        cos, sin = tables
        qkv = self.attn_qkv(h).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # (B, heads, 3, L, head width)
        qk, v = qkv.split([2, 1], 2)  # split and unbind: the gradient of a slice would be a full tensor of zeros
        q, k = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin).to(v.dtype).unbind(2)
        attended = _attention(q, k, v.squeeze(2))
        return attended.transpose(1, 2).flatten(2)


class _Head(nn.Module):
    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.norm_final = _norm(width)
        self.linear = nn.Linear(width, vocabulary + 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to logits (..., V): the mask's row is left out of the product, so it never gets a gradient."""
        weight, bias = self.linear.weight[: self.vocabulary], self.linear.bias[: self.vocabulary]
        return F.linear(self.norm_final(x), weight, bias)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(head width)) v for (B, heads, L, head width)."""
    # On CPUs torch's fused kernel is slower in bfloat16 than in float32, and this is twice as fast as it.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= _SHORT:
        return (q @ k.mT).mul(q.shape[3] ** -0.5).softmax(-1, dtype=q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _norm(width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width)
    # Not zero: a constant input lets the zero-initialised head learn token frequencies at once, 0.48 bits/byte better
    # at step 250 (radd.md 10).
    nn.init.ones_(norm.bias)
    return norm
