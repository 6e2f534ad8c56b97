"""Whether the standard error that ``test`` reports for a masked model is the true one, and small; loss by loss.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_likelihood_error.py --checkpoint FILE --text FILE`` passes the text
16 times under each of the four losses, ``--repeats`` times with other masks, and prints after 4, 8 and 16 passes

- bits: mean of the estimates over the repeats; the four should agree (t_DSE and t_DCE have the same estimate),
- error: what TokenLikelihood reports (root mean square over the repeats), in percent of the perplexity,
- spread: standard deviation of the estimates over the repeats, in the same unit, which the error should not fall short
  of (it takes batches for independent, and their levels are spread together),
- plain: the error without control variate.

The goal is an error of at most 0.5 % of the perplexity from at most 16 passes (radd.md section 10). ``--every`` takes
every so many batches of 32 blocks; errors are then scaled to the whole text, as 1 / sqrt(blocks).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from lightning_sgm import RADD, load
from lightning_sgm.metrics import TokenLikelihood
from lightning_sgm.objectives.masked import MaskedLoss, MaskedObjective
from lightning_sgm.random import Draw, mix

PASSES, BATCH = (4, 8, 16), 32
Found = dict[int, dict[str, Tensor]]


def batches_of(path: str, model: RADD, every: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Batches of blocks of a text as bytes, their numbers, and how many blocks there are in all."""
    if model.spec["tokenizer"] != "bytes":
        raise SystemExit("this benchmark reads bytes, and the model knows other tokens")
    tokens = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8).long()
    length = model.spec["length"]
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    batches, index = blocks.split(BATCH), torch.arange(len(blocks)).split(BATCH)
    return list(batches[::every]), list(index[::every]), len(blocks)


def estimates(model: RADD, objective: MaskedObjective, batches: list[Tensor], index: list[Tensor], seed: int) -> Found:
    """Estimates after each of PASSES: those that ``test`` prints, and "plain", the error without the control."""
    metric, plain = TokenLikelihood(), TokenLikelihood()
    found: Found = {}
    for repeat in range(max(PASSES)):
        for x, numbers in zip(batches, index, strict=True):
            nll, control = objective.evaluate(model.denoiser, x, Draw(mix(seed, repeat), numbers))
            metric.update(nll, numbers, x.shape[1], control)
            plain.update(nll, numbers, x.shape[1])
        if repeat + 1 in PASSES:
            found[repeat + 1] = {**metric.compute(), "plain": plain.compute()["standard_error"]}
    return found


@torch.inference_mode()
def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of a RADD on bytes")
    parser.add_argument("--text", required=True, help="held-out text file")
    parser.add_argument("--repeats", type=int, default=10, help="independent estimates")
    parser.add_argument("--every", type=int, default=6, help="1: the whole text")
    arguments = parser.parse_args()
    model = load(arguments.checkpoint).eval()
    assert isinstance(model, RADD)
    batches, index, total = batches_of(arguments.text, model, arguments.every)
    taken = sum(map(len, batches))
    percent = 100 * math.sqrt(taken / total)
    print(f"{taken} of {total} blocks, {arguments.repeats} repeats; errors in % of the whole text's perplexity")
    print("loss         passes    bits   error  spread   plain", flush=True)
    for loss in get_args(MaskedLoss):
        objective = MaskedObjective(loss)
        runs = [estimates(model, objective, batches, index, seed) for seed in range(arguments.repeats)]
        for passes in PASSES:
            nll = torch.stack([run[passes]["nll"] for run in runs])
            error, plain = (
                float(torch.stack([run[passes][name] for run in runs]).square().mean().sqrt()) * percent
                for name in ("standard_error", "plain")
            )
            bits, spread = float(nll.mean()) / math.log(2), float(nll.std()) * percent
            print(f"{loss:12} {passes:6} {bits:7.4f} {error:7.3f} {spread:7.3f} {plain:7.3f}", flush=True)


if __name__ == "__main__":
    main()
