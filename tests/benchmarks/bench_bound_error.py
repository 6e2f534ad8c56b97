"""Standard error of a masked model's perplexity by each loss, with and without the control of the masked count.

Give a checkpoint of RADD; its own test text is read. Prints bits per byte (or per token), the error that the metric
reports, in per cent of the perplexity, and the ratio of the variances without and with the control.

    python tests/benchmarks/bench_bound_error.py runs/radd/version_0/checkpoints/last.ckpt --passes 16
"""

from __future__ import annotations

import argparse
import math

import torch

from datamodules import TextDataModule
from lightning_sgm import RADD
from lightning_sgm.io.checkpoint import hyper_parameters
from lightning_sgm.metrics import TokenLikelihood
from lightning_sgm.objectives.masked import MaskedLoss, MaskedObjective
from lightning_sgm.random import Draw, mix

LOSSES: tuple[MaskedLoss, ...] = ("k_DCE", "lambda_DCE", "t_DSE", "t_DCE")


@torch.inference_mode()
def measure(model: RADD, data: TextDataModule, loss: MaskedLoss, passes: int, control: bool) -> tuple[float, float]:
    """NLL in nats per token and its reported standard error."""
    metric, objective = TokenLikelihood(), MaskedObjective(loss)
    for batch in data.eval_loader("test"):
        for repeat in range(passes):
            draw = Draw(mix(2, repeat), batch["index"])
            nll, chance = objective.evaluate(model.denoiser, batch["x"], draw)
            metric.update(nll, batch["index"], batch["x"].shape[1], chance if control else None)
    found = metric.compute()
    return float(found["nll"]), float(found["standard_error"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--passes", type=int, default=16)
    given = parser.parse_args()
    model = RADD.from_pretrained(given.checkpoint)
    stored = hyper_parameters(given.checkpoint).data
    data = TextDataModule(**{key: value for key, value in stored.items() if not key.startswith("_")})
    data.setup()
    print(f"{data.count('test')} blocks of {data.length}, {given.passes} passes")
    for loss in LOSSES:
        nll, error = measure(model, data, loss, given.passes, control=True)
        _, plain = measure(model, data, loss, given.passes, control=False)
        bits = nll / math.log(2) / (data.spec["bytes_per_token"] or 1.0)
        gain = plain**2 / error**2
        print(f"{loss:<11}{bits:8.4f} bits/byte  perplexity error {100 * error:5.2f} %  variance / {gain:.2f}")


if __name__ == "__main__":
    main()
