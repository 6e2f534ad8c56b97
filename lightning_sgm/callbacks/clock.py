"""The clock that all cadences of the callbacks follow."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer


def updates(trainer: Trainer, pl_module: LightningModule) -> int:
    """Optimiser updates of the model so far: the module's own count, or Lightning's steps if it keeps none."""
    own: int | None = getattr(pl_module, "updates", None)
    return trainer.global_step if own is None else own
