"""Sampling cost of UnmaskingSampler against the reference's algorithm, written out, around the same network.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_unmasking.py`` prints CPU seconds per sequence (L = 128, 4 blocks,
width 128, random weights) and ratios; the contestants take turns, so that a busy machine slows all. The goals are
>= 15x at V = 50257, N = 512, batch 1; N = 4096 at most 1.1x one token at a time; at most 0.75x the reference at
V = 256, batch 8 (radd.md section 10).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.networks.masked_transformer import MaskedTransformer
from lightning_sgm.processes.absorbing import AbsorbingProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers.unmasking import UnmaskingSampler

LENGTH = 128


def literal_sample(denoiser: TokenDenoiser, rows: int, steps: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """The reference's loop: a joint float32 draw over V + 1 outcomes for every mask in every step, and its row cache.

    Returns the tokens (rows, LENGTH) and the network rows per sequence.
    """
    mask_id = denoiser.mask_id
    x = torch.full((rows, LENGTH), mask_id)
    cache = torch.empty(rows, LENGTH, denoiser.vocabulary)
    changed = torch.ones(rows, dtype=torch.bool)
    grid = torch.linspace(1.0, 1e-5, steps + 1, dtype=torch.float64)
    evaluated = 0
    for k in range(steps):
        if changed.any():
            cache[changed] = denoiser.log_probs(x[changed]).exp()
            evaluated += int(changed.sum())
        psi = 1.0 if k == steps - 1 else float(denoiser.process.reveal_probability(grid[k], grid[k + 1]))
        masked = x == mask_id
        probs = cache[masked]
        probs = torch.cat([psi * probs, torch.full((len(probs), 1), 1.0 - psi)], 1)
        race = 1e-10 - (torch.rand(probs.shape, generator=generator) + 1e-10).log()
        previous = x.clone()
        x[masked] = (probs / race).argmax(1)
        changed = (x != previous).any(1)
    return x, evaluated / rows


def build(vocabulary: int) -> TokenDenoiser:
    """A network with random weights, the head included."""
    torch.manual_seed(0)
    network = MaskedTransformer({"kind": "text", "vocabulary": vocabulary}).eval()
    torch.nn.init.normal_(network.output_layer.linear.weight, std=0.02)
    return TokenDenoiser(network, AbsorbingProcess(), vocabulary)


def compare(rows: int, repeats: int, contestants: dict[str, Callable[[int], float]]) -> dict[str, float]:
    """Median CPU seconds per sequence of each contestant, printed with its network rows per sequence."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    evaluations: dict[str, float] = {}
    for seed in range(repeats):
        for name, run in contestants.items():
            start = time.process_time()
            evaluations[name] = run(seed)
            seconds[name].append((time.process_time() - start) / rows)
    for name, values in seconds.items():
        print(f"  {name:<28} {statistics.median(values):8.3f} s/sequence ({evaluations[name]:.1f} network rows)")
    return {name: statistics.median(values) for name, values in seconds.items()}


def ours(denoiser: TokenDenoiser, rows: int, sampler: UnmaskingSampler) -> Callable[[int], float]:
    """A contestant: seed to network rows per sequence."""

    def run(seed: int) -> float:
        sampler(denoiser, torch.full((rows, LENGTH), denoiser.mask_id), Draw(seed, torch.arange(rows)))
        return sampler.evaluations

    return run


def literal(denoiser: TokenDenoiser, rows: int, steps: int) -> Callable[[int], float]:
    """The reference as a contestant."""
    return lambda seed: literal_sample(denoiser, rows, steps, torch.Generator().manual_seed(seed))[1]


@torch.inference_mode()
def main() -> None:
    """Print the three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contestant (a third of it for V = 50257)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    for vocabulary, rows, goal in ((256, 8, 1 / 0.75), (50257, 1, 15.0)):
        denoiser, steps = build(vocabulary), 512
        print(f"V={vocabulary} batch={rows} N={steps}")
        runs = {
            "reference": literal(denoiser, rows, steps),
            "ours": ours(denoiser, rows, UnmaskingSampler(steps)),
            "ours, top_p 0.9": ours(denoiser, rows, UnmaskingSampler(steps, top_p=0.9)),
        }
        times = compare(rows, repeats if vocabulary == 256 else max(1, repeats // 3), runs)
        print(f"  reference / ours {times['reference'] / times['ours']:.2f} (goal {goal:.2f})")
        limit = {
            "ours, N = 4096": ours(denoiser, rows, UnmaskingSampler(4096)),
            "ours, any order": ours(denoiser, rows, UnmaskingSampler(rule="any_order")),
        }
        times = compare(rows, repeats, limit)
        print(f"  N = 4096 / any order {times['ours, N = 4096'] / times['ours, any order']:.2f} (goal 1.10)")


if __name__ == "__main__":
    main()
