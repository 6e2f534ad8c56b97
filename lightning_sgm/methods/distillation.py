"""Distillation of a trained model into one that samples in one step, by terms that are named in a recipe.

TAD-SR (He et al. 2024, 2408.07476) and SinSR (Wang et al. 2024, 2311.14760) are recipes of it. The method owns teacher,
student and optimisers; what is learnt is up to the terms of :mod:`lightning_sgm.objectives.distillation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from lightning_sgm.methods.base import Batch, GenerativeModule
from lightning_sgm.methods.encoded import Encoded
from lightning_sgm.methods.learning_rate import Decay
from lightning_sgm.methods.parts import add_means, add_norms, by_name, gradient_norms, parts_of, require_manual
from lightning_sgm.methods.solutions import SolutionCache, Solutions
from lightning_sgm.methods.starts import Known, know, open_cache
from lightning_sgm.methods.students import check_alike, choose_samplers, describe, find_teacher, leave_out, make_student
from lightning_sgm.objectives.distillation import Data, Phase, Regression, Term
from lightning_sgm.optimizers import make_optimizer
from lightning_sgm.random import Draw, mix, run_seed
from lightning_sgm.samplers.loop import Sampler

_START = 4  # purpose of random numbers


class Distillation(GenerativeModule):
    """Trains a copy of a teacher to answer in one step, by any terms.

    The student is a model of the teacher's class: sampling, restoring, metrics and export are those of that class.
    One batch is one update of the student, and updates of critics do not count: ``trainer.max_steps`` and all cadences
    are in updates of the student. Checkpoints hold the student and the critics, not the teacher.

    Args:
        terms: what the student is asked for, such as :class:`~lightning_sgm.objectives.Regression`.
        spec: of the data.
        teacher: checkpoint of a ResShift or ScoreSDE model, or in Python the model itself. Later commands need it only
            to compare.
        student: a model of the teacher's class to be trained instead of a copy of the teacher, such as a smaller one.
        solver: the teacher's deterministic sampler, which the student learns to shorten; by default Euler's with the
            steps and the grid of the teacher's own.
        sampler: the student's; one evaluation by default.
        solutions: where the teacher's results are kept, for data that are ``fixed``: the noise of an example is then
            fixed too, and the teacher samples it only once. None: it samples every batch.
        critic_optimizer: of the critics.
        critic_steps: updates of the critics before each of the student.
        reuse_sample: the student is trained on the sample that the critics saw last (TAD-SR), not on a new one (SiD).
        micro_batches: parts into which a batch is split to save memory; their gradients are added up.
        clip: largest norm of the student's gradients, and of the critics'; None for no clipping.
        scale: standard deviation of what is modelled, in units of which terms count differences; None: the sigma_data
            of the teacher's preconditioning, or 1 where it has none.
        compare: show the teacher's results beside the student's, in ``test``, ``predict`` and pictures.
        optimizer, warmup, decay, exact, metrics, test_samples, val_samples: see :class:`GenerativeModule`, for the
            student; AdamW at 5e-5 without weight decay and 5000 updates of warm-up as in TAD-SR.

    Raises:
        FileNotFoundError: there is no such teacher, and no student either.
        ValueError: a teacher that cannot be distilled, or is for other data; samplers that do not begin at t = 1.
    """

    ema_parts = ("student.network",)
    teacher: Any
    student: Any

    def __init__(
        self,
        terms: list[Term],
        spec: dict[str, Any],
        teacher: str | GenerativeModule | None = None,
        student: GenerativeModule | None = None,
        solver: Sampler | None = None,
        sampler: Sampler | None = None,
        solutions: Solutions | None = None,
        critic_optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=5e-5, weight_decay=0.0
        ),
        critic_steps: int = 1,
        reuse_sample: bool = True,
        micro_batches: int = 1,
        clip: float | None = None,
        scale: float | None = None,
        compare: bool = True,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0),
        warmup: int = 5000,
        decay: Decay = "constant",
        exact: bool = False,
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
            metrics=metrics,
            test_samples=test_samples,
            val_samples=val_samples,
        )
        self.record(locals(), forget=("compare",))
        self._described: dict[str, Any] | None = None
        if not terms or min(critic_steps, micro_batches) < 1 or (clip is not None and clip <= 0):
            raise ValueError("a distillation needs terms, critic_steps >= 1, micro_batches >= 1 and clip > 0 or null")
        self.automatic_optimization = False
        self.terms = nn.ModuleList(terms)
        self.teacher = find_teacher(teacher, student, spec, solver, sampler)
        self.student = make_student(self.teacher, student)
        model = self.student if self.teacher is None else self.teacher
        check_alike(model, spec, "teacher")
        check_alike(self.student, spec, "student")
        self.solver, self.student.sampler = choose_samplers(model, solver, sampler)
        if self.teacher is not None:
            # It is compared where the student learns from it, and these are the squares that it teaches.
            self.teacher.sampler, self.teacher.spec = self.solver, spec
        if sampler is None or "_instantiator" in self.hparams:
            self._described = describe(self.student, spec, self.hparams.get("sampler"))
        if "_instantiator" in self.hparams:
            self.hparams["student"] = self._described
        self.solutions = solutions
        self._cache: SolutionCache | None = None
        self.critic_optimizer, self.critic_steps, self.reuse_sample = critic_optimizer, critic_steps, reuse_sample
        self.micro_batches, self.clip, self.compare = micro_batches, clip, compare
        self.scale = float(getattr(model.denoiser.preconditioning, "sigma_data", 1.0) if scale is None else scale)
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        for term in self._terms if self.teacher is not None else ():
            term.build(self.teacher.denoiser)

    # Parts.

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the student, and the teacher."""
        return (*self.student.rivals, "teacher") if self._compares else tuple(self.student.rivals)

    @property
    def network(self) -> Any:  # type: ignore[override]
        """The student's."""
        return self.student.network

    @property
    def process(self) -> Any:
        """That of both models."""
        return self.student.process

    @property
    def unsaved(self) -> tuple[str, ...]:  # type: ignore[override]
        """The teacher, and what the student leaves out itself."""
        return ("teacher.", *(f"student.{prefix}" for prefix in self.student.unsaved))

    @property
    def _terms(self) -> list[Term]:
        return cast("list[Term]", list(self.terms))

    @property
    def _critics(self) -> list[Term]:
        return [term for term in self._terms if term.has_critic]

    @property
    def _compares(self) -> bool:
        return self.compare and self.teacher is not None and bool(self.student.rivals)

    def train(self, mode: bool = True) -> Self:
        """The teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    # Before training.

    def configure_callbacks(self) -> list[Any]:
        """None; the Trainer asks before it looks at its own options, so that ours are told in their place.

        Raises:
            ValueError: the Trainer is to clip or accumulate gradients, which it cannot for a method of this kind.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            require_manual(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Let several processes train: each backward pass is of a part of the parameters.

        Raises:
            FileNotFoundError: the teacher is gone.
        """
        if stage != "fit":
            return
        if self.teacher is None:
            raise FileNotFoundError(f"there is no teacher {self.hparams.get('teacher')}: give --model.teacher FILE")
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def on_fit_start(self) -> None:
        """Say what is trained, and open the store of solutions.

        Raises:
            ValueError: solutions are to be kept of data that differ from epoch to epoch, or of another teacher.
        """
        rank_zero_info(
            f"{type(self).__name__}: {', '.join(self._names)}; the student is a {type(self.student).__name__}"
        )
        if self.solutions is not None:
            self._cache = open_cache(self.solutions, self.teacher, self.solver, self.trainer, self.device)

    def configure_optimizers(self) -> Any:
        """The student's optimiser with its schedule, and that of the critics if there are any."""
        network = self.student.network.named_parameters(prefix="student.network")
        named = [(name, p) for name, p in network if p.requires_grad]
        optimizer = make_optimizer(self.optimizer, named)
        found = [{"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}]
        if critics := [(name, p) for name, p in self.terms.named_parameters(prefix="terms") if p.requires_grad]:
            found.append({"optimizer": make_optimizer(self.critic_optimizer, critics)})
        return found

    # Training.

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Add what is known of the teacher's solutions, while the batch is where they are kept."""
        if (data := getattr(self.trainer, "datamodule", None)) is not None:
            batch = data.on_before_batch_transfer(batch, dataloader_idx)  # Lightning asks only one of the two
        if self._cache is None or not self.trainer.training:
            return batch
        values, known = self._cache.get(batch["index"])
        return {**batch, "solution": values} if known.all() else batch

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        """One update of the student, after those of the critics."""
        parts = [(part, self.teacher.encode(part)) for part in parts_of(batch, self.micro_batches)]
        known = [self._know(*part, number, 0) for number, part in enumerate(parts)]
        kept: Phase | None = None
        means: dict[str, Tensor] = {}
        for step in range(self.critic_steps if self._critics else 0):
            last = self.reuse_sample and step == self.critic_steps - 1
            seen = known if last else [self._know(*part, number, 1 + step) for number, part in enumerate(parts)]
            # The graphs of several parts at once would take the memory that parts are to save.
            kept, means = self._update_critics(seen, last and len(parts) == 1)
        own, norms = self._update_student(known, kept)
        self.tally({**means, **own}, norms)

    def _know(self, batch: Batch, encoded: Encoded, number: int, repeat: int) -> Known:
        """What there is to know of part ``number`` of a batch; ``repeat`` is other noise."""
        draw = self._train_draw(batch)
        draw = draw.fork(repeat) if draw.keys is not None else draw.fork(repeat, number)
        if self._cache is None:
            return know(self.teacher, self.solver, encoded, draw, draw)
        # What is solved for the critics is in the batch for the student, who starts there again.
        fixed = Draw(mix(run_seed(), _START), keys=batch["index"].to(self.noise_device))
        return know(self.teacher, self.solver, encoded, draw, fixed, batch, self._cache)

    def _phase(self, known: Known) -> Phase:
        start, data, conditions, draw, solve = known
        teacher: Any = None if self.teacher is None else self.teacher.denoiser
        shared: dict[str, Any] = {"data": data, "scale": self.scale, "decode": self.student.decode}
        return Phase(self.student.denoiser, teacher, solve, start, conditions, draw.fork(0), **shared)

    def _update_critics(self, seen: list[Known], keep: bool) -> tuple[Phase | None, dict[str, Tensor]]:
        """One update of the critics: the phase with the graph of the student's sample, if that is kept, and means."""
        optimizer = self._optimizers[1]
        optimizer.zero_grad()
        phase: Phase | None = None
        means: dict[str, Tensor] = {}
        for number, known in enumerate(seen):
            phase = self._phase(known)
            with torch.set_grad_enabled(keep):
                phase.sample  # noqa: B018  (made here, where the student's parameters may have a graph)
            with optimizer.toggle_model(sync_grad=number == len(seen) - 1):
                asked = {f"{name}_critic": term.critic(phase) for name, term in self._names.items()}
                losses = {name: loss for name, loss in asked.items() if loss is not None}
                total = torch.stack(list(losses.values())).sum(0)
                self._backward(means, {**losses, **phase.logged}, total, seen)
        # Not the optimiser's own step: Lightning would count it as an update of the model.
        self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None, self)
        return phase if keep else None, means

    def _update_student(self, known: list[Known], kept: Phase | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One update of the student: means, and norms of the gradients of the terms if this step is logged."""
        optimizer = self._optimizers[0]
        optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for number, each in enumerate(known):
            with optimizer.toggle_model(sync_grad=number == len(known) - 1):
                phase = self._phase(each) if kept is None else kept
                losses = {name: term.student(phase) for name, term in self._names.items()}
                total = torch.stack([term.weight * losses[name] for name, term in self._names.items()]).sum(0)
                if (self.updates + 1) % self._cadence == 0:
                    add_norms(norms, gradient_norms(self._names, losses, phase.sample), len(total) / _count(known))
                self._backward(means, {"loss": total, **losses, **phase.logged}, total, known)
        optimizer.step()
        cast("LRScheduler", self.lr_schedulers()).step()
        return means, norms

    def _backward(
        self, means: dict[str, Tensor], values: dict[str, Tensor], loss: Tensor, all_parts: list[Known]
    ) -> None:
        """Gradients of the losses (B,) of one of several parts, which together are a mean."""
        share = len(loss) / _count(all_parts)
        add_means(means, values, share)
        self.manual_backward(share * loss.mean())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients, which Lightning does not where there are several optimisers."""
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.clip)

    @property
    def _optimizers(self) -> list[LightningOptimizer]:
        found = self.optimizers()
        return cast("list[LightningOptimizer]", found if isinstance(found, list) else [found])

    @property
    def _names(self) -> dict[str, Term]:
        return by_name(self._terms)

    # Evaluation and samples: those of the student, and the teacher's beside them.

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Distances per example, (B,), as far as they can be had.

        "loss" is to the teacher's solution of the same start; "to_data", of models that complete data, to the data.
        """
        model = self.student if self.teacher is None else self.teacher
        phase = self._phase(know(model, self.solver, model.encode(batch), draw, draw))
        found = {} if self.teacher is None else {"loss": Regression().student(phase)}
        return {**found, "to_data": Data().student(phase)} if self.student.rivals else found

    def rivals_of(self, batch: Batch) -> dict[str, Tensor]:
        """As the student's, and what the teacher makes of the batch."""
        found: dict[str, Tensor] = self.student.rivals_of(batch)
        return {**found, "teacher": self._shown_teacher().rivals_of(batch)["samples"]} if self._compares else found

    @property
    def sampler_evaluations(self) -> float:
        """The student's."""
        return float(self.student.sampler_evaluations)

    def inputs(self, path: str) -> Sequence[Batch]:
        """As the student's."""
        found: Sequence[Batch] = self.student.inputs(path)
        return found

    def sample(self, indices: Tensor, **conditions: Any) -> Batch:
        """The student's samples; where they complete data, with the "teacher"'s."""
        return self._beside(lambda model: model.sample(indices, **conditions))

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """As :meth:`sample`, also of files."""
        return self._beside(lambda model: model.predict_step(batch, batch_idx))

    def _beside(self, answer: Callable[[GenerativeModule], Batch]) -> Batch:
        self.student.on_part = self.on_part
        found = answer(self.student)
        return {**found, "teacher": answer(self._shown_teacher())["x"]} if self._compares else found

    def _shown_teacher(self) -> GenerativeModule:
        """The teacher, who makes images in pieces as the user wants them of the student."""
        for name in ("on_part", "tile", "overlap", "tile_batch"):
            if hasattr(self.student, name):
                setattr(self.teacher, name, getattr(self.student, name))
        teacher: GenerativeModule = self.teacher
        return teacher

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Critics are left in the file where their teacher is gone: they judge what it makes of images."""
        weights, own = checkpoint["state_dict"], self.terms.state_dict(prefix="terms.")
        if any(name in weights and weights[name].shape != value.shape for name, value in own.items()):
            leave_out(self.hparams.get("teacher"), "its critics judge other features")
            self.teacher = None
        if self.teacher is None:
            kept = {name: value for name, value in weights.items() if not name.startswith("terms.")}
            checkpoint["state_dict"] = {**kept, **own}
        super().on_load_checkpoint(checkpoint)

    def exported(self) -> GenerativeModule:
        """The student alone, as a model of its class that samples in one step."""
        student: GenerativeModule = self.student
        if self._described is not None:
            student.hparams.update(self._described["init_args"])
        elif "_instantiator" in student.hparams:
            raise ValueError("a sampler that was made in Python is in no file: leave it out, or distil by a recipe")
        return student


def _count(parts: list[Known]) -> int:
    """Examples in all parts."""
    return sum(len(part.start) for part in parts)
