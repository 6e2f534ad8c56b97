"""The two-channel transformer of PaD-TS (Li et al. 2025, 2501.00910) for windows of multivariate time series."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.networks.base import Network, Spec, entry
from lightning_sgm.networks.embed import SinusoidalEmbedding

_LABEL_WIDTH = 256  # features of the label's sinusoid


class DualChannel(Network):
    """One transformer whose tokens are the time steps and one whose tokens are the dimensions, summed.

    Only the first knows positions, so permuting dimensions permutes what the other does. Parameters are named as in
    the authors' checkpoints, which load strictly once ``feature2emb.pos_emb.pe``, which nothing reads, is left out.
    With D = 1 dimensions attend to nothing but themselves.

    Args:
        spec: of series; ``shape`` [L, D] is used.
        width: features of a token.
        heads: attention heads, which divide the width.
        encoders: blocks of each channel that do not see the noise level.
        blocks: further ones that do; the channel's output is the sum of theirs.
        dropout: after the positions of the time channel, in training.
        zero_init: start with an answer of zero and with closed gates. The paper's networks start from torch's usual
            weights instead: their first answer is several times larger than the data.
    """

    def __init__(
        self,
        spec: Spec,
        width: int = 128,
        heads: int = 4,
        encoders: int = 1,
        blocks: int = 3,
        dropout: float = 0.1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        shape = entry(spec, "shape", "DualChannel")
        if len(shape) != 2:
            raise ValueError(f"DualChannel is for series (L, D), got data of shape {list(shape)}: choose UNet or MLP")
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"width {width} of DualChannel must be a multiple of the number of heads, {heads}")
        if encoders < 0 or blocks < 1:
            raise ValueError(f"DualChannel needs encoders >= 0 and blocks >= 1, got {encoders} and {blocks}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        length, dimensions = shape
        self.sinusoid = SinusoidalEmbedding(_LABEL_WIDTH, cosines_first=True)
        self.time2emb = _Tokens(dimensions, width, length, dropout)
        self.feature2emb = _Tokens(length, width)
        self.time_encoder = _Encoder(width, heads, encoders)
        self.feature_encoder = _Encoder(width, heads, encoders)
        self.time_blocks = _Decoder(width, heads, blocks)
        self.feature_blocks = _Decoder(width, heads, blocks)
        self.fc_time = nn.Linear(width, dimensions)
        self.fc_feature = nn.Linear(width, length)
        if zero_init:
            blocks_of_both = (*self.time_blocks.encoder_blocks, *self.feature_blocks.encoder_blocks)
            for module in (self.fc_time, self.fc_feature, *(block.adaLN_modulation[1] for block in blocks_of_both)):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, label: Tensor, /) -> Tensor:
        """The answer, shaped like ``x`` (B, L, D).

        Args:
            x: noisy windows.
            label: (B,), the noise level; a chain's index in the paper. Frequencies suit labels that span hundreds.
        """
        level = self.sinusoid(label).to(x.dtype)
        time = self.time_blocks(self.time_encoder(self.time2emb(x)), level)
        feature = self.feature_blocks(self.feature_encoder(self.feature2emb(x.mT)), level)
        # The answer is added up in full precision: correlations of small movements are lost in half of it.
        with torch.autocast(x.device.type, enabled=False):
            return self.fc_time(time.to(x.dtype)) + self.fc_feature(feature.to(x.dtype)).mT


class _Positions(nn.Module):
    """A learnt vector per position, and dropout."""

    def __init__(self, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.pe = nn.Parameter(torch.empty(1, length, width).uniform_(-0.02, 0.02))
        self.dropout = dropout

    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(h + self.pe, self.dropout, self.training)


class _Tokens(nn.Module):
    """(B, N, features) to tokens (B, N, width), with positions if there is a ``length`` N."""

    def __init__(self, features: int, width: int, length: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.processing = nn.Sequential(nn.Linear(features, width))
        self.pos_emb = _Positions(length, width, dropout) if length else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the residual stream stays in the precision of x.
        return self.pos_emb(self.processing(x).to(x.dtype))


class _Attention(nn.Module):
    """Full attention among the tokens (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class _Block(nn.Module):
    """Pre-norm attention and MLP; LayerNorm has no parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = _Attention(width, heads)
        self.mlp = _MLP(width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(_norm(h))
        return h + self.mlp(_norm(h))


class _LevelBlock(_Block):
    """The same with shifts, scales and gates made from the noise level (DiT, Peebles and Xie 2023, 2212.09748)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, level: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, width) at ``level`` (B, 1, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(level).chunk(6, -1)
        h = torch.addcmul(h, gate1, self.attn(torch.addcmul(shift1, _norm(h), 1.0 + scale1)))
        return torch.addcmul(h, gate2, self.mlp(torch.addcmul(shift2, _norm(h), 1.0 + scale2)))


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int, count: int) -> None:
        super().__init__()
        self.encoder_blocks = nn.ModuleList([_Block(width, heads) for _ in range(count)])

    def forward(self, h: Tensor) -> Tensor:
        for block in self.encoder_blocks:
            h = block(h)
        return h


class _LevelEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_LABEL_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.mlp(sinusoid)


class _Decoder(nn.Module):
    """Blocks with a further residual around each; the answer is the sum of all blocks' outputs."""

    def __init__(self, width: int, heads: int, count: int) -> None:
        super().__init__()
        self.diffusion_step_emb = _LevelEmbedding(width)
        self.encoder_blocks = nn.ModuleList([_LevelBlock(width, heads) for _ in range(count)])

    def forward(self, h: Tensor, sinusoid: Tensor) -> Tensor:
        """Tokens (B, N, width) and (B, 256)."""
        level = self.diffusion_step_emb(sinusoid)[:, None]
        start = h
        for block in self.encoder_blocks:
            h = h + block(h, level)
        # h_k = u_k + h_{k-1}: the outputs u_k add up to what the state gained.
        return h - start


def _norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6)
