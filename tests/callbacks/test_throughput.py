"""Numbers of the speed: what is counted and what is not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from lightning_sgm.callbacks import Checkpoints, Throughput
from lightning_sgm.callbacks.throughput import untimed
from tests.callbacks.tiny import BATCH, Data, Watch, module, trainer


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "speed/step_ms" in metrics:
            assert step is not None
            self.rows.append((step, metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the clock; tests turn it."""
    now = [0.0]
    monkeypatch.setattr("lightning_sgm.callbacks.throughput.time.perf_counter", lambda: now[0])
    return now


def turn(clock: list[float], seconds: float) -> Any:
    def action(*_: Any) -> None:
        clock[0] += seconds

    return action


def fit(folder: Path, *callbacks: Any, data: Data | None = None, **options: Any) -> list[tuple[int, dict[str, float]]]:
    memory = Memory()
    options = {"max_steps": 6, "limit_val_batches": 0, "log_every_n_steps": 3, **options}
    trainer(folder, *callbacks, logger=memory, **options).fit(module(), data or Data())
    return memory.rows


def test_counts_examples_time_and_waiting(tmp_path: Path, clock: list[float]):
    """Each step takes 0.3 s, each wait for data 0.1 s."""
    data = Data()
    fetch = data.fetch
    data.fetch = lambda index, epoch: (turn(clock, 0.1)(), fetch(index, epoch))[1]  # type: ignore[method-assign]
    work = Watch(on_train_batch_end=turn(clock, 0.3))
    rows = fit(tmp_path, work, Throughput(), data=data)
    assert [step for step, _ in rows] == [3, 6]
    assert rows[1][1] == {
        "speed/examples_per_second": pytest.approx(BATCH / 0.4),
        "speed/step_ms": pytest.approx(400),
        "speed/data_ms": pytest.approx(100),
        "speed/examples": 6 * BATCH,
    }


def test_tokens_are_counted(tmp_path: Path, clock: list[float]):
    work = Watch(on_train_batch_end=turn(clock, 0.5))
    rows = fit(tmp_path, work, Throughput(every=2), data=Data(tokens=True))
    assert [step for step, _ in rows] == [2, 4, 6]
    assert rows[0][1]["speed/tokens_per_second"] == pytest.approx(BATCH * 5 / 0.5)
    assert rows[0][1]["speed/examples_per_second"] == pytest.approx(BATCH / 0.5)


def test_validation_sampling_and_saving_are_not_counted(tmp_path: Path, clock: list[float]):
    def sample(run: Any, pl_module: Any) -> None:
        with untimed(run), untimed(run):
            clock[0] += 50

    work = Watch(
        on_train_batch_end=turn(clock, 0.5),
        on_validation_start=turn(clock, 7),
        on_validation_batch_start=turn(clock, 100),
    )
    later = Watch(on_train_batch_end=sample, on_validation_end=sample, on_save_checkpoint=turn(clock, 1000))
    keep = Checkpoints(every=1, folder=str(tmp_path))
    options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 2, "num_sanity_val_steps": 1}
    # A step ends before `work` works, so the third of its 0.5 s belongs to the second window.
    rows = fit(tmp_path, Throughput(every=3), work, later, keep, **options)
    assert [step for step, _ in rows] == [3, 6]
    assert [row["speed/step_ms"] for _, row in rows] == pytest.approx([2 * 500 / 3, 500])


def test_examples_go_on_after_a_resumption(tmp_path: Path):
    first = Throughput()
    run = trainer(tmp_path, first, max_steps=4, limit_val_batches=0)
    run.fit(module(), Data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    second = Throughput()
    run = trainer(tmp_path, second, max_steps=6, limit_val_batches=0)
    run.fit(module(), Data(), ckpt_path=str(tmp_path / "a.ckpt"))
    assert (first.state_dict(), second.state_dict()) == ({"examples": 4 * BATCH}, {"examples": 6 * BATCH})


def test_accumulation_is_logged_at_updates(tmp_path: Path):
    start = time.perf_counter()
    rows = fit(tmp_path, Throughput(), max_steps=6, accumulate_grad_batches=2)
    elapsed = time.perf_counter() - start
    assert [step for step, _ in rows] == [3, 6]
    assert rows[1][1]["speed/examples"] == 12 * BATCH
    assert 0 < sum(row["speed/step_ms"] * 6 for _, row in rows) < 1000 * elapsed


def test_cadence_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        Throughput(every=0)
