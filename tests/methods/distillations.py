"""Tiny teachers, data and trainers for the tests of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.nn import functional as F

from datamodules.base import DataModule
from lightning_sgm.callbacks import EMA, Checkpoints, StepSeeds
from lightning_sgm.io.checkpoint import AtomicCheckpointIO
from lightning_sgm.io.released.model import build
from lightning_sgm.methods import Distillation, ResShift, ScoreSDE
from lightning_sgm.networks import SRResNet
from lightning_sgm.objectives import Term
from tests.callbacks.tiny import trainer

SIDE, EXAMPLES, BATCH = 16, 14, 4  # three batches an epoch


class Pairs(DataModule):
    """Smooth random images (3, 16, 16) and their halves."""

    def __init__(self, seed: int = 0, fixed: bool = True, batch_size: int = BATCH, factor: int = 2) -> None:
        super().__init__(batch_size, seed)
        self.spec = {
            "kind": "image",
            "shape": [3, SIDE, SIDE],
            "low_shape": [3, SIDE // factor, SIDE // factor],
            "factor": factor,
            "fixed": fixed,
            "classes": 0,
            "range": [-1.0, 1.0],
        }

    def load(self) -> None:
        coarse = torch.rand(EXAMPLES, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
        self.x = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(-1, 1)
        self.low = F.avg_pool2d(self.x, self.spec["factor"])

    @property
    def fingerprint(self) -> str:
        return f"pairs {self.seed}"

    def count(self, split: str) -> int:
        return EXAMPLES if split == "train" else 4

    def fetch(self, split: str, index: Tensor, epoch: int | None) -> dict[str, Tensor]:
        return {"x": self.x[index], "low": self.low[index]}


class Points(DataModule):
    """Two points in the plane, each with a little noise; they have no fingerprint."""

    def __init__(self) -> None:
        super().__init__(64, 0)
        self.spec = {"kind": "array", "shape": [2], "classes": 0, "range": None}

    def load(self) -> None:
        draw = torch.Generator().manual_seed(0)
        sign = torch.randint(2, (256, 1), generator=draw) * 2.0 - 1.0
        self.x = sign + 0.1 * torch.randn(256, 2, generator=draw)

    def count(self, split: str) -> int:
        return 256 if split == "train" else 64

    def fetch(self, split: str, index: Tensor, epoch: int | None) -> dict[str, Tensor]:
        return {"x": self.x[index]}


def restorer(blocks: int = 3, channels: int = 8, codec: Any = None, **more: Any) -> dict[str, Any]:
    """A recipe's model section: ResShift of four steps."""
    return {
        "class_path": "lightning_sgm.methods.ResShift",
        "init_args": {
            "network": {"class_path": "SRResNet", "init_args": {"channels": channels, "blocks": blocks}},
            "codec": codec or {"class_path": "PixelUnshuffle", "init_args": {"factor": 2}},
            "process": {"class_path": "ResidualShift", "init_args": {"steps": 4, "kappa": 0.3, "min_noise": 0.1}},
            "preconditioning": {"class_path": "EDMPreconditioning", "init_args": {"sigma_data": 0.2}},
            "sampler": {"class_path": "Sampler", "init_args": {"rule": "Ancestral", "steps": 4, "grid": "ChainGrid"}},
            "spec": Pairs().spec,
            **more,
        },
    }


def resshift(seed: int = 1, **more: Any) -> ResShift:
    """With random weights, none of them zero."""
    torch.manual_seed(seed)
    model = build(restorer(**more))
    assert isinstance(model, ResShift)
    with torch.no_grad():
        cast(SRResNet, model.network).last.weight.normal_(std=0.1)
    return model.eval()


def points(network: str = "MLP", **more: Any) -> ScoreSDE:
    """A VP model of points, not trained."""
    torch.manual_seed(1)
    arguments = {
        "network": {"class_path": network, "init_args": {"width": 32, "depth": 2, "embedding": "fourier"}},
        "preconditioning": {"class_path": "EDMPreconditioning", "init_args": {"sigma_data": 1.0}},
        "sampler": {"class_path": "Sampler", "init_args": {"rule": "Euler", "steps": 12}},
        "spec": Points().spec,
        **more,
    }
    model = build({"class_path": "lightning_sgm.methods.ScoreSDE", "init_args": arguments})
    assert isinstance(model, ScoreSDE)
    return model.eval()


def keep(model: pl.LightningModule, path: Path, data: DataModule | None = None) -> str:
    """Write a checkpoint as a fit does."""
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": lightning.__version__,
        "hyper_parameters": {**model.hparams},
        "state_dict": model.state_dict(),
    }
    model.on_save_checkpoint(checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return str(path)


def distillation(terms: list[Term], teacher: Any = None, data: DataModule | None = None, **more: Any) -> Distillation:
    """Built in Python, by SGD with a rate so large that every update counts."""
    more = {"warmup": 0, "optimizer": sgd, "critic_optimizer": sgd, **more}
    return Distillation(terms, (data or Pairs()).spec, teacher=teacher or resshift(), **more)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Recorded(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((int(step or 0), dict(metrics)))


def fitting(folder: Path, *extra: pl.Callback, steps: int = 3, ema: float = 0.9, **options: Any) -> pl.Trainer:
    """A trainer with the callbacks of a real run."""
    callbacks = [StepSeeds(), EMA(ema, ramp=False), *extra, Checkpoints(every=100, folder=str(folder))]
    options = {"limit_val_batches": 0, "log_every_n_steps": 1, **options}
    return trainer(folder, *callbacks, max_steps=steps, **options)


def weights(module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Copies of the entries of the state dict whose names begin so."""
    return {name: value.clone() for name, value in module.state_dict().items() if name.startswith(prefix)}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of any two entries of the same name."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
