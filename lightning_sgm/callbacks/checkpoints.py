"""Which checkpoints a run keeps: the latest and the best."""

from __future__ import annotations

import math
import os
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sgm.callbacks.clock import updates
from lightning_sgm.callbacks.throughput import untimed
from lightning_sgm.io.checkpoint import read_checkpoint


class Checkpoints(ModelCheckpoint):
    """Keeps ``last.ckpt``, from which a run continues, and ``best.ckpt``, by a validation metric.

    ``last.ckpt`` is written every ``every`` updates of the model, at the end of fit, and when fit is interrupted
    (SIGTERM, Ctrl-C, an error). It is never overwritten by weights that are not finite. ``best.ckpt`` is written after
    each validation that is better than all before it, also before a resumption in the same folder. Both can be
    resumed from. Lightning's own triggers (``save_top_k``, ``every_n_epochs``) are not used: it writes its last.ckpt
    only when a top-k file is written too, which happens at no fixed cadence and not at all after SIGTERM.

    Args:
        every: cadence of ``last.ckpt`` in optimiser updates of the model.
        monitor: metric that decides which is best; None for no ``best.ckpt``. Without validation there is none either.
        mode: whether the best is the smallest or the largest.
        folder: where to write; by default ``checkpoints`` in the run's folder.
        save_weights_only: leave out what resuming needs; the files then hold the (averaged) weights alone.
    """

    def __init__(
        self,
        every: int = 1000,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        folder: str | None = None,
        save_weights_only: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"the cadence of checkpoints must be at least 1 update, got {every}")
        super().__init__(
            dirpath=folder,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_on_exception=True,
            save_weights_only=save_weights_only,
            enable_version_counter=False,
        )
        self.every = every
        self._seen = 0
        self._saved = -1

    @property
    def state_key(self) -> str:
        """One entry per run, whatever the cadence: changing it must not lose the rest."""
        return type(self).__name__

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting where a resumed run is, and find out what was best before."""
        self._seen = self._saved = updates(trainer, pl_module)
        self.best_model_score, self.best_model_path = None, ""
        path = self._path("best")
        if self._seen > 0 and self.monitor is not None and os.path.exists(path):
            # Not from the file resumed from: a last.ckpt may have been written before the validation of its step.
            state = read_checkpoint(path).get("callbacks", {}).get(self.state_key, {})
            if state.get("monitor") == self.monitor and state.get("score") is not None:
                self.best_model_score, self.best_model_path = torch.tensor(state["score"]), path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write last.ckpt at the cadence and after the last batch.

        The last batch's file is written here because soon after Lightning closes the epoch: from there, a run that
        stopped in the middle or on the last batch of one would not continue with the right batch.
        """
        now = updates(trainer, pl_module)
        due = now // self.every > self._seen // self.every
        self._seen = now
        if due or _is_stopping(trainer) or 0 < trainer.max_steps <= trainer.global_step:
            self._save_last(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write last.ckpt if the run has been stopped since the last batch."""
        if _is_stopping(trainer):
            self._save_last(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write best.ckpt if the metric is the best so far, and last.ckpt if the run has been stopped meanwhile."""
        if self._should_skip(trainer):
            return
        score = trainer.callback_metrics.get(self.monitor or "")
        if score is not None and trainer.strategy.broadcast(self._is_better(float(score))):
            self.best_model_score, self.best_model_path = score.detach().cpu(), self._path("best")
            with untimed(trainer):
                self._save_checkpoint(trainer, self.best_model_path)
        if _is_stopping(trainer):
            self._save_last(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write last.ckpt unless it is up to date."""
        self._save_last(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write last.ckpt unless it is up to date, or the run was ended by a loss that is not a number."""
        if isinstance(exception, FloatingPointError) or self._saved < 0:
            return
        self._save_last(trainer, pl_module, alone=True)

    def state_dict(self) -> dict[str, Any]:
        """The metric and its best value so far."""
        score = None if self.best_model_score is None else float(self.best_model_score)
        return {"monitor": self.monitor, "score": score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: :meth:`on_train_start` reads the best value from best.ckpt."""

    def _path(self, name: str) -> str:
        return os.path.join(str(self.dirpath), f"{name}{self.FILE_EXTENSION}")

    def _is_better(self, score: float) -> bool:
        if not math.isfinite(score):
            return False
        best = self.best_model_score
        return best is None or (score < float(best) if self.mode == "min" else score > float(best))

    def _should_skip(self, trainer: Trainer) -> bool:
        fast: Any = trainer.fast_dev_run  # type: ignore[attr-defined]
        return bool(fast) or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING

    def _save_last(self, trainer: Trainer, pl_module: LightningModule, alone: bool = False) -> None:
        """Write last.ckpt if there is something new; ``alone`` if other processes may not be here."""
        now = updates(trainer, pl_module)
        if now == self._saved or self._should_skip(trainer):
            return
        if not _is_finite(pl_module):
            rank_zero_warn(f"weights are not finite at update {now}: {self._path('last')} keeps the earlier ones")
            return
        self.last_model_path = self._path("last")
        with untimed(trainer):
            if alone or trainer.received_sigterm:
                # The others may never reach the barrier with which Trainer.save_checkpoint ends.
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
                trainer.strategy.save_checkpoint(checkpoint, self.last_model_path)
            else:
                self._save_checkpoint(trainer, self.last_model_path)
        self._saved = now


def _is_stopping(trainer: Trainer) -> bool:
    """Whether Lightning ends the run at the next opportunity (early stopping, time limit, SIGTERM)."""
    return trainer.received_sigterm or (trainer.should_stop and trainer.fit_loop._can_stop_early)


def _is_finite(pl_module: LightningModule) -> bool:
    weights = [p.detach() for p in pl_module.parameters() if p.is_floating_point()]
    if not weights:
        return True
    return bool(torch.stack([norm.float() for norm in torch._foreach_norm(weights)]).isfinite().all())
