import csv
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import nn
from torch.utils.data import DataLoader

from lightning_sgm.callbacks.ema import EMA
from lightning_sgm.callbacks.samples import PredictionWriter, SampleLogger
from lightning_sgm.methods.base import Curve, GenerativeModule

IMAGE = {"kind": "image", "shape": [1, 8, 8], "classes": 0, "levels": 256, "range": [-1.0, 1.0]}
TEXT = {"kind": "text", "length": 8, "vocabulary": 256, "tokenizer": "bytes"}


class Level(nn.Module):
    """One gray level, which training raises by 0.1 per update from -1."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(-1.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(x) * self.value


class Tiny(GenerativeModule):
    """Sample i is the network's level everywhere, but white in pixel i; texts are the sample's number."""

    network: Level

    def __init__(self, spec):
        super().__init__(spec=spec, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.network = Level()
        self.frozen = nn.Dropout(0.5).eval()
        self.sampler = SimpleNamespace(evaluations=3.0)
        self.drawn = []

    def losses(self, batch, draw):
        return {"loss": -self.network.value * torch.ones(len(batch["x"]))}

    def sample(self, indices, **conditions):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.drawn.append((self.updates, indices.tolist()))
        if self.spec["kind"] == "text":
            return {"x": (indices[:, None] + 48).expand(-1, 8)}
        x = self.network(torch.ones(len(indices), 64))
        x[torch.arange(len(indices)), indices] = 1.0
        return {"x": x.view(-1, 1, 8, 8)}

    def predict_dataloader(self):
        numbers: Any = [{"index": i} for i in range(5)]
        return DataLoader(numbers, batch_size=2)


def loader(batches):
    examples: Any = [{"x": torch.zeros(1), "index": i} for i in range(2 * batches)]
    return DataLoader(examples, batch_size=2)


def fit(module, folder, callbacks, steps, **arguments):
    loggers = [TensorBoardLogger(folder, "run", "0"), CSVLogger(folder, "run", "0")]
    trainer = Trainer(
        **{"accelerator": "cpu", "logger": loggers, "max_steps": steps, "log_every_n_steps": 1} | arguments,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader(100))
    return trainer


def gray(path, row=20, column=20):
    with Image.open(path) as image:
        return int(np.array(image)[row, column])


def level(value):
    return round((value + 1) * 127.5)


def test_samples_at_the_cadence_and_at_the_end(tmp_path):
    module = Tiny(IMAGE)
    trainer = fit(module, tmp_path, [SampleLogger(every=3, count=4)], 8)
    assert module.drawn == [(3, [0, 1, 2, 3]), (6, [0, 1, 2, 3]), (8, [0, 1, 2, 3])]
    folder = Path(trainer.log_dir) / "samples"
    assert sorted(os.listdir(folder)) == ["00000003.png", "00000006.png", "00000008.png"]
    shown = [gray(path) for path in sorted(folder.iterdir())]
    assert shown == pytest.approx([level(-0.7), level(-0.4), level(-0.2)], abs=1)
    accumulator = EventAccumulator(trainer.log_dir)
    accumulator.Reload()
    assert [image.step for image in accumulator.Images("samples")] == [3, 6, 8]
    assert [(s.step, s.value) for s in accumulator.Scalars("samples/evaluations")] == [(3, 3.0), (6, 3.0), (8, 3.0)]
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["samples/evaluations"]] == ["3", "6", "8"]


class Pictured(Tiny):
    """Shows its level as a further picture and as a curve that ends at it."""

    def pictures(self):
        level = self.network.value.detach()
        curve = Curve(torch.arange(1.0, 4.0), torch.linspace(0, 1 + float(level), 3), "sigma", "error", log_x=True)
        return {"flat": {"x": level.expand(1, 1, 64, 64)}, "errors": curve}


def test_a_methods_own_pictures(tmp_path):
    trainer = fit(Pictured(IMAGE), tmp_path, [SampleLogger(every=5, count=1)], 5)
    folder = Path(trainer.log_dir) / "samples"
    assert sorted(os.listdir(folder)) == ["00000005.png", "00000005_errors.png", "00000005_flat.png"]
    assert gray(folder / "00000005_flat.png") == pytest.approx(level(-0.5), abs=1)
    with Image.open(folder / "00000005_errors.png") as image:
        drawn = np.array(image.convert("RGB")).reshape(-1, 3)
    blue = (drawn[:, 2].astype(int) - drawn[:, 0]) > 100
    assert 300 < blue.sum() < 5000  # a line and three dots
    accumulator = EventAccumulator(trainer.log_dir)
    accumulator.Reload()
    assert set(accumulator.Tags()["images"]) == {"samples", "flat", "errors"}


def test_the_end_is_not_drawn_twice(tmp_path):
    module = Tiny(IMAGE)
    fit(module, tmp_path, [SampleLogger(every=4, count=1)], 4)
    assert [step for step, _ in module.drawn] == [4]


def test_the_cadence_counts_updates_not_batches(tmp_path):
    module = Tiny(IMAGE)
    fit(module, tmp_path, [SampleLogger(every=2, count=1)], 4, accumulate_grad_batches=3)
    assert [step for step, _ in module.drawn] == [2, 4]


def test_texts(tmp_path):
    trainer = fit(Tiny(TEXT), tmp_path, [SampleLogger(every=5, count=2)], 5)
    text = (Path(trainer.log_dir) / "samples" / "00000005.txt").read_text()
    assert "sample 1 ====================\n11111111\n" in text


def test_looking_changes_nothing(tmp_path):
    looked, alone = Tiny(IMAGE), Tiny(IMAGE)
    modes = []

    class Modes(SampleLogger):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            before = [part.training for part in pl_module.modules()]
            super().on_train_batch_end(trainer, pl_module, *rest)
            modes.append(before == [part.training for part in pl_module.modules()])

    fit(looked, tmp_path / "a", [EMA(0.9), Modes(every=1, count=2)], 5)
    fit(alone, tmp_path / "b", [EMA(0.9)], 5)
    assert modes == [True] * 5
    assert not looked.frozen.training
    assert len(looked.drawn) == 5
    assert torch.equal(looked.network.value, alone.network.value)


@pytest.mark.parametrize("steps", [2, 3])
def test_samples_come_from_the_average(tmp_path, steps):
    """During fit and at its end."""
    module = Tiny(IMAGE)
    trainer = fit(module, tmp_path, [EMA(0.5, ramp=False), SampleLogger(every=2, count=1)], steps)
    folder = Path(trainer.log_dir) / "samples"
    average = [-1.0]
    for step in range(1, 4):
        average.append(0.5 * average[-1] + 0.5 * (-1 + 0.1 * step))
    assert gray(folder / "00000002.png") == pytest.approx(level(average[2]), abs=1)
    if steps == 3:
        assert gray(folder / "00000003.png") == pytest.approx(level(average[3]), abs=1)


def test_a_fast_run_draws_but_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = Tiny(IMAGE)
    fit(module, tmp_path, [SampleLogger(every=1, count=2)], 5, fast_dev_run=1)
    assert module.drawn == [(1, [0, 1])]
    assert os.listdir(tmp_path) == []


def predict(module, callback, folder, **arguments):
    trainer = Trainer(
        **{"accelerator": "cpu", "default_root_dir": folder, "logger": False} | arguments,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, return_predictions=False)


def test_predictions_are_files_and_an_overview(tmp_path, capsys):
    predict(Tiny(IMAGE), PredictionWriter(), tmp_path)
    folder = tmp_path / "predictions"
    assert sorted(os.listdir(folder)) == [*(f"{i:06d}.png" for i in range(5)), "samples.png"]
    for i in range(5):
        assert gray(folder / f"{i:06d}.png", 0, i) == 255
        assert gray(folder / f"{i:06d}.png", 0, 7) == 0
    with Image.open(folder / "samples.png") as grid:
        assert grid.size == (3 * 64 + 4 * 2, 2 * 64 + 3 * 2)
    assert f"5 samples are in {folder}, together in {folder / 'samples.png'}" in capsys.readouterr().out


def test_an_earlier_run_in_the_folder_does_not_mix_in(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "000099.txt").write_text("old")
    predict(Tiny(TEXT), PredictionWriter(str(folder)), tmp_path)
    text = (folder / "samples.txt").read_text()
    assert [f"sample {i} " in text for i in range(5)] == [True] * 5
    assert "old" not in text
    assert (folder / "000099.txt").read_text() == "old"


def test_two_processes_write_what_one_writes(tmp_path):
    predict(Tiny(TEXT), PredictionWriter(), tmp_path / "one")
    predict(Tiny(TEXT), PredictionWriter(), tmp_path / "two", strategy="ddp_fork", devices=2)
    one, two = ((tmp_path / name / "predictions") for name in ("one", "two"))
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


class One(Tiny):
    """Has one sample, so that the second process is idle."""

    def predict_dataloader(self):
        numbers: Any = [{"index": 0}][self.global_rank :]
        return DataLoader(numbers)


def test_a_process_without_samples_waits_for_the_others(tmp_path, capfd):
    predict(One(TEXT), PredictionWriter(), tmp_path, strategy="ddp_fork", devices=2)
    assert sorted(os.listdir(tmp_path / "predictions")) == ["000000.txt", "samples.txt"]
    assert "1 samples are in" in capfd.readouterr().out


class Named(Tiny):
    """Its samples have names, and complete something."""

    def predict_step(self, batch, batch_idx):
        found = super().predict_step(batch, batch_idx)
        return {**found, "before": -found["x"], "name": [f"a/{i}.x" for i in batch["index"].tolist()]}


def test_predictions_with_names(tmp_path, capsys):
    folder = tmp_path / "restored"
    folder.mkdir()
    (folder / "panels").mkdir()
    predict(Named(IMAGE), PredictionWriter(), tmp_path)
    assert sorted(os.listdir(folder)) == ["a", "panels", "samples.png"]
    assert (
        sorted(os.listdir(folder / "a")) == sorted(os.listdir(folder / "panels/a")) == [f"{i}.x.png" for i in range(5)]
    )
    assert gray(folder / "a/3.x.png", 0, 3) == 255
    assert capsys.readouterr().out.count("\n") == 1


def test_earlier_predictions_are_counted(tmp_path, capsys):
    for name in ("000002.txt", "000099.txt", "notes.txt"):
        (tmp_path / name).write_text("old")
    predict(Tiny(TEXT), PredictionWriter(str(tmp_path)), tmp_path)
    assert "beside them are 1 of earlier predictions" in capsys.readouterr().out


def test_two_processes_draw_once(tmp_path):
    class Recorded(Tiny):
        def sample(self, indices, **conditions):
            (tmp_path / f"rank{self.global_rank}").touch()
            return super().sample(indices, **conditions)

    trainer = fit(
        Recorded(IMAGE), tmp_path, [EMA(0.9), SampleLogger(every=2, count=2)], 5, strategy="ddp_fork", devices=2
    )
    assert sorted(os.listdir(Path(trainer.log_dir) / "samples")) == ["00000002.png", "00000004.png", "00000005.png"]
    assert (tmp_path / "rank0").exists()
    assert not (tmp_path / "rank1").exists()


@pytest.mark.parametrize("arguments", [{"every": 0}, {"count": 0}])
def test_misuse_is_named(arguments):
    with pytest.raises(ValueError, match="every >= 1 and count >= 1"):
        SampleLogger(**arguments)
