"""What every method shares: steps, logging at a cadence, optimiser and schedule, sampling by index, test metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from lightning_sgm.methods import learning_rate
from lightning_sgm.methods.judging import Rivalry, feed, judge, prepare
from lightning_sgm.methods.learning_rate import Decay
from lightning_sgm.metrics.base import ExampleMean
from lightning_sgm.optimizers import make_optimizer
from lightning_sgm.random import Draw, mix, run_seed

Batch = dict[str, Tensor]
_TRAIN, _EVALUATE, _SAMPLE = 1, 2, 3


class Curve(NamedTuple):
    """A picture of numbers: ``y`` (n,) over ``x`` (n,), with their names; ``log_x`` for a logarithmic axis."""

    x: Tensor
    y: Tensor
    x_name: str
    y_name: str
    log_x: bool = False


class GenerativeModule(LightningModule):
    """Base of all methods: a subclass builds its parts, gives :meth:`losses` and, if it generates, :meth:`sample`.

    Args:
        spec: what the data tell the model (shape, vocabulary, ...); linked from the DataModule by the command line.
        optimizer: callable from (name, parameter) pairs to an optimiser; torch's take such pairs as well as parameters.
        warmup: number of updates over which the learning rate rises linearly.
        decay: the learning rate after warm-up: "constant", "linear", "cosine", "trapezoid", or a number in (0, 1] by
            which every epoch multiplies it; see :func:`~lightning_sgm.methods.learning_rate.factor_of`.
        exact: noise in training keyed by example instead of drawn per batch, so that a step does not depend on how its
            batch is split over processes.
        drop: probability with which a condition is replaced by its null value in training, by name; a label of K
            classes becomes K (classifier-free guidance, Ho and Salimans 2022).
        metrics: metrics of samples against data, filled by ``test`` from one sampling pass.
        test_samples: how many samples ``test`` draws for them.
        val_samples: how many each validation draws for them, to see them over time; 0 for none.

    Attributes:
        ema_parts: names of the trained parts, which the EMA averages and compile sees.
        unsaved: prefixes of the names of weights that checkpoints leave out, as they come from elsewhere.
        last_loss: detached loss of the latest training step, for progress displays.
        on_part: set by progress displays; a method that makes a sample in parts calls it with those done and in all.
        rivals: names of what :meth:`rivals_of` gives; () for a method whose samples do not complete data.
    """

    ema_parts: tuple[str, ...] = ("network",)
    unsaved: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    network: nn.Module

    def __init__(
        self,
        *,
        spec: dict[str, Any],
        optimizer: OptimizerCallable,
        warmup: int = 0,
        decay: Decay = "constant",
        exact: bool = False,
        drop: dict[str, float] | None = None,
        metrics: list[Metric] | None = None,
        test_samples: int = 256,
        val_samples: int = 0,
    ) -> None:
        super().__init__()
        if val_samples < 0:
            raise ValueError(f"val_samples must be at least 0, got {val_samples}")
        learning_rate.check(warmup, decay)
        if test_samples < 1:
            raise ValueError(f"test_samples must be at least 1, got {test_samples}; for no samples set metrics to []")
        self.spec = spec
        self.optimizer = optimizer
        self.warmup, self.decay = warmup, decay
        self.exact = exact
        self.drop = drop or {}
        self.test_samples, self.val_samples = test_samples, val_samples
        self.metrics: list[Metric] = list(metrics or [])
        self._rivalry: Rivalry | None = None
        self.means = nn.ModuleDict()
        self.last_loss: Tensor | None = None
        self.on_part: Callable[[int, int], None] | None = None
        self._sums: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._summed = 0
        self._logged_at = 0
        # Sampling: a process without a share has nothing to do.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def record(self, arguments: dict[str, Any], forget: tuple[str, ...] = ()) -> None:
        """Keep the constructor's arguments in checkpoints; call it with ``locals()`` at the end of a constructor.

        Under the command line these are class paths and plain values, so a checkpoint alone rebuilds the model. In
        Python only plain values can be kept: ``lightning_sgm.load(path, network=...)`` is then given the parts.

        Args:
            arguments: of the constructor.
            forget: those that say what the model is used for now, and are to have their defaults in later commands.
        """
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters(ignore=forget)
        else:
            kept = {k: v for k, v in arguments.items() if k not in ("self", "__class__", *forget) and _is_plain(v)}
            self.save_hyperparameters({**kept, "_class_path": f"{type(self).__module__}.{type(self).__qualname__}"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, allow: tuple[str, ...] = (), **overrides: Any) -> Self:
        """The model in a folder that ``export`` wrote, or in a checkpoint; see :func:`lightning_sgm.load`.

        Raises:
            FileNotFoundError, ValueError: as ``load``, or the model is of another class.
        """
        import lightning_sgm  # resolves ``load`` on first use: methods do not know files

        module = lightning_sgm.load(folder, allow, **overrides)
        if not isinstance(module, cls):
            raise ValueError(f"{folder} holds a {type(module).__name__}, not a {cls.__name__}")
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is ``unsaved``."""
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if not name.startswith(self.unsaved)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what is ``unsaved`` in, as it is: loading stays strict about everything else."""
        own = {name: value for name, value in self.state_dict().items() if name.startswith(self.unsaved)}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}

    def exported(self) -> GenerativeModule:
        """The model that ``export`` writes."""
        return self

    # What a method gives.

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Named terms per example, each (B,); "loss" is what training minimises the mean of."""
        raise NotImplementedError

    def sample(self, indices: Tensor, **conditions: Any) -> Batch:
        """A batch whose "x" holds the samples numbered ``indices`` (n,), each a function of (run seed, number)."""
        raise NotImplementedError

    def rivals_of(self, batch: Batch) -> dict[str, Tensor]:
        """Of a method that completes data: its own answer as "samples" and others, each to be compared with "x"."""
        raise NotImplementedError

    def inputs(self, path: str) -> Sequence[dict[str, Any]]:
        """What ``predict`` is to complete from a file or folder: batches of one with "index" and "name", read late.

        Raises:
            ValueError: the method completes no files.
            FileNotFoundError: no such file.
        """
        raise ValueError(f"{type(self).__name__} completes no files: leave out --data.path")

    @property
    def samples_wanted(self) -> int:
        """How many samples ``predict`` draws if it is not told."""
        return 16

    @property
    def can_sample(self) -> bool:
        """Whether the method has a :meth:`sample`: a classifier has not."""
        return type(self).sample is not GenerativeModule.sample

    # Randomness and conditions.

    @property
    def updates(self) -> int:
        """Optimiser updates of the model itself so far: the clock of all cadences."""
        return self.trainer.global_step if self._trainer is not None else 0

    def sample_draw(self, indices: Tensor) -> Draw:
        """The noise of the samples numbered ``indices``."""
        return Draw(mix(run_seed(), _SAMPLE), keys=indices.to(self.device))

    def evaluation_draw(self, batch: Batch, repeat: int = 0) -> Draw:
        """Noise of an evaluation: the same for an example every time and in any batch; ``repeat`` numbers passes."""
        return Draw(mix(_EVALUATE, repeat), keys=batch["index"].to(self.noise_device))

    def _train_draw(self, batch: Batch) -> Draw:
        # Counts finished batches, not updates: with gradient accumulation every micro-batch has its own noise, and a
        # step that an interruption cut short is repeated with the same.
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed
        common = mix(run_seed(), _TRAIN, step)
        if self.exact:
            return Draw(common, keys=batch["index"].to(self.noise_device))
        return Draw(mix(run_seed(), _TRAIN, step, self.global_rank), device=self.noise_device, common=common)

    @property
    def noise_device(self) -> torch.device:
        """Where noise of the losses is drawn."""
        return self.device

    def conditions(self, batch: Batch, draw: Draw | None = None) -> dict[str, Tensor]:
        """The entries of the batch that the network asks for; with ``draw`` some are dropped, as in training."""
        found: dict[str, Tensor] = {}
        for name in getattr(self.network, "conditions", ()):
            value = batch[name]
            if draw is not None and name in self.drop:
                dropped = draw.uniform((len(value),)).to(value.device) < self.drop[name]
                null = torch.full_like(value, self.spec["classes"])
                value = torch.where(dropped.reshape(-1, *(1,) * (value.ndim - 1)), null, value)
            found[name] = value
        return found

    # Steps.

    def on_fit_start(self) -> None:
        """Say what is trained, and let metrics of validations refuse data before hours are spent on them."""
        if self.val_samples and self.metrics:
            prepare(self, self.metrics)
        known = getattr(self.network, "conditions", ())
        if wrong := sorted(set(self.drop) - set(known)):
            raise ValueError(
                f"drop names {', '.join(wrong)}, but the network's conditions are {', '.join(known) or 'none'}"
            )
        if self.exact and (dropping := _dropping(self)):
            rank_zero_warn(
                f"exact is true, but {dropping} draws its dropout for a whole batch: set dropout to 0 for steps that "
                "do not depend on the number of processes"
            )
        names = ", ".join(
            f"{type(part).__name__} with {sum(p.numel() for p in part.parameters() if p.requires_grad):,} parameters"
            for part in (getattr(self, name) for name in self.ema_parts)
        )
        rank_zero_info(f"{type(self).__name__}: {names}")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a batch; terms are summed on the device and logged at the trainer's cadence."""
        terms = self.losses(batch, self._train_draw(batch))
        self.tally({name: term.detach().mean() for name, term in terms.items()})
        return terms["loss"].mean()

    def tally(self, means: dict[str, Tensor], latest: dict[str, Tensor] | None = None) -> None:
        """Keep a step's numbers, scalars on the device, for the next time of logging.

        Args:
            means: of terms, "loss" among them; their mean over the steps is logged.
            latest: logged as they are in the last step.
        """
        self.last_loss, self._latest = means["loss"], latest or {}
        for name, value in means.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._summed += 1

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log means since the last time, learning rate included; stop on a loss that is no longer a number."""
        if self.updates % self._cadence == 0 and self.updates > self._logged_at and self._summed:
            self._logged_at = self.updates
            # All processes are here together; each gets the mean over all, so they also stop together.
            means = torch.stack(list(self._sums.values())).double() / self._summed
            means = self.trainer.strategy.reduce(means, reduce_op="mean")
            values = {f"train/{name}": value for name, value in zip(self._sums, means.tolist(), strict=True)}
            self._sums, self._summed = {}, 0
            if not all(math.isfinite(value) for value in values.values()):
                raise FloatingPointError(
                    f"the training loss is not a number in the {self._cadence} updates before update {self.updates}: "
                    f"{values}; the last good checkpoint is kept. Lower the learning rate or clip gradients."
                )
            values |= {f"train/{name}": float(value) for name, value in self._latest.items()}
            values["train/learning_rate"] = float(self.trainer.optimizers[0].param_groups[0]["lr"])
            for logger in self.loggers:
                logger.log_metrics(values, step=self.updates)

    @property
    def _cadence(self) -> int:
        return max(1, int(getattr(self.trainer, "log_every_n_steps", 50)))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Terms averaged over the examples of the split, with the same noise at every validation."""
        self.log_terms(self.losses(batch, self.evaluation_draw(batch)), "val")
        if self._judging:
            self.feed_real(batch)

    def on_validation_start(self) -> None:
        """As :meth:`on_test_start`, where validations draw samples."""
        if self._judging:
            self._prepare_judgement()

    def on_validation_epoch_end(self) -> None:
        """Judge samples, where validations draw them."""
        if self._judging:
            self._judge("val", self.val_samples)

    @property
    def _judging(self) -> bool:
        return bool(self.val_samples and self.metrics) and not self.trainer.sanity_checking

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation; real data are fed to the sample metrics."""
        self.log_terms(self.losses(batch, self.evaluation_draw(batch)), "test")
        self.feed_real(batch)

    def log_terms(self, terms: dict[str, Tensor], stage: str) -> None:
        """Log the means of per-example terms over all examples of an evaluation, on all processes."""
        for name, term in terms.items():
            key = name.replace(".", "_")  # modules have no dots in their names
            if key not in self.means:
                self.means[key] = ExampleMean().to(self.device)
            mean = self.means[key]
            assert isinstance(mean, ExampleMean)
            mean.update(term)
            self.log(f"{stage}/{name}", mean, on_step=False, on_epoch=True, metric_attribute=f"means.{key}")

    def on_test_start(self) -> None:
        """Metrics are no parts of the model (their feature networks stay out of its checkpoints)."""
        self._prepare_judgement()

    def feed_real(self, batch: Batch) -> None:
        """Show real data to the metrics of samples, and where samples complete data, those too."""
        if self._rivalry is not None:
            self._rivalry.update(self.rivals_of(batch), batch["x"], self.sampler_evaluations)
            return
        for metric in self.metrics:
            feed(metric, batch, real=True)

    def on_test_epoch_end(self) -> None:
        """Judge samples and, as the floor, training data by the same metrics."""
        if self.metrics:
            self._judge("test", self.test_samples)

    def _prepare_judgement(self) -> None:
        prepare(self, self.metrics)
        self._rivalry = Rivalry(self.metrics, self.rivals) if self.rivals and self.metrics else None

    def _judge(self, stage: str, count: int) -> None:
        if self._rivalry is not None:
            values, self._rivalry = self._rivalry.compute(self), None
        else:
            values = judge(self, self.metrics, count, floor=stage == "test")
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)

    # Sampling.

    @property
    def sampler_evaluations(self) -> float:
        """Network evaluations per sample in the latest call of :meth:`sample`."""
        return float(getattr(getattr(self, "sampler", None), "evaluations", 0.0))

    def sample_batches(self, count: int, batch_size: int = 256) -> Iterator[Tensor]:
        """This rank's share of the sample numbers 0..count-1, in batches."""
        mine = torch.arange(count)[self.global_rank :: self.trainer.world_size]
        yield from mine.split(batch_size)

    @torch.no_grad()
    def generate(self, count: int, batch_size: int = 256) -> Batch:
        """Samples 0..count-1 in evaluation mode and without gradients: the way to sample from Python."""
        training = [part for part in self.modules() if part.training]
        self.eval()
        try:
            parts = [self.sample(indices.to(self.device)) for indices in torch.arange(count).split(batch_size)]
        finally:
            for part in training:
                part.training = True
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def pictures(self) -> dict[str, Batch | Curve]:
        """Further pictures of a model in training by name, drawn where samples are: batches of samples, or curves."""
        return {}

    def on_predict_start(self) -> None:
        """Refuse what has no samples."""
        if not self.can_sample:
            raise ValueError(f"{type(self).__name__} does not sample, so it has nothing to predict: use test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Samples for a batch of sample numbers, ``batch["index"]``."""
        return {**self.sample(batch["index"]), "index": batch["index"]}

    # Optimisation.

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser over all parameters that require a gradient, with warm-up and decay per update."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"{type(self.network).__name__} has nothing to train: use test or predict")
        optimizer = make_optimizer(self.optimizer, named)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        """Warm-up and decay per update."""
        if self.trainer.max_steps == -1 and self.trainer.max_epochs == -1:
            learning_rate.check_end(self.decay)
        factor = learning_rate.factor_of(
            self.warmup, self.decay, lambda: self.trainer.estimated_stepping_batches, self._epoch
        )
        return LambdaLR(optimizer, factor)

    def _epoch(self) -> float:
        """Updates of an epoch."""
        batches = self.trainer.num_training_batches
        return math.ceil(batches / self.trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf


def _dropping(module: nn.Module) -> str:
    """The first part with dropout, or ""."""
    for name, part in module.named_modules():
        share = part.p if isinstance(part, nn.Dropout) else vars(part).get("dropout", 0.0)
        if isinstance(share, float) and share > 0:
            return name
    return ""


def _is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` reads it back."""
    if isinstance(value, dict):
        return all(_is_plain(v) for pair in value.items() for v in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str)
