"""Training throughput of MaskedTransformer + MaskedObjective against a literal, unfused RADD step on the same weights.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_radd_training.py`` prints, for each setting, CPU seconds per step of
both, tokens per second and the ratio; steps alternate, so that a busy machine slows both. The goals are 1.15x at
V = 256 and 2.5x at V = 50257 (radd.md section 10). Both run dropout, global-norm clipping and the same AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.networks.masked_transformer import MaskedTransformer
from lightning_sgm.objectives.masked import MaskedObjective
from lightning_sgm.processes.absorbing import AbsorbingProcess
from lightning_sgm.random import Draw

WIDTH, BLOCKS, HEADS, DROPOUT, LENGTH = 128, 4, 4, 0.02, 128


class LiteralBlock(nn.Module):
    """Weights of one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))


class LiteralHead(nn.Module):
    """Weights of the head."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width)
        self.linear = nn.Linear(width, vocabulary + 1)


class LiteralTransformer(nn.Module):
    """The network of radd.md section 3 as its reference runs it, with the parameter names of its checkpoints.

    The affine part is apart from the normalisation, q, k and v are all rotated (v by 0) with tables repeated for each,
    and head and log-softmax run at every position, over V + 1 columns.
    """

    def __init__(self, vocabulary: int, width: int, blocks: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_width, self.dropout = heads, width // heads, dropout
        self.vocab_embed = nn.ParameterDict({"embedding": torch.zeros(vocabulary + 1, width)})
        self.blocks = nn.ModuleList([LiteralBlock(width) for _ in range(blocks)])
        self.output_layer = LiteralHead(width, vocabulary)
        self.tables: tuple[Tensor, Tensor] | None = None

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Tables (1, length, 3, 1, head width) of cosines and sines."""
        if self.tables is None or self.tables[0].shape[1] != length:
            frequency = 1.0 / (10000 ** (torch.arange(0, self.head_width, 2).float() / self.head_width))
            angle = torch.arange(length).float()[:, None] * frequency[None]
            angle = torch.cat([angle, angle], -1)
            cos = angle.cos()[None, :, None, None].repeat(1, 1, 3, 1, 1)
            sin = angle.sin()[None, :, None, None].repeat(1, 1, 3, 1, 1)
            cos[:, :, 2] = 1.0
            sin[:, :, 2] = 0.0
            self.tables = cos, sin
        return self.tables

    @staticmethod
    def norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Normalise, then scale and shift."""
        return F.layer_norm(x.float(), x.shape[-1:]) * norm.weight[None, None] + norm.bias[None, None]

    def block(self, h: Tensor, block: LiteralBlock) -> Tensor:
        """(B, L, width) to the same."""
        rows, length, width = h.shape
        cos, sin = self.rotary(length)
        qkv = block.attn_qkv(self.norm(h, block.norm1)).reshape(rows, length, 3, self.heads, self.head_width)
        first, second = qkv.chunk(2, -1)
        q, k, v = (qkv * cos + torch.cat([-second, first], -1) * sin).unbind(2)
        a = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        a = block.attn_out(a.transpose(1, 2).reshape(rows, length, width))
        h = h + torch.ones(1) * F.dropout(a, self.dropout, self.training)
        m = block.mlp(self.norm(h, block.norm2))
        return h + torch.ones(1) * F.dropout(m, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, L, V + 1), the last column a raw logit."""
        h = self.vocab_embed["embedding"][x]
        for block in self.blocks:
            h = self.block(h, block)  # type: ignore[arg-type]
        h = self.output_layer.linear(self.norm(h, self.output_layer.norm_final))
        logits = h.clone()
        logits[:, :, :-1] = h[:, :, :-1].log_softmax(-1)
        return logits


def literal_loss(network: nn.Module, x0: Tensor, vocabulary: int) -> Tensor:
    """lambda_DCE of radd.md 2.3, per token, at every position and then masked."""
    rows = len(x0)
    level = torch.stack([(torch.rand(()) + i) / rows for i in range(rows)])[:, None]
    mask = torch.rand(x0.shape) < level
    logp = network(torch.where(mask, vocabulary, x0))
    nll = -torch.gather(logp, -1, x0[..., None]).squeeze(-1)
    return (torch.where(mask, nll, torch.zeros_like(nll)) / level).sum(-1).mean() / x0.shape[1]


def _stepper(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.03, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def compare(vocabulary: int, rows: int, steps: int) -> tuple[float, float]:
    """Median CPU seconds per training step, (literal, ours)."""
    torch.manual_seed(0)
    ours = MaskedTransformer({"kind": "text", "vocabulary": vocabulary}, WIDTH, BLOCKS, HEADS, DROPOUT)
    literal = LiteralTransformer(vocabulary, WIDTH, BLOCKS, HEADS, DROPOUT)
    literal.load_state_dict(ours.state_dict())
    x0 = torch.randint(vocabulary, (rows, LENGTH))
    denoiser = TokenDenoiser(ours, AbsorbingProcess(), vocabulary)
    objective, draw = MaskedObjective("lambda_DCE"), Draw(0)
    steppers = [
        _stepper(literal, lambda: literal_loss(literal, x0, vocabulary)),
        _stepper(ours, lambda: objective(denoiser, x0, draw)["loss"].mean()),
    ]
    seconds: list[list[float]] = [[], []]
    for i in range(steps + 2):
        for stepper, record in zip(steppers, seconds, strict=True):
            start = time.process_time()
            stepper()
            if i >= 2:
                record.append(time.process_time() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    """Print both settings of radd.md section 10."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    for vocabulary, rows, goal in ((256, 32, 1.15), (50257, 4, 2.5)):
        literal, ours = compare(vocabulary, rows, steps)
        speed = rows * LENGTH / ours
        print(
            f"V={vocabulary} batch={rows} L={LENGTH} {BLOCKS}x{WIDTH}: literal {literal:.3f} s, ours {ours:.3f} s "
            f"({speed:,.0f} tokens/s), {literal / ours:.2f}x (goal {goal}x)"
        )


if __name__ == "__main__":
    main()
