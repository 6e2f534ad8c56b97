"""The teacher's solutions: found once, each from one noise, refused where another run would find others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_sgm.methods import Distillation
from lightning_sgm.methods.solutions import Solutions
from lightning_sgm.objectives import Adversarial, HighFrequencyScore, Regression
from lightning_sgm.random import Draw
from lightning_sgm.samplers import ChainGrid, Euler, Heun, Sampler
from tests.methods.distillations import BATCH, EXAMPLES, Pairs, distillation, fitting, resshift

EPOCH = EXAMPLES // BATCH


def count_calls(module: Distillation) -> list[int]:
    """Of the solver; each entry is the number of examples."""
    calls, inner = [], module.solver

    class Counted(Sampler):
        def __call__(self, *args: Any, start: Any = None, **more: Any) -> Any:
            calls.append(len(start))
            return inner(*args, start=start, **more)

    module.solver = Counted(inner.rule, inner.steps, inner.grid)
    return calls


class Looking(Regression):
    """Keeps starts and targets by example."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.starts: dict[int, list[torch.Tensor]] = {}
        self.targets: dict[int, list[torch.Tensor]] = {}

    def student(self, phase):
        for start, target in zip(phase.start, phase.solution, strict=True):
            row = self.rows.pop(0)
            self.starts.setdefault(row, []).append(start)
            self.targets.setdefault(row, []).append(target)
        return super().student(phase)


class Rows(Callback):
    """Tells what examples are to come."""

    def __init__(self, looking: Looking) -> None:
        self.looking = looking

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.looking.rows.extend(batch["index"].tolist())


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_the_teacher_solves_each_example_once(tmp_path: Path, kept: str, parts: int):
    """Three epochs, each without two of the 14 examples: what is new in a later one is solved with its batch."""
    folder = str(tmp_path / "solutions") if kept == "disk" else None
    looking = Looking()
    # The critics begin at the same starts, with other noise: nothing is solved for them alone.
    terms = [looking, Adversarial(hidden=4, real="solution")]
    module = distillation(terms, solutions=Solutions(folder), critic_steps=2, reuse_sample=False, micro_batches=parts)
    calls = count_calls(module)
    fitting(tmp_path, Rows(looking), steps=3 * EPOCH).fit(module, Pairs())
    assert sum(calls[: EPOCH * parts]) == EPOCH * BATCH
    new = len(looking.starts) - EPOCH * BATCH
    assert new <= sum(calls[EPOCH * parts :]) <= new * BATCH
    for row, starts in looking.starts.items():
        assert all(torch.equal(start, starts[0]) for start in starts), row
        assert all(torch.equal(target, looking.targets[row][0]) for target in looking.targets[row]), row
    assert max(len(starts) for starts in looking.starts.values()) == 3
    assert len({float(starts[0].sum()) for starts in looking.starts.values()}) == len(looking.starts)
    if kept == "disk":
        again = distillation([Regression()], solutions=Solutions(folder))
        calls = count_calls(again)
        fitting(tmp_path / "again", steps=EPOCH).fit(again, Pairs())
        assert calls == []


def test_what_is_kept_is_what_the_teacher_finds(tmp_path: Path):
    module = distillation([Regression()], solutions=Solutions())
    fitting(tmp_path, steps=EPOCH, ema=0.0).fit(module, Pairs())
    data = Pairs()
    shown = data.examples("train", EXAMPLES)
    assert module._cache is not None
    values, known = module._cache.get(shown["index"])
    assert known.sum() == EPOCH * BATCH
    encoded = module.teacher.encode(shown)
    module._train_draw = lambda batch: Draw(0)  # type: ignore[method-assign]
    start = module._know(shown, encoded, 0, 0).start
    with torch.no_grad():
        solved = module.solver(module.teacher.guided, None, Draw(0), start=start, **encoded.conditions)
    error = (values - solved)[known]
    # float16 has steps of 2^-11 of a value; what the student has still to learn is far more than their square.
    assert float(error.abs().max()) <= 2**-11 * float(solved.abs().max())
    rounding = float(error.square().mean()) / module.scale**2
    assert rounding < 1e-4 * float(module.losses(shown, Draw(0))["loss"].mean())


def open_in(folder: Path, module: Distillation, data: Pairs | None = None, **options: Any) -> None:
    fitting(folder / "run", steps=1, **options).fit(module, data or Pairs())


CHANGES: dict[str, Any] = {
    "teacher": lambda store: distillation([Regression()], resshift(seed=2), solutions=store),
    "steps": lambda store: distillation([Regression()], solver=Sampler(Euler(), 3, ChainGrid()), solutions=store),
    "rule": lambda store: distillation([Regression()], solver=Sampler(Heun(), 4, ChainGrid()), solutions=store),
    "argument": lambda store: distillation([Regression()], solver=Sampler(Heun(0.1), 4, ChainGrid()), solutions=store),
    "precision": lambda store: distillation([Regression()], solutions=store),
}


@pytest.mark.parametrize("change", [*CHANGES, "clipping", "sigma", "data", "seed", "nothing"])
def test_solutions_of_something_else_are_refused(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch):
    store = Solutions(str(tmp_path / "solutions"))
    base = CHANGES["rule"] if change == "argument" else lambda store: distillation([Regression()], solutions=store)
    open_in(tmp_path, base(store))
    module, data, options = CHANGES.get(change, base)(store), Pairs(), {}
    if change == "clipping":
        module.teacher.guided.high = 0.5
    if change == "sigma":
        module.teacher.denoiser.preconditioning.sigma_data = 0.3
    if change == "data":
        data = Pairs(seed=1)
    if change == "seed":
        monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    if change == "precision":
        options = {"precision": "bf16-mixed"}
    if change == "nothing":
        # What was solved, and what a student is asked for besides, make no difference.
        module.losses(data.examples("val", 1), Draw(0))
        terms = [HighFrequencyScore(), Regression()]
        open_in(tmp_path, distillation(terms, module.teacher, solutions=store, compare=False), data)
        return
    with pytest.raises(
        ValueError, match=r"solutions of another teacher, sampler, seed, data set or type.*choose another"
    ):
        open_in(tmp_path, module, data, **options)


def test_solutions_of_data_that_change_are_refused(tmp_path: Path):
    module = distillation([Regression()], solutions=Solutions())
    for data in (Pairs(fixed=False), None):
        options: Any = {"datamodule": data} if data else {"train_dataloaders": [Pairs().examples("train", 4)]}
        with pytest.raises(ValueError, match=r"set data\.fixed to true, or solutions to null"):
            fitting(tmp_path, steps=1).fit(module, **options)
