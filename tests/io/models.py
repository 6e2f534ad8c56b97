"""Models and data for the tests of checkpoints, named by class path there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Base(nn.Module):
    """What networks are annotated with."""

    layers: nn.Sequential


class Net(Base):
    """A network that takes its size from the data."""

    def __init__(self, spec: dict[str, Any], width: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(spec["size"], width), nn.Linear(width, spec["size"]))


class Model(pl.LightningModule):
    """A model as the command line builds them."""

    ema_parts = ("network",)
    network: Base

    def __init__(
        self,
        network: Base | Callable[[dict[str, Any]], Base],
        spec: dict[str, Any],
        optimizer: OptimizerCallable = lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network if isinstance(network, Base) else network(spec)
        self.optimizer = optimizer
        self.rate = rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.network.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Plain(pl.LightningModule):
    """A model built in Python: plain arguments and the class are kept, the network is not."""

    def __init__(self, network: nn.Module, rate: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters({"rate": rate, "_class_path": "tests.io.models.Plain"})
        self.network = network
        self.rate = rate


class Data(pl.LightningDataModule):
    """Random vectors."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.size = size
        self.spec = {"size": size}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(6, self.size)), batch_size=2)
