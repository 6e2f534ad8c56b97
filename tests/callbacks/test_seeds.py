"""What a step draws depends on its number and process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_sgm.callbacks import StepSeeds
from tests.callbacks.tiny import Data, Tiny, module, trainer


class Draws(pl.Callback):
    """Records the next random number at the start of every batch."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.other: dict[str, list[float]] = {"validation": [], "test": [], "predict": []}

    def on_train_batch_start(self, *_: Any) -> None:
        self.train.append(torch.rand(()).item())

    def on_validation_batch_start(self, *_: Any) -> None:
        self.other["validation"].append(torch.rand(()).item())

    def on_test_batch_start(self, *_: Any) -> None:
        self.other["test"].append(torch.rand(()).item())

    def on_predict_batch_start(self, *_: Any) -> None:
        self.other["predict"].append(torch.rand(()).item())


def draws(folder: Path, seed: int = 0, **options: Any) -> Draws:
    watch = Draws()
    model = module(seed=seed)
    trainer(folder, StepSeeds(), watch, **{"max_steps": 12, "limit_val_batches": 0, **options}).fit(model, Data())
    return watch


def test_steps_draw_different_numbers_whatever_happened_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = draws(tmp_path)
    assert len(set(plain.train)) == 12
    disturbed = draws(tmp_path, seed=9, limit_val_batches=1.0, val_check_interval=3, num_sanity_val_steps=1)
    assert disturbed.train == plain.train
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not set(draws(tmp_path).train) & set(plain.train)


def test_processes_draw_different_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = draws(tmp_path)
    monkeypatch.setattr(pl.Trainer, "global_rank", property(lambda self: 1))
    assert not set(draws(tmp_path).train) & set(plain.train)


def test_every_validation_draws_the_same_and_stages_differ(tmp_path: Path):
    watch = Draws()
    model: Tiny = module()
    run = trainer(tmp_path, StepSeeds(), watch, max_steps=6, val_check_interval=3)
    run.fit(model, Data())
    validation = watch.other["validation"]
    assert validation[:2] == validation[2:]
    assert len(set(validation)) == 2
    run.test(model, Data(), verbose=False)
    run.predict(model, Data(), return_predictions=False)
    everything = [*watch.train[:2], *validation[:2], *watch.other["test"], *watch.other["predict"]]
    assert len(set(everything)) == 8
