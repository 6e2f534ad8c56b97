"""RADD: absorbing discrete diffusion with a time-free network (Ou et al. 2024, 2406.03736)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.methods.base import Batch, Decay, GenerativeModule
from lightning_sgm.metrics.likelihood import TokenLikelihood
from lightning_sgm.networks.base import Spec, TokenNetwork, build
from lightning_sgm.objectives.masked import MaskedObjective
from lightning_sgm.processes.absorbing import AbsorbingProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers.unmasking import UnmaskingSampler


class RADD(GenerativeModule):
    """Masked diffusion language model: the network estimates p(token | unmasked tokens) and never sees time.

    Args:
        network: a token network, or a factory that receives ``spec``.
        process: the absorbing process, log-linear by default.
        objective: one of the paper's four losses and how its masks are drawn.
        sampler: unmasking rule and number of steps.
        passes: repeated passes over the split by which ``test`` estimates the likelihood bound and its standard error.
        spec, optimizer, warmup, decay, exact, drop, metrics, test_samples: see :class:`GenerativeModule`; the paper's
            AdamW 3e-4, weight decay 0.03 and 2500 updates of warm-up.
    """

    def __init__(
        self,
        network: TokenNetwork | Callable[[Spec], TokenNetwork],
        spec: dict[str, Any],
        process: AbsorbingProcess = AbsorbingProcess(),
        objective: MaskedObjective = MaskedObjective(),
        sampler: UnmaskingSampler = UnmaskingSampler(),
        passes: int = 4,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.03),
        warmup: int = 2500,
        decay: Decay = "constant",
        exact: bool = False,
        drop: dict[str, float] | None = None,
        metrics: list[Metric] | None = None,
        test_samples: int = 64,
    ) -> None:
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        super().__init__(
            spec=spec,
            optimizer=optimizer,
            warmup=warmup,
            decay=decay,
            exact=exact,
            drop=drop,
            metrics=metrics,
            test_samples=test_samples,
        )
        self.record(locals())
        self.network = build(network, spec)
        self.process = process
        self.objective = objective
        self.sampler = copy.copy(sampler)  # it counts evaluations, and a default is shared by all models
        self.passes = passes
        self.denoiser = TokenDenoiser(self.network, process, spec["vocabulary"])
        self.likelihood = TokenLikelihood(bytes_per_token=spec.get("bytes_per_token"))

    @property
    def noise_device(self) -> torch.device:
        """Masks are drawn on the host, so that the number of masked positions is known without a device sync."""
        return torch.device("cpu")

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Any-order NLL bound per example, (B,): "loss" nats per sequence, "nll" nats per token, bits per byte."""
        conditions = self.conditions(batch, draw.fork(0) if self.training else None)
        terms = self.objective(self.denoiser, batch["x"], draw, **conditions)
        if self.spec.get("bytes_per_token"):
            terms["bits_per_byte"] = terms["nll"] / (math.log(2.0) * self.spec["bytes_per_token"])
        return terms

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Several passes with different masks; samples' metrics see the text once."""
        for repeat in range(self.passes):
            terms = self.losses(batch, self.evaluation_draw(batch, repeat))
            self.log_terms({"loss": terms["loss"]}, "test")
            self.likelihood.update(terms["nll"], batch["index"], tokens=batch["x"].shape[1])
        self.feed_real(batch)

    def on_test_epoch_end(self) -> None:
        """Perplexity and bits with standard errors, then the samples' metrics."""
        self.log_dict({f"test/{name}": value for name, value in self.likelihood.compute().items()}, sync_dist=True)
        self.likelihood.reset()
        super().on_test_epoch_end()

    def sample(self, indices: Tensor, prompt: Tensor | None = None, **conditions: Any) -> Batch:
        """Sequences (n, L) of real tokens; ``prompt`` (n, L) fixes all positions that are not the mask."""
        if prompt is None:
            prompt = torch.full((len(indices), self.spec["length"]), self.denoiser.mask_id)
        return {"x": self.sampler(self.denoiser, prompt.to(self.device), self.sample_draw(indices), **conditions)}
