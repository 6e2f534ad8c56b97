"""Seeds for the randomness that modules draw by themselves, such as dropout."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_sgm.random import run_seed, seed_step

_TRAIN, _VALIDATE, _TEST, _PREDICT = 11, 12, 13, 14


class StepSeeds(Callback):
    """Seeds torch's default generators before every batch from (run seed, stage, batch number, process).

    What a step draws then depends on its number only: not on validation or sampling before it, nor on whether the run
    was resumed. Processes draw differently. Batches are counted over the whole run in training (those completed, so
    that a step repeated after an interruption draws the same again) and within a pass in evaluation.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed a training step."""
        completed = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        seed_step(run_seed(), _TRAIN, completed, trainer.global_rank)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed a validation step."""
        seed_step(run_seed(), _VALIDATE, dataloader_idx, batch_idx, trainer.global_rank)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed a test step."""
        seed_step(run_seed(), _TEST, dataloader_idx, batch_idx, trainer.global_rank)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed a sampling step."""
        seed_step(run_seed(), _PREDICT, dataloader_idx, batch_idx, trainer.global_rank)
