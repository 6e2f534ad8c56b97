"""Distillation on two processes: equal weights on both, and the update of the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sgm.methods import Distillation
from lightning_sgm.objectives import Adversarial, Data, HighFrequencyScore, Regression
from tests.callbacks.tiny import Watch
from tests.methods.distillations import Pairs, distance, distillation, fitting, weights


def fit(folder: Path, module: Distillation, batch_size: int, steps: int, processes: int) -> None:
    """Train, and write the weights of every process."""

    def write(run: Any, model: Any) -> None:
        torch.save(weights(model, "student") | weights(model, "terms"), folder / f"{processes}.{run.global_rank}.pt")

    # Forked, so that what a test defines is there; the command line's "ddp" wraps the module in the same way.
    # (Lightning hands the weights back from forks in a file of its own, which is no checkpoint.)
    two: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "plugins": []} if processes == 2 else {}
    run = fitting(folder, Watch(on_train_end=write), steps=steps, ema=0.0, **two)
    run.fit(module, Pairs(batch_size=batch_size))


def read(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / f"{name}.pt")
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_both_processes_have_one_student_and_one_critic(tmp_path: Path, parts: int):
    module = distillation(
        [Regression(), HighFrequencyScore(), Adversarial(0.5, hidden=4)], critic_steps=2, micro_batches=parts
    )
    before = weights(module, "student") | weights(module, "terms")
    fit(tmp_path, module, 3, 3, 2)
    found = [read(tmp_path, f"2.{rank}") for rank in range(2)]
    assert distance(*found) == 0
    for part in ("student.network", "terms"):
        moved = {name: value - before[name] for name, value in found[0].items() if name.startswith(part)}
        assert max(float(value.abs().max()) for value in moved.values()) > 1e-4


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_make_the_update_of_the_joined_batch(tmp_path: Path, parts: int):
    for processes in (1, 2):
        module = distillation(
            [Regression(), HighFrequencyScore(), Data()], exact=True, micro_batches=parts if processes == 2 else 1
        )
        before = weights(module, "student")
        fit(tmp_path, module, 6 // processes, 1, processes)
    one, two = read(tmp_path, "1.0"), read(tmp_path, "2.0")
    assert distance(one, before) > 1e-3
    assert distance(one, two) < 1e-6
