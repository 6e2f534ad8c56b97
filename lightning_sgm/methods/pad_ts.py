"""PaD-TS: population-aware diffusion for time series (Li et al. 2025, 2501.00910)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from datamodules.scaling import Scaling, difference
from lightning_sgm.denoiser import BaseDenoiser, Denoiser, Preconditioning
from lightning_sgm.guidance.clipping import InRange
from lightning_sgm.linear_denoiser import LinearDenoiser, LinearPreconditioning, Moments
from lightning_sgm.methods.base import Batch, Curve, GenerativeModule
from lightning_sgm.methods.encoded import Encoded
from lightning_sgm.methods.learning_rate import Decay
from lightning_sgm.methods.pictures import loss_curve
from lightning_sgm.methods.series_completion import CompletionTest, completed
from lightning_sgm.methods.series_inputs import SeriesInputs
from lightning_sgm.methods.series_tasks import SeriesTask
from lightning_sgm.networks.base import Network, Spec, build, entry
from lightning_sgm.networks.dual_channel import DualChannel
from lightning_sgm.objectives.population import PopulationObjective
from lightning_sgm.processes.chains import CosineChain, as_chain
from lightning_sgm.processes.gaussian import GaussianProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers.grids import ChainGrid
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.rules import Ancestral

_VIEWS = ("windows", "values", "correlations", "autocorrelation")
_FITTED, _NUMBERS = 20000, 1 << 27  # windows from which moments are learnt, and numbers in them, at most


class PaDTS(GenerativeModule):
    """Generates windows of multivariate series one by one and as a population: values and correlations are the data's.

    With nothing but ``spec`` it is the paper's method: a cosine chain of 250 steps, prediction of x_0 by the network of
    two channels, one time for all windows of a batch, the discrepancy of correlations beside the squared error, and the
    ancestral sampler with the chain's own variances and clipped estimates.

    Args:
        spec: of a :class:`~datamodules.SeriesDataModule`.
        network: a network for windows (L', D), or a factory that receives ``spec``.
        process: how windows become noise.
        preconditioning: what the network predicts; x_0, told the index, by default. One that knows the data's
            covariance, :class:`~lightning_sgm.linear_denoiser.LinearPreconditioning`, learns it when training starts.
        objective: law of t, weights, and the population term, which sees the windows behind the scaling.
        sampler: rule and grid that run time backwards; the paper's, over all indices of the chain, by default.
        clip: whether estimates of x_0 are kept in [-1, 1] in sampling from scratch; None: for data scaled by "minmax".
            Completions may leave that range, as the future of a series does.
        task: what samples are to complete, :class:`~lightning_sgm.methods.Forecast` or
            :class:`~lightning_sgm.methods.Impute`; ``test`` then reports the error on held-out windows, and ``predict``
            completes the file of ``--data.path``. None for windows from scratch. Checkpoints do not keep it.
        compared: windows of data and samples that are compared in pictures during training.
        optimizer, warmup, decay, exact, metrics, test_samples, val_samples: see :class:`GenerativeModule`; AdamW at
            1e-4 without weight decay, falling linearly to 0, as in the paper.

    Raises:
        ValueError: data of another kind; a grid or chain that does not fit.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        network: Network | Callable[[Spec], Network] = DualChannel,
        process: GaussianProcess = CosineChain(),
        preconditioning: Preconditioning = Preconditioning(prediction="x0", label="index"),
        objective: PopulationObjective | None = None,
        sampler: Sampler | None = None,
        clip: bool | None = None,
        task: SeriesTask | None = None,
        compared: int = 256,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0),
        warmup: int = 0,
        decay: Decay = "linear",
        exact: bool = False,
        metrics: list[Metric] | None = None,
        test_samples: int = 1024,
        val_samples: int = 0,
    ) -> None:
        super().__init__(
            spec=spec,
            optimizer=optimizer,
            warmup=warmup,
            decay=decay,
            exact=exact,
            metrics=metrics,
            test_samples=test_samples,
            val_samples=val_samples,
        )
        if compared < 2:
            raise ValueError(f"compared must be at least 2 windows, got {compared}")
        self.record(locals(), forget=("task",))
        self.scaling = Scaling(entry(spec, "scaling", "PaDTS"))
        self.shape: tuple[int, ...] = tuple(spec["shape"])
        self.network = build(network, spec)
        self.process = process
        self.objective = objective or PopulationObjective()
        if sampler is None:
            steps = as_chain(process, "the paper's sampler, which is taken without model.sampler,").steps
            sampler = Sampler(rule=Ancestral(noise="transition"), steps=steps, grid=ChainGrid())
        self.sampler = copy.copy(sampler)  # it counts evaluations
        self.moments: Moments | None = None
        if isinstance(preconditioning, LinearPreconditioning):
            self.moments = Moments(self.shape, preconditioning.floor)
            self.denoiser: Denoiser | LinearDenoiser = LinearDenoiser(
                self.network, process, preconditioning, self.moments
            )
            # Every process has learnt the same; DDP would send them again at every step.
            names = [f"moments.{name}" for name, _ in self.moments.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)
        else:
            self.denoiser = Denoiser(self.network, process, preconditioning)
        in_range = self.scaling.kind == "minmax" if clip is None else clip
        self.guided: BaseDenoiser = InRange(self.denoiser) if in_range else self.denoiser
        self.task = task
        self.compared = compared
        self._completion: CompletionTest | None = None
        self.sampler.levels(process)  # a grid that does not fit is told before training

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights for windows in other units."""
        trained = (checkpoint.get("hyper_parameters") or {}).get("spec", {}).get("scaling")
        if trained is not None:
            _require_same(trained, self.spec)
        super().on_load_checkpoint(checkpoint)

    def setup(self, stage: str) -> None:
        """Refuse data in other units than the model's, such as those of a model that was loaded."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None and "scaling" in getattr(data, "spec", {}):
            _require_same(self.spec["scaling"], data.spec)

    # Training.

    def on_fit_start(self) -> None:
        """Let the preconditioning learn, unless it came with a checkpoint, and say what is trained."""
        if self.moments is not None and not self.moments.fitted:
            data: Any = getattr(self.trainer, "datamodule", None)
            if data is None:
                raise ValueError("LinearPreconditioning learns the covariance from a DataModule: fit with one")
            windows = data.examples("train", max(2, min(_FITTED, _NUMBERS // math.prod(self.shape))))["x"]
            self.moments.fit(windows.to(self.device))
            rank_zero_info(f"LinearPreconditioning: learnt from {len(windows):,} training windows")
        if self.objective.population is not None:
            self.objective.population.restart()
        self.train()  # loaded models are in evaluation mode, where losses are others
        super().on_fit_start()

    def encode(self, batch: Batch) -> Encoded:
        """The windows as they are."""
        return Encoded(batch["x"], {})

    @property
    def _affine(self) -> bool:
        """Whether model space and original units differ by no more than a scale and a shift of each dimension."""
        return self.scaling.kind in ("minmax", "standard") and not any(self.spec["scaling"]["log"])

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """In training "loss" and "error" (B,) and the batch's "population"; else the squared error, "loss" (B,)."""
        if not self.training:
            return self.objective.evaluate(self.denoiser, batch["x"], draw)
        # Correlations do not see a scale and a shift.
        decode = None if self._affine else self.scaling.unscale
        return self.objective(self.denoiser, batch["x"], draw, decode=decode)

    # Sampling.

    def sample(self, indices: Tensor, **conditions: Any) -> Batch:
        """Windows (n, L', D) as the DataModule scales them; with a task held-out windows that are completed."""
        if self.task is not None:
            return completed(self, self.task, self._held_out(indices))
        x = self.sampler(self.guided, (len(indices), *self.shape), self.sample_draw(indices))
        return {"x": x}

    def _held_out(self, indices: Tensor) -> Batch:
        """Test windows, number i modulo their number."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is None:
            raise ValueError(f"{type(self.task).__name__} completes windows, give some: --data.path FILE.csv")
        chosen = indices.cpu() % data.count("test")
        return {"x": data.fetch("test", chosen, None)["x"].to(self.device), "index": indices}

    def inputs(self, path: str) -> Sequence[dict[str, Any]]:
        """The windows of a file that have gaps to fill, or the one whose future is to be forecast.

        Raises:
            ValueError: no task says which of the two, or the file does not suit the model.
            FileNotFoundError: no such file.
        """
        if self.task is None:
            raise ValueError("say what is to be found in the file: --model.task Impute or --model.task Forecast")
        return SeriesInputs(path, self, self.task.horizon)

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Samples, or the windows of a file completed."""
        if self.task is None:
            return super().predict_step(batch, batch_idx)
        return completed(self, self.task, batch if "known" in batch else self._held_out(batch["index"]))

    # Judging.

    def on_test_start(self) -> None:
        """With a task, judge completions and nothing else."""
        self._completion = None if self.task is None else CompletionTest(self.task, self.device)
        if self._completion is None:
            super().on_test_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses, and real data for the sample metrics or completions of them."""
        if self._completion is None:
            super().test_step(batch, batch_idx)
        else:
            self._completion.update(self, batch)

    def on_test_epoch_end(self) -> None:
        """The metrics of samples, or the errors of completions."""
        if self._completion is None:
            super().on_test_epoch_end()
            return
        found, self._completion = self._completion.compute(), None
        self.log_dict({f"test/{name}": value for name, value in found.items()}, sync_dist=True)

    def pictures(self) -> dict[str, Batch | Curve]:
        """Samples beside data: windows, values, correlations and autocorrelations; the loss over the noise levels."""
        found: dict[str, Batch | Curve] = {}
        curve = loss_curve(self)
        if curve is not None:
            found["loss_by_level"] = curve
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is None or self.task is not None:
            return found
        samples = self.sample(torch.arange(self.compared, device=self.device))["x"]
        # Those it learns from: held-out ones may be of another time, with other levels.
        real = data.examples("train", self.compared)["x"]
        return found | {view: {"x": samples, "real": real, "view": view} for view in _VIEWS}


def _require_same(trained: dict[str, Any], spec: Spec) -> None:
    """Raise a ValueError unless the data of ``spec`` are scaled as those a model was trained on."""
    if what := difference(trained, spec["scaling"], spec["columns"]):
        raise ValueError(
            f"the model was trained on windows in other units: {what}; give the data and the options of data it was "
            "trained with, or train anew"
        )
