"""Models of graphs for tests, small and quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_sgm import Trainer
from lightning_sgm.methods import GDSS
from lightning_sgm.networks import GraphScore
from lightning_sgm.samplers import S4, Sampler, UniformTime


def model(spec: dict[str, Any], time: bool = False, **arguments: Any) -> GDSS:
    torch.manual_seed(0)

    def network(spec: dict[str, Any]) -> GraphScore:
        return GraphScore(spec, depth=2, width=8, layers=2, attention_width=8, channels=(2, 3, 2), time=time)

    return GDSS(network, spec, **{"sampler": Sampler(S4(), 5, UniformTime(1e-4)), **arguments})


def training(folder: Path, **arguments: Any) -> Trainer:
    options: dict[str, Any] = {"max_steps": 4, "enable_progress_bar": False, "log_every_n_steps": 1, "logger": False}
    return Trainer(run_dir=str(folder), **{**options, **arguments})
