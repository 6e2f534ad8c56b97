"""Lines in a log file and the bar on a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_sgm.callbacks import Progress
from tests.callbacks.tiny import EPOCH, Data, Tiny, TwoOptimizers, Watch, module, trainer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the clock; tests turn it."""
    now = [1000.0]
    monkeypatch.setattr("lightning_sgm.callbacks.display.time.monotonic", lambda: now[0])
    return now


def turn(clock: list[float], seconds: float) -> Any:
    def action(*_: Any) -> None:
        clock[0] += seconds

    return action


def run(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return trainer(folder, *callbacks, **{"enable_progress_bar": True, "limit_val_batches": 0, **options})


def lines(capsys: pytest.CaptureFixture[str], label: str = "step") -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(label)]


def test_lines_at_intervals_with_speed_and_time_left(tmp_path: Path, clock: list[float], capsys: Any):
    """2 s per step: a line after every fifth of 12 and one at the end."""
    work = Watch(on_train_batch_end=turn(clock, 2))
    model = module()
    run(tmp_path, work, Progress(refresh=10), max_steps=12).fit(model, Data())
    found = lines(capsys)
    assert [re.sub(r"loss \S+", "loss", line) for line in found] == [
        "step 5/12 (41.7%)  loss  0.5 it/s  elapsed 0:00:10  ETA 0:00:14",
        "step 10/12 (83.3%)  loss  0.5 it/s  elapsed 0:00:20  ETA 0:00:04",
        "step 12/12 (100.0%)  loss  0.5 it/s  elapsed 0:00:24  ETA 0:00:00",
    ]
    assert model.last_loss is not None
    assert f"loss {float(model.last_loss):.4g} " in found[-1]


def test_validation_is_shown_counts_for_the_time_left_but_not_for_the_speed(
    tmp_path: Path, clock: list[float], capsys: Any
):
    """4 steps of 1 s, a validation of 2 x 8 s, 4 steps."""
    work = Watch(on_train_batch_end=turn(clock, 1), on_validation_batch_start=turn(clock, 8))
    options = {"max_steps": 16, "limit_val_batches": 1.0, "val_check_interval": 4, "num_sanity_val_steps": 0}
    run(tmp_path, work, Progress(refresh=10), **options).fit(module(), Data())
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("validate 1/2 (50.0%)")
    assert re.fullmatch(r"step 6/16 \(37.5%\)  loss \S+  val/loss \S+  1 it/s  elapsed 0:00:22  ETA 0:00:37", output[1])
    assert re.search(r"step 16/16 .* val/loss \S+  1 it/s  elapsed 0:01:20  ETA 0:00:00", output[-1])


