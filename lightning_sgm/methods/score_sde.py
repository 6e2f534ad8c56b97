"""Score-based generative modelling through SDEs (Song et al. 2021, 2011.13456), and every denoising model like it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_sgm.denoiser import BaseDenoiser, Denoiser, Preconditioning
from lightning_sgm.guidance.classes import ClassifierFree
from lightning_sgm.likelihood import Likelihood
from lightning_sgm.methods.base import Batch, Curve, GenerativeModule
from lightning_sgm.methods.density import DensityTest
from lightning_sgm.methods.encoded import Encoded
from lightning_sgm.methods.learning_rate import Decay
from lightning_sgm.methods.pictures import denoising_strips, loss_curve
from lightning_sgm.methods.tasks import Task
from lightning_sgm.networks.base import Network, Spec, build
from lightning_sgm.objectives.denoising import DenoisingObjective
from lightning_sgm.processes.gaussian import VP, GaussianProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import first
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.ode import ODESampler


class ScoreSDE(GenerativeModule):
    """Denoising score matching under a Gaussian process and sampling by its reverse-time SDE or ODE.

    Args:
        network: a network, or a factory that receives ``spec``.
        process: how data become noise; VP by default.
        preconditioning: what the network predicts; noise, as for the paper's VP models, by default.
        objective: law of t and weights of the loss.
        sampler: rule, grid and hooks that run time backwards, or an adaptive solver of the probability-flow ODE.
        guidance: makes another denoiser of the model's for sampling, such as
            :class:`~lightning_sgm.guidance.ClassifierFree`.
        label: class of all samples, in 0 .. K - 1; "unconditional" or K for no class; None for all classes in turn.
            Only for a network or a guidance that takes a class.
        task: what samples are to complete, such as :class:`~lightning_sgm.methods.Inpaint`; None for samples from
            scratch. Checkpoints do not keep it: say it again to each command.
        likelihood: how ``test`` finds the bits per dimension of the data under the model without guidance; None: it
            does not. Each example costs about a hundred evaluations.
        likelihood_examples: of how many test examples, the first ones; None for all. Both follow the checkpoint in
            ``test``: give them as options.
        spec, optimizer, warmup, decay, exact, drop, metrics, test_samples, val_samples: see
            :class:`GenerativeModule`; Adam at 2e-4 with 5000 updates of warm-up as in the paper.
    """

    def __init__(
        self,
        network: Network | Callable[[Spec], Network],
        spec: dict[str, Any],
        process: GaussianProcess = VP(),
        preconditioning: Preconditioning = Preconditioning(),
        objective: DenoisingObjective = DenoisingObjective(),
        sampler: Sampler | ODESampler = Sampler(),
        guidance: Callable[[BaseDenoiser], BaseDenoiser] | None = None,
        label: int | Literal["unconditional"] | None = None,
        task: Task | None = None,
        likelihood: Likelihood | None = None,
        likelihood_examples: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=2e-4),
        warmup: int = 5000,
        decay: Decay = "constant",
        exact: bool = False,
        drop: dict[str, float] | None = None,
        metrics: list[Metric] | None = None,
        test_samples: int = 256,
        val_samples: int = 0,
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
            val_samples=val_samples,
        )
        self.record(locals(), forget=("task",))
        self.network = build(network, spec)
        self.process = process
        self.objective = objective
        self.sampler = copy.copy(sampler)  # it counts evaluations, and a default is shared by all models
        self.denoiser = Denoiser(self.network, process, preconditioning)
        self.guided = guidance(self.denoiser) if guidance is not None else self.denoiser
        self.takes_label = "label" in (*self.denoiser.conditions, *self.guided.conditions)
        self.classes = self.guided.classes or self.denoiser.classes or int(spec.get("classes", 0))
        self.label = self._class(label)
        self.task = task
        self.density = DensityTest(likelihood, spec, likelihood_examples) if likelihood is not None else None
        of_noise = preconditioning.prediction in ("noise", "score", "scaled_score")
        start = first(sampler.levels(process)[0])  # a grid that does not fit is told before training
        if of_noise and start.alpha == 0:
            raise ValueError(
                f"nothing of the data is left at t = 1 under {type(process).__name__}, so {preconditioning.prediction} "
                "prediction says nothing about x_0 there: predict v, x0 or velocity, or sample on the grid LogUniform"
            )

    def _class(self, label: int | Literal["unconditional"] | None) -> int | None:
        """The class as a number."""
        if label is not None and not self.takes_label:
            raise ValueError(
                f"label is {label}, but nothing here takes a class: set the network's conditional and data.labels to "
                "true, or give a guidance"
            )
        if isinstance(label, int) and not 0 <= label <= self.classes:
            raise ValueError(f"label must be in 0 .. {self.classes - 1}, or unconditional, got {label}")
        return self.classes if label == "unconditional" else label

    def on_fit_start(self) -> None:
        """Say what is trained, and what should be."""
        super().on_fit_start()
        if isinstance(self.guided, ClassifierFree) and not self.drop.get("label"):
            rank_zero_warn("ClassifierFree will ask for answers without a class: train them with drop: {label: 0.1}")

    def encode(self, batch: Batch) -> Encoded:
        """The data as they are, and the conditions that the network asks for."""
        return Encoded(batch["x"], self.conditions(batch))

    def decode(self, x0: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Samples as they are."""
        return x0

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Weighted denoising error per example, (B,)."""
        conditions = self.conditions(batch, draw.fork(0) if self.training else None)
        return self.objective(self.denoiser, batch["x"], draw, **conditions)

    def on_test_start(self) -> None:
        """Say what the likelihood depends on."""
        super().on_test_start()
        if self.density is not None:
            rank_zero_info(self.density.describe(self.process))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses, the likelihood if it is asked for, and real data for the sample metrics."""
        super().test_step(batch, batch_idx)
        if self.density is not None:
            self.density.update(self, self.denoiser, batch)

    def on_test_epoch_end(self) -> None:
        """Bits per dimension, then the samples' metrics."""
        if self.density is not None:
            found = self.density.compute(self.process)
            self.log_dict({f"test/{name}": value for name, value in found.items()}, sync_dist=True)
            self.density.reset()
        super().on_test_epoch_end()

    def sample(self, indices: Tensor, **conditions: Any) -> Batch:
        """Samples (n, *shape) in the data's range, of the classes ``label`` (n,) where one is taken.

        Without it they are of the model's class, or of all classes in turn. With a task there are also "before", what
        is known of each, and "truth" where that is known.
        """
        conditions = self.with_label(indices, conditions)
        draw = self.sample_draw(indices)
        if self.task is not None:
            found = self.task.solve(self.guided, self.sampler, self.spec, indices, draw, **conditions)
            return {**found, **conditions}
        x = self.sampler(self.guided, (len(indices), *self.spec["shape"]), draw, **conditions)
        return {"x": x, **conditions}

    def with_label(self, indices: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        """``conditions`` of the samples ``indices`` (n,), with the class where one is taken and none is given.

        Raises:
            ValueError: a class out of range.
        """
        if not self.takes_label:
            return conditions
        label = conditions.get("label")
        if label is None:
            label = indices.to(self.device)
            label = label % self.classes if self.label is None else torch.full_like(label, self.label)
        elif ((label < 0) | (label > self.classes)).any():
            raise ValueError(f"label must be in 0 .. {self.classes - 1}, or {self.classes} for no class")
        return {**conditions, "label": label}

    def pictures(self) -> dict[str, Batch | Curve]:
        """Images coming out of the noise, and the loss over the noise levels."""
        found: dict[str, Batch | Curve | None] = {"loss_by_level": loss_curve(self)}
        if self.spec["kind"] == "image":
            found["denoising"] = denoising_strips(self)
        return {name: picture for name, picture in found.items() if picture is not None}
