"""Resampling with the filter [1, 3, 3, 1] as depthwise convolutions against zero-stuffing and a full-size convolution.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_fir.py`` prints CPU milliseconds of both on 16 x 128 x 32 x 32 images,
in both memory formats, and their ratios. The other contestant does what the reference's code does without its CUDA
extension: every channel by itself is padded, stuffed with zeros on the way up, filtered at full size, and thinned on
the way down. The contestants take turns, so that a busy machine slows all. The goal is a ratio of at least 10
(score_sde.md section 8).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sgm.networks.resample import FIRDown, FIRUp

SHAPE = (16, 128, 32, 32)
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0])


def full_size(x: Tensor, up: int, down: int, padding: tuple[int, int], gain: float) -> Tensor:
    """(B, C, H, W) with ``up - 1`` zeros after every pixel, filtered, and every ``down``-th pixel of that."""
    batch, channels, height, width = x.shape
    x = x.reshape(-1, 1, height, 1, width, 1)
    x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).view(batch * channels, 1, height * up, width * up)
    kernel = gain / 64 * torch.outer(TAPS, TAPS)[None, None]
    filtered = F.conv2d(F.pad(x, (*padding, *padding)), kernel)[:, :, ::down, ::down]
    return filtered.reshape(batch, channels, filtered.shape[2], filtered.shape[3])


@torch.inference_mode()
def main() -> None:
    """Print the two comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each contestant")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    pairs: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "down": (FIRDown(), lambda x: full_size(x, 1, 2, (1, 1), 1.0)),
        "up": (FIRUp(), lambda x: full_size(x, 2, 1, (2, 1), 4.0)),
    }
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        for name, contestants in pairs.items():
            seconds: tuple[list[float], list[float]] = ([], [])
            answers = [run(x) for run in contestants]  # and a first run of each, to warm up
            for _ in range(repeats):
                for run, times in zip(contestants, seconds, strict=True):
                    start = time.process_time()
                    run(x)
                    times.append(time.process_time() - start)
            ours, literal = (1e3 * statistics.median(times) for times in seconds)
            error = float((answers[0] - answers[1]).abs().max())
            title = f"{name}, {str(layout).removeprefix('torch.')}"
            print(
                f"{title:<24} ours {ours:6.1f} ms, zero-stuffing {literal:6.1f} ms, ratio {literal / ours:.1f} "
                f"(goal 10), largest difference {error:.0e}"
            )


if __name__ == "__main__":
    main()
