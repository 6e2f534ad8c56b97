"""last.ckpt and best.ckpt: when they are written and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_sgm.callbacks import EMA, Checkpoints
from lightning_sgm.io.checkpoint import read_checkpoint
from tests.callbacks.tiny import EPOCH, Data, Tiny, TwoOptimizers, Watch, module, trainer


class Scored(Tiny):
    """Validations give these losses, one after the other."""

    scores: list[float]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.score = self.scores.pop(0)
        self.log("val/loss", self.score)


def scored(*scores: float) -> Tiny:
    model = module(Scored)
    model.scores = list(scores)  # type: ignore[assignment]
    return model


def step(path: Path) -> int:
    return read_checkpoint(path)["global_step"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("kind", "factor"), [(Tiny, 1), (TwoOptimizers, 2)])
def test_last_is_written_at_the_cadence_and_at_the_end(tmp_path: Path, kind: type[Tiny], factor: int):
    there: list[tuple[int, int]] = []

    def look(run: Any, pl_module: Any) -> None:
        if (tmp_path / "last.ckpt").exists():
            there.append((pl_module.updates, step(tmp_path / "last.ckpt") // factor))

    callbacks = (Watch(on_train_batch_start=look), Checkpoints(every=4, folder=str(tmp_path)))
    trainer(tmp_path, *callbacks, max_steps=10 * factor, limit_val_batches=0).fit(module(kind), Data())
    assert there == [(4, 4), (5, 4), (6, 4), (7, 4), (8, 8), (9, 8)]
    assert step(tmp_path / "last.ckpt") == 10 * factor
    assert files(tmp_path) == ["last.ckpt"]


def test_last_is_written_when_epochs_end_the_run_and_when_training_stops_early(tmp_path: Path):
    for name, options in (("epochs", {"max_epochs": 1}), ("early", {"max_steps": 20})):
        stop = Watch(on_train_batch_end=lambda run, m: setattr(run, "should_stop", run.global_step >= EPOCH))
        run = trainer(tmp_path, stop, Checkpoints(folder=str(tmp_path / name)), limit_val_batches=0, **options)
        run.fit(module(), Data())
        assert step(tmp_path / name / "last.ckpt") == EPOCH


def test_a_stop_that_must_wait_does_not_write_at_every_step(tmp_path: Path):
    seen: list[int] = []
    stop = Watch(
        on_train_batch_end=lambda run, m: setattr(run, "should_stop", True),
        on_train_batch_start=lambda run, m: seen.append((tmp_path / "last.ckpt").exists()),
    )
    options = {"max_steps": 20, "min_steps": 10, "limit_val_batches": 0}
    trainer(tmp_path, stop, Checkpoints(folder=str(tmp_path)), **options).fit(module(), Data())
    assert seen == [False] * 10
    assert step(tmp_path / "last.ckpt") == 10


def test_best_follows_the_metric(tmp_path: Path):
    keep = Checkpoints(folder=str(tmp_path))
    run = trainer(tmp_path, keep, max_steps=8, val_check_interval=2)
    run.fit(scored(3.0, 1.0, float("nan"), 2.0), Data())
    assert step(tmp_path / "best.ckpt") == 4
    assert keep.best_model_path == str(tmp_path / "best.ckpt")
    assert float(keep.best_model_score) == 1.0  # type: ignore[arg-type]
    assert files(tmp_path) == ["best.ckpt", "last.ckpt"]
    run = trainer(tmp_path, Checkpoints(folder=str(tmp_path / "max"), mode="max"), max_steps=8, val_check_interval=2)
    run.fit(scored(3.0, 1.0, 4.0, 2.0), Data())
    assert step(tmp_path / "max" / "best.ckpt") == 6


def test_best_before_a_resumption_counts(tmp_path: Path):
    """Also if last.ckpt was written in the step of that validation, but before it."""
    run = trainer(tmp_path, Checkpoints(folder=str(tmp_path)), max_steps=4, val_check_interval=2)
    run.fit(scored(3.0, 1.0), Data())
    assert (step(tmp_path / "best.ckpt"), step(tmp_path / "last.ckpt")) == (4, 4)
    last = str(tmp_path / "last.ckpt")
    run = trainer(tmp_path, Checkpoints(folder=str(tmp_path)), max_steps=8, val_check_interval=2)
    run.fit(scored(2.0, 1.5), Data(), ckpt_path=last)
    assert step(tmp_path / "best.ckpt") == 4
    run = trainer(tmp_path, Checkpoints(folder=str(tmp_path)), max_steps=10, val_check_interval=2)
    run.fit(scored(0.5), Data(), ckpt_path=last)
    assert step(tmp_path / "best.ckpt") == 10


def test_best_of_an_earlier_run_in_the_same_folder_does_not_count(tmp_path: Path):
    for score in (1.0, 2.0):
        model = scored(score)
        run = trainer(tmp_path, Checkpoints(folder=str(tmp_path)), max_steps=2, val_check_interval=2)
        run.fit(model, Data())
        state = read_checkpoint(tmp_path / "best.ckpt")
        assert state["callbacks"]["Checkpoints"] == {"monitor": "val/loss", "score": score}


def test_best_and_last_can_be_tested_by_name(tmp_path: Path):
    model = module()
    run = trainer(tmp_path, EMA(decay=0.5), Checkpoints(folder=str(tmp_path)), max_steps=6, val_check_interval=2)
    run.fit(model, Data())
    for name in ("best", "last"):
        run.test(model, Data(), ckpt_path=name, verbose=False)
        state = read_checkpoint(tmp_path / f"{name}.ckpt")["state_dict"]
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def poison(run: pl.Trainer, model: Tiny) -> None:
    if run.global_step == 5:
        model.scale.data[0] = float("nan")


def test_weights_that_are_not_finite_never_replace_last(tmp_path: Path):
    callbacks = (Watch(on_train_batch_end=poison), Checkpoints(every=2, folder=str(tmp_path)))
    with pytest.warns(UserWarning, match="not finite"):
        trainer(tmp_path, *callbacks, max_steps=8, limit_val_batches=0).fit(module(), Data())
    assert step(tmp_path / "last.ckpt") == 4


def test_a_loss_that_is_not_a_number_keeps_last(tmp_path: Path):
    def fail(run: pl.Trainer, model: Tiny) -> None:
        if run.global_step == 5:
            raise FloatingPointError

    callbacks = (Watch(on_train_batch_end=fail), Checkpoints(every=2, folder=str(tmp_path)))
    with pytest.raises(FloatingPointError):
        trainer(tmp_path, *callbacks, max_steps=8, limit_val_batches=0).fit(module(), Data())
    assert step(tmp_path / "last.ckpt") == 4


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_steps": 0}])
def test_nothing_is_written_where_nothing_is_trained(tmp_path: Path, options: dict[str, Any]):
    trainer(tmp_path, Checkpoints(folder=str(tmp_path / "none")), **options).fit(module(), Data())
    assert not (tmp_path / "none").exists()


def test_errors_before_the_first_update_write_nothing(tmp_path: Path):
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    for hook in ("on_fit_start", "on_train_start", "on_train_batch_start", "on_validation_start"):
        callbacks = (Watch(**{hook: fail}), Checkpoints(folder=str(tmp_path / "none")))
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer(tmp_path, *callbacks, max_steps=4, num_sanity_val_steps=1).fit(module(), Data())
    assert not (tmp_path / "none").exists()


def test_weights_only_files_hold_no_training_state(tmp_path: Path):
    keep = Checkpoints(folder=str(tmp_path), save_weights_only=True)
    trainer(tmp_path, EMA(), keep, max_steps=2, val_check_interval=2).fit(module(), Data())
    for name in ("best", "last"):
        assert not {"optimizer_states", "raw_state", "callbacks"} & read_checkpoint(tmp_path / f"{name}.ckpt").keys()


def test_cadence_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(every=0)
