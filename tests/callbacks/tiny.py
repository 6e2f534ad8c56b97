"""Small modules, data and trainers for the tests of callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from datamodules.loaders import EvalLoader, TrainLoader
from lightning_sgm.io.checkpoint import AtomicCheckpointIO

EXAMPLES, BATCH, EPOCH = 32, 4, 8  # EPOCH: batches per epoch


class Tiny(pl.LightningModule):
    """A network with dropout, a frozen part and a part that trains outside the average."""

    ema_parts: tuple[str, ...] = ("network",)

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.BatchNorm1d(width), nn.Linear(width, 3))
        self.network.register_parameter("fixed", nn.Parameter(torch.ones(2), requires_grad=False))
        self.teacher = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(3))
        self.last_loss: Tensor | None = None
        self.during_validation: list[Callable[[Tiny], None]] = []

    @property
    def updates(self) -> int:
        return self.trainer.global_step

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"] if batch["x"].is_floating_point() else batch["x"][:, :3].to(self.scale.dtype)
        target = self.teacher(x.to(self.scale.dtype))
        return (self.scale * self.network(x.to(self.scale.dtype)) - target).square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.last_loss = loss.detach()
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for action in self.during_validation:
            action(self)
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.network(batch["x"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TwoOptimizers(Tiny):
    """Manual optimisation: two optimisers step in every batch, so Lightning's steps run twice as fast as updates."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    @property
    def updates(self) -> int:
        return self.trainer.global_step // 2

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.network.parameters(), lr=0.05), torch.optim.SGD([self.scale], lr=0.05)


class Data(pl.LightningDataModule):
    """32 points; ``tokens`` makes them long."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(EXAMPLES, 3, generator=generator)
        if tokens:
            self.x = torch.randint(9, (EXAMPLES, 5), generator=generator)

    def fetch(self, index: Tensor, epoch: int | None) -> dict[str, Tensor]:
        return {"x": self.x[index]}

    def _finished(self) -> int:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.processed

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(self.fetch, EXAMPLES, BATCH, seed=3, ranks=(0, 1), finished=self._finished)

    def val_dataloader(self) -> EvalLoader:
        return EvalLoader(self.fetch, EXAMPLES, 16, ranks=(0, 1))

    test_dataloader = predict_dataloader = val_dataloader


def module(kind: type[Tiny] = Tiny, seed: int = 0) -> Tiny:
    """A module with the same initial weights every time."""
    torch.manual_seed(seed)
    return kind()


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet trainer on the CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "plugins": [AtomicCheckpointIO()],
    }
    return pl.Trainer(default_root_dir=str(folder), callbacks=list(callbacks), **{**defaults, **options})


def weights(part: nn.Module) -> dict[str, Tensor]:
    """A copy of its parameters and buffers."""
    return {name: value.detach().clone() for name, value in part.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watch(pl.Callback):
    """Calls functions at points of a fit; put it after the callback that is watched."""

    def __init__(self, **actions: Callable[[pl.Trainer, Any], None]) -> None:
        for hook, action in actions.items():
            setattr(self, hook, lambda trainer, pl_module, *_, act=action: act(trainer, pl_module))
