"""Score-based generative modelling through SDEs (Song et al. 2021, 2011.13456), and every denoising model like it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from lightning_sgm.denoiser import Denoiser, Preconditioning
from lightning_sgm.methods.base import Batch, Curve, Decay, GenerativeModule
from lightning_sgm.methods.pictures import denoising_strips, loss_curve
from lightning_sgm.networks.base import Network, Spec, build
from lightning_sgm.objectives.denoising import DenoisingObjective
from lightning_sgm.processes.gaussian import VP, GaussianProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import first
from lightning_sgm.samplers.loop import Sampler


class ScoreSDE(GenerativeModule):
    """Denoising score matching under a Gaussian process and sampling by its reverse-time SDE or ODE.

    Args:
        network: a network, or a factory that receives ``spec``.
        process: how data become noise; VP by default.
        preconditioning: what the network predicts; noise, as for the paper's VP models, by default.
        objective: law of t and weights of the loss.
        sampler: rule, grid and hooks that run time backwards.
        spec, optimizer, warmup, decay, exact, drop, metrics, test_samples: see :class:`GenerativeModule`; Adam at 2e-4
            with 5000 updates of warm-up as in the paper.
    """

    def __init__(
        self,
        network: Network | Callable[[Spec], Network],
        spec: dict[str, Any],
        process: GaussianProcess = VP(),
        preconditioning: Preconditioning = Preconditioning(),
        objective: DenoisingObjective = DenoisingObjective(),
        sampler: Sampler = Sampler(),
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=2e-4),
        warmup: int = 5000,
        decay: Decay = "constant",
        exact: bool = False,
        drop: dict[str, float] | None = None,
        metrics: list[Metric] | None = None,
        test_samples: int = 256,
    ) -> None:
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
        self.denoiser = Denoiser(self.network, process, preconditioning)
        if preconditioning.prediction in ("noise", "score") and first(sampler.levels(process)[0]).alpha == 0:
            raise ValueError(
                f"nothing of the data is left at t = 1 under {type(process).__name__}, so {preconditioning.prediction} "
                "prediction says nothing about x_0 there: predict v, x0 or velocity, or sample on the grid LogUniform"
            )

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Weighted denoising error per example, (B,)."""
        conditions = self.conditions(batch, draw.fork(0) if self.training else None)
        return self.objective(self.denoiser, batch["x"], draw, **conditions)

    def sample(self, indices: Tensor, **conditions: Any) -> Batch:
        """Samples (n, *shape) in the data's range; a class-conditional network gets the classes in turn by default."""
        if "label" in getattr(self.network, "conditions", ()) and "label" not in conditions:
            conditions["label"] = indices.to(self.device) % self.spec["classes"]
        draw = self.sample_draw(indices)
        x = self.sampler(self.denoiser, (len(indices), *self.spec["shape"]), draw, **conditions)
        return {"x": x, **conditions}

    def pictures(self) -> dict[str, Batch | Curve]:
        """Images coming out of the noise, and the loss over the noise levels."""
        found: dict[str, Batch | Curve | None] = {"loss_by_level": loss_curve(self)}
        if self.spec["kind"] == "image":
            found["denoising"] = denoising_strips(self)
        return {name: picture for name, picture in found.items() if picture is not None}