class Judged(Tiny):
    """Its validations have numbers of samples too."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/samples/mmd_emd/degree", 3.0)
        self.log("val/samples/evaluations", 4.0)


def test_numbers_of_samples_stay_in_the_logs(tmp_path: Path, capsys: Any):
    training = run(tmp_path, Progress(), max_steps=4, limit_val_batches=1.0, val_check_interval=4)
    training.fit(module(Judged), Data())
    (line,) = lines(capsys)
    assert re.search(r"loss \S+  val/loss \S+  \S+ it/s", line)
    assert "samples" not in line
    assert float(training.callback_metrics["val/samples/mmd_emd/degree"]) == 3.0


class Counting(Tiny):
    """Knows how often its loss is read."""

    reads = 0

    @property
    def last_loss(self) -> Tensor:
        self.reads += 1
        return torch.tensor(1.0)

    @last_loss.setter
    def last_loss(self, value: Tensor | None) -> None:
        pass


def test_loss_is_read_only_when_it_is_shown(tmp_path: Path, clock: list[float], capsys: Any):
    model = module(Counting)
    work = Watch(on_train_batch_end=turn(clock, 1))
    run(tmp_path, work, Progress(refresh=10), max_steps=29).fit(model, Data())
    assert model.reads == len(lines(capsys)) == 3


@pytest.mark.parametrize(
    ("kind", "options", "total"),
    [
        (Tiny, {"max_epochs": 2}, 2 * EPOCH),
        (Tiny, {"max_epochs": 2, "accumulate_grad_batches": 3}, 6),
        (Tiny, {"max_epochs": 9, "max_steps": 10}, 10),
        (TwoOptimizers, {"max_steps": 20}, 10),
        (TwoOptimizers, {"max_epochs": 1}, EPOCH),
    ],
)
def test_total_is_that_of_the_whole_run(tmp_path: Path, kind: type[Tiny], options: Any, total: int, capsys: Any):
    run(tmp_path, Progress(), **options).fit(module(kind), Data())
    assert f"step {total}/{total} (100.0%)" in lines(capsys)[-1]


def test_run_without_end_shows_no_time_left(tmp_path: Path, capsys: Any):
    stop = Watch(on_train_batch_end=lambda run, m: setattr(run, "should_stop", run.global_step >= 5))
    run(tmp_path, stop, Progress(), max_epochs=-1).fit(module(), Data())
    line = lines(capsys)[-1]
    assert re.match(r"step \d+  loss", line)
    assert "ETA" not in line


def test_resumed_run_goes_on_and_judges_its_own_speed(tmp_path: Path, clock: list[float], capsys: Any):
    first = run(tmp_path, Progress(), max_steps=EPOCH)
    first.fit(module(), Data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    capsys.readouterr()
    work = Watch(on_train_batch_end=turn(clock, 5))
    run(tmp_path, work, Progress(refresh=10), max_steps=14).fit(module(), Data(), ckpt_path=str(tmp_path / "a.ckpt"))
    assert "step 10/14 (71.4%)" in (found := lines(capsys))[0]
    assert "0.2 it/s  elapsed 0:00:10  ETA 0:00:20" in found[0]


def test_evaluation_shows_batches(tmp_path: Path, clock: list[float], capsys: Any):
    work = Watch(on_validation_batch_start=turn(clock, 4), on_test_batch_start=turn(clock, 6))
    evaluation = run(tmp_path, work, Progress(refresh=5), limit_val_batches=1.0)
    evaluation.validate(module(), Data(), verbose=False)
    evaluation.test(module(), Data(), verbose=False)
    output = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("validate", "test"))]
    assert output == [
        "validate 2/2 (100.0%)  0.25 it/s  elapsed 0:00:08  ETA 0:00:00",
        "test 1/2 (50.0%)  0.167 it/s  elapsed 0:00:06  ETA 0:00:06",
        "test 2/2 (100.0%)  0.167 it/s  elapsed 0:00:12  ETA 0:00:00",
    ]


class Numbers:
    """Sample numbers in batches of 4; knows their count."""

    count = 10

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in torch.arange(self.count).split(4):
            yield {"index": index, "x": torch.zeros(len(index), 3)}


def test_predict_shows_samples(tmp_path: Path, clock: list[float], capsys: Any):
    work = Watch(on_predict_batch_start=turn(clock, 2))
    run(tmp_path, work, Progress(refresh=1)).predict(module(), Numbers(), return_predictions=False)
    assert [line.split("  ")[0] for line in lines(capsys, "sample")] == [
        "sample 4/10 (40.0%)",
        "sample 8/10 (80.0%)",
        "sample 10/10 (100.0%)",
    ]
    run(tmp_path, work, Progress(refresh=1)).predict(module(), Data(), return_predictions=False)
    assert lines(capsys, "predict")[0].startswith("predict 1/2 (50.0%)")


def test_predict_on_several_processes_ends_at_all_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """Of 10 on 3 processes the first has 4, which stand for 12."""
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda self: 3))
    first = Numbers()
    monkeypatch.setattr(Numbers, "__iter__", lambda self: iter([{"index": torch.arange(4), "x": torch.zeros(4, 3)}]))
    monkeypatch.setattr(Numbers, "__len__", lambda self: 1)
    run(tmp_path, Progress()).predict(module(), first, return_predictions=False)
    assert lines(capsys, "sample")[-1].startswith("sample 10/10 (100.0%)")


class Files(Numbers):
    """Two pictures."""

    count, label = 2, "file"

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in range(2):
            yield {"index": torch.tensor([i]), "x": torch.zeros(1, 3)}


class InParts(Tiny):
    """Makes a sample in three parts of 4 s."""

    on_part: Any = None
    turn: Any = None

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        for part in range(3):
            self.turn()
            self.on_part(part + 1, 3)
        return super().predict_step(batch, batch_idx)


def test_parts_of_a_sample_are_shown(tmp_path: Path, clock: list[float], capsys: Any):
    model = module(InParts)
    model.turn = turn(clock, 4)
    run(tmp_path, Progress(refresh=4)).predict(model, Files(), return_predictions=False)
    assert [line.partition("  elapsed")[0] for line in lines(capsys, "file")] == [
        "file 0/2 (0.0%)  part 1  of 3  0 it/s",
        "file 0/2 (0.0%)  part 2  of 3  0 it/s",
        "file 0/2 (0.0%)  part 3  of 3  0 it/s",
        "file 1/2 (50.0%)  part 1  of 3  0.0833 it/s",
        "file 1/2 (50.0%)  part 2  of 3  0.0833 it/s",
        "file 1/2 (50.0%)  part 3  of 3  0.0833 it/s",
        "file 2/2 (100.0%)  0.0833 it/s",
    ]
    assert model.on_part is None


def test_only_the_first_process_shows_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda self: False))
    evaluation = run(tmp_path, Progress(refresh=1e-9), max_steps=4, limit_val_batches=1.0)
    evaluation.fit(module(), Data())
    evaluation.validate(module(), Data(), verbose=False)
    assert capsys.readouterr().out == ""


def test_terminal_gets_a_bar_of_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    model = module()
    run(tmp_path, Progress(), max_steps=12, limit_val_batches=1.0, val_check_interval=4).fit(model, Data())
    output = capsys.readouterr().out
    assert "\x1b[" in output
    assert "━" in output
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", output).splitlines()
    assert any(
        re.search(r"step .*12/12 loss \S+  val/loss \S+  .* it/s  elapsed .* ETA 0:00:00", line) for line in last
    )


def test_terminal_is_given_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    def fail(run: pl.Trainer, model: Tiny) -> None:
        if run.global_step == 3:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path, Progress(), Watch(on_train_batch_end=fail), max_steps=12).fit(module(), Data())
    output = capsys.readouterr().out
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is shown again


def test_interval_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        Progress(refresh=0)
