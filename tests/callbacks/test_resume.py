"""Interrupted and resumed runs end bit by bit where the uninterrupted run ends."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from datamodules import GraphDataModule
from lightning_sgm.callbacks import EMA, Checkpoints, StepSeeds
from lightning_sgm.io.checkpoint import read_checkpoint
from lightning_sgm.methods import GDSS
from lightning_sgm.networks import GraphScore
from lightning_sgm.samplers import S4, Sampler, UniformTime
from tests.callbacks.tiny import EPOCH, Data, TwoOptimizers, Watch, module, trainer

STEPS = 21


def run(
    folder: Path, model: pl.LightningModule, *extra: pl.Callback, steps: int = STEPS, every: int = 100, **options: Any
):
    options = {"val_check_interval": 3, **options}
    options["max_steps"] = steps * (2 if isinstance(model, TwoOptimizers) else 1)
    callbacks = [StepSeeds(), EMA(decay=0.9), *extra, Checkpoints(every=every, folder=str(folder))]
    return trainer(folder, *callbacks, **options)


def final(folder: Path) -> dict[str, Any]:
    """All that training depends on, in the file written at the end."""
    checkpoint = read_checkpoint(folder / "last.ckpt")
    return {
        key: checkpoint[key] for key in ("state_dict", "raw_state", "optimizer_states", "lr_schedulers", "global_step")
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}/{i}")]
    equal = torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return [] if equal else [path]


class Interrupt(pl.Callback):
    """Ends a run in the batch ``at`` (counted from 1) in different ways."""

    def __init__(self, how: str, at: int) -> None:
        self.how, self.at, self.batches = how, at, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.at:
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif self.how == "Ctrl-C":
                raise KeyboardInterrupt
            elif self.how == "error":
                raise RuntimeError("on purpose")

    def on_train_batch_end(self, *_: Any) -> None:
        if self.how == "Ctrl-C after" and self.batches == self.at:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.batches >= self.at:
            if self.how == "error in validation":
                raise RuntimeError("on purpose")
            if self.how == "signal in validation":
                os.kill(os.getpid(), signal.SIGTERM)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2, "val_check_interval": 4},
    "no validation": {"limit_val_batches": 0},
    "validation after epochs": {"val_check_interval": 1.0},
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Ends of uninterrupted runs."""
    ends = {}
    for name, options in OPTIONS.items():
        folder = tmp_path_factory.mktemp("straight")
        run(folder, module(), **options).fit(module(), Data())
        ends[name] = final(folder)
    folder = tmp_path_factory.mktemp("straight")
    run(folder, module(TwoOptimizers)).fit(module(TwoOptimizers), Data())
    return {**ends, "two": final(folder)}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("how", "at"),
    [
        ("signal", 2),
        ("signal", EPOCH),
        ("signal", EPOCH + 4),
        ("error", EPOCH + 3),
        ("error in validation", 6),
        ("signal in validation", 6),
    ],
)
def test_interrupted_run_resumes_exactly(tmp_path: Path, straight: dict[str, Any], how: str, at: int, options: str):
    if "validation" in how and options == "no validation":
        pytest.skip("nothing to interrupt")
    with pytest.raises(RuntimeError if "error" in how else SIGTERMException):
        run(tmp_path, module(), Interrupt(how, at), **OPTIONS[options]).fit(module(), Data())
    model = module(seed=1)
    run(tmp_path, model, **OPTIONS[options]).fit(model, Data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert differences(straight[options], final(tmp_path)) == []


@pytest.mark.parametrize("how", ["Ctrl-C", "Ctrl-C after"])
def test_ctrl_c_saves_and_resumes_exactly(tmp_path: Path, straight: dict[str, Any], how: str):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        run(tmp_path, module(), Interrupt(how, EPOCH + 3)).fit(module(), Data())
    signal.signal(signal.SIGINT, handler)
    model = module(seed=1)
    run(tmp_path, model).fit(model, Data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert differences(straight["plain"], final(tmp_path)) == []


@pytest.mark.parametrize("steps", [5, EPOCH, EPOCH + 1])
@pytest.mark.parametrize("options", OPTIONS)
def test_run_that_ended_goes_on_exactly(tmp_path: Path, straight: dict[str, Any], steps: int, options: str):
    run(tmp_path, module(), steps=steps, **OPTIONS[options]).fit(module(), Data())
    model = module(seed=1)
    run(tmp_path, model, **OPTIONS[options]).fit(model, Data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert differences(straight[options], final(tmp_path)) == []


def test_killed_run_resumes_exactly_from_its_latest_file(tmp_path: Path, straight: dict[str, Any]):
    """What SIGKILL leaves is the file of the cadence."""
    keep = {"last": b""}

    def read(*_: Any) -> None:
        if (tmp_path / "last.ckpt").exists():
            keep["last"] = (tmp_path / "last.ckpt").read_bytes()

    watch = Watch(on_train_batch_start=lambda t, m: read() if t.global_step == EPOCH + 3 else None)
    run(tmp_path, module(), watch, every=5).fit(module(), Data())
    (tmp_path / "last.ckpt").write_bytes(keep["last"])
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 10
    model = module(seed=1)
    run(tmp_path, model).fit(model, Data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert differences(straight["plain"], final(tmp_path)) == []


@pytest.mark.parametrize("at", [4, EPOCH, EPOCH + 3])
def test_two_optimisers_resume_exactly(tmp_path: Path, straight: dict[str, Any], at: int):
    with pytest.raises(SIGTERMException):
        run(tmp_path, module(TwoOptimizers), Interrupt("signal", at)).fit(module(TwoOptimizers), Data())
    model = module(TwoOptimizers, seed=1)
    run(tmp_path, model).fit(model, Data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert differences(straight["two"], final(tmp_path)) == []


def graphs() -> GDSS:
    """A method with a learning rate that falls, for 70 graphs in 4 batches an epoch."""
    torch.manual_seed(0)

    def network(spec: dict[str, Any]) -> GraphScore:
        return GraphScore(spec, depth=2, width=8, layers=2, attention_width=8, channels=(2, 3, 2))

    sampler = Sampler(S4(), 2, UniformTime(1e-4))
    return GDSS(network, GraphDataModule().spec, decay=0.5, sampler=sampler)


@pytest.mark.parametrize("decay", [0.5, "cosine"])
@pytest.mark.parametrize(("how", "at"), [("signal", 3), ("signal", 4), ("error", 7)])
def test_graphs_resume_exactly_while_the_learning_rate_falls(tmp_path: Path, how: str, at: int, decay: Any):
    """What the schedule has to know of the run's length must not set up the data before its place is known."""
    ends = []
    for folder, interruption in ((tmp_path / "straight", []), (tmp_path / "resumed", [Interrupt(how, at)])):
        model = graphs()
        model.decay = decay
        training: Any = run(folder, model, *interruption, steps=10, gradient_clip_val=1.0, max_epochs=3)
        with pytest.raises(RuntimeError if how == "error" else SIGTERMException) if interruption else nullcontext():
            training.fit(model, GraphDataModule(batch_size=16))
        if interruption:
            model = graphs()
            model.decay = decay
            training = run(folder, model, steps=10, gradient_clip_val=1.0, max_epochs=3)
            training.fit(model, GraphDataModule(batch_size=16), ckpt_path=str(folder / "last.ckpt"))
        ends.append(final(folder))
    assert ends[0]["global_step"] == 10
    assert differences(ends[0], ends[1]) == []


def test_without_step_seeds_it_would_not_be_exact(tmp_path: Path, straight: dict[str, Any]):
    """The comparison above can fail: dropout decides."""
    callbacks = [EMA(decay=0.9), Checkpoints(every=100, folder=str(tmp_path))]
    trainer(tmp_path, *callbacks, max_steps=STEPS, val_check_interval=3).fit(module(), Data())
    assert "/raw_state/network.0.weight" in differences(straight["plain"], final(tmp_path))
