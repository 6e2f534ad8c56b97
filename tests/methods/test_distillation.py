"""Distillation as a method: what is trained, what counts as an update, and what stays as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lightning_sgm.callbacks import EMA, Checkpoints
from lightning_sgm.io.checkpoint import read_checkpoint
from lightning_sgm.methods import Distillation
from lightning_sgm.metrics import Fidelity
from lightning_sgm.objectives import Adversarial, Data, HighFrequencyScore, Regression, UniformLogSNR
from lightning_sgm.random import Draw
from tests.callbacks.tiny import Watch, trainer
from tests.methods.distillations import (
    BATCH,
    EXAMPLES,
    Pairs,
    Points,
    Recorded,
    distance,
    distillation,
    fitting,
    points,
    resshift,
    weights,
)


def all_terms() -> list[Any]:
    return [Regression(), HighFrequencyScore(), Adversarial(0.02, hidden=4)]


def student_of(module: Distillation) -> dict[str, torch.Tensor]:
    return weights(module, "student.network")


def critics_of(module: Distillation) -> dict[str, torch.Tensor]:
    return weights(module, "terms")


def batch(size: int = 7) -> dict[str, torch.Tensor]:
    return Pairs().examples("train", size)


# Another kind of teacher.


def test_a_score_sde_teacher_is_distilled_by_the_same_class(tmp_path: Path):
    teacher, data = points(warmup=0, optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-3}}), Points()
    trainer(tmp_path, max_steps=300, limit_val_batches=0).fit(teacher.train(), data)
    terms = [Regression(), HighFrequencyScore(0.1, UniformLogSNR(0.05, 0.3))]
    rate = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)  # noqa: E731
    module = distillation(terms, teacher, data, optimizer=rate)
    shown = data.examples("val", 64)

    def error() -> float:
        with torch.no_grad():
            return float(module.eval().losses(shown, Draw(0))["loss"].mean())

    before = error()
    fitting(tmp_path, steps=120).fit(module.train(), data)
    assert error() < 0.25 * before
    found = module.generate(200)["x"]
    assert module.sampler_evaluations == 1
    # Both clusters, each by about half of the samples, and little between them.
    assert 0.3 < float((found.mean(1) > 0).float().mean()) < 0.7
    assert float((found.mean(1).abs() > 0.5).float().mean()) > 0.8
    assert set(module.losses(shown, Draw(0))) == {"loss"}  # a sample has nothing to do with the batch


def test_the_score_term_pulls_the_student_where_regression_would(tmp_path: Path):
    # From the student's side both have the teacher's solution as the optimum.
    module = distillation([HighFrequencyScore(0.5)], optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    shown = batch(EXAMPLES)
    with torch.no_grad():
        before = float(module.losses(shown, Draw(0))["loss"].mean())
    fitting(tmp_path, steps=120, ema=0.0).fit(module, Pairs())
    with torch.no_grad():
        assert float(module.losses(shown, Draw(0))["loss"].mean()) < 0.7 * before


# What counts.


class Critical(Adversarial):
    """Keeps what is asked of it: by whom, from which start, and whether the student's sample has a graph."""

    def __init__(self) -> None:
        super().__init__(0.02, hidden=4)
        self.asked: list[tuple[str, torch.Tensor, bool]] = []

    def critic(self, phase):
        self.asked.append(("critic", phase.start, phase.sample.requires_grad))
        return super().critic(phase)

    def student(self, phase):
        self.asked.append(("student", phase.start, phase.sample.requires_grad))
        return super().student(phase)


@pytest.mark.parametrize("reuse", [True, False])
def test_only_updates_of_the_student_count(tmp_path: Path, reuse: bool):
    critic, logger = Critical(), Recorded()
    module = distillation([Regression(), critic], critic_steps=2, reuse_sample=reuse, warmup=10)
    saved: list[bool] = []
    rates: list[float] = []

    def look(run: Any, model: Any) -> None:
        rates.append(run.optimizers[0].param_groups[0]["lr"])
        saved.append((tmp_path / "last.ckpt").exists())

    run = trainer(
        tmp_path,
        EMA(0.9, ramp=False),
        Checkpoints(every=3, folder=str(tmp_path)),
        Watch(on_train_batch_end=look),
        max_steps=5,
        logger=logger,
        log_every_n_steps=2,
        limit_val_batches=0,
    )
    run.fit(module, Pairs())
    assert run.global_step == module.updates == 5
    assert run.fit_loop.epoch_loop.batch_progress.total.completed == 5
    assert [who for who, *_ in critic.asked] == ["critic", "critic", "student"] * 5
    # Graphs are made where the student learns from them; critics have fresh noise but for the last, if that is reused.
    assert [graph for *_, graph in critic.asked] == [False, reuse, True] * 5
    starts = [start for _, start, _ in critic.asked]
    assert len({float(start.sum()) for start in starts}) == (10 if reuse else 15)
    assert torch.equal(starts[1], starts[2]) == reuse
    assert [step for step, row in logger.rows if "train/loss" in row] == [2, 4]
    assert rates == pytest.approx([0.05 * (n + 1) / 10 for n in range(1, 6)])
    assert run.optimizers[1].param_groups[0]["lr"] == 0.05
    assert saved.index(True) == 2 + 1  # the callback before Checkpoints sees the file of update 3 in batch 4
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 5
    assert checkpoint["callbacks"]["EMA"]["updates"] == 5


# What changes and what does not.


def test_the_average_is_of_the_student_only_and_the_teacher_rests(tmp_path: Path):
    module = distillation([*all_terms(), Data()])
    teacher, modes, path, critics = weights(module, "teacher"), [], [student_of(module)], [critics_of(module)]

    def look(run: Any, model: Any) -> None:
        modes.append((model.training, model.student.training, model.teacher.training, model.student.codec.training))
        assert all(p.grad is None for p in model.teacher.parameters())
        assert all(not p.requires_grad for p in model.teacher.parameters())
        if run.training:
            path.append(student_of(model))
            critics.append(critics_of(model))

    watch = Watch(on_train_batch_end=look, on_validation_batch_end=look)
    fitting(tmp_path, watch, steps=4, limit_val_batches=1, val_check_interval=2).fit(module.eval().train(), Pairs())
    assert {mode for mode in modes if mode[0]} == {(True, True, False, False)}
    assert {mode for mode in modes if not mode[0]} == {(False, False, False, False)}
    assert distance(weights(module, "teacher"), teacher) == 0
    average = path[0]
    for step in path[1:]:
        average = {name: 0.9 * value + 0.1 * step[name] for name, value in average.items()}
        assert distance(step, path[0]) > 1e-4
    assert distance(student_of(module), average) < 1e-6
    assert distance(critics_of(module), critics[-1]) == 0
    assert distance(critics[-1], critics[0]) > 1e-4
    # The student began as the teacher, and shares nothing but the codec with it.
    assert all(torch.equal(value, teacher[name.replace("student", "teacher")]) for name, value in path[0].items())
    ours, theirs = ({id(p) for p in part.parameters()} for part in (module.student, module.teacher))
    assert not ours & theirs


def test_a_smaller_student_is_trained_from_scratch(tmp_path: Path):
    student: Any = resshift(seed=3, blocks=1).requires_grad_(False).eval()
    module = distillation(all_terms(), student=student)
    assert module.student is student
    assert [len(model.network.blocks) for model in (module.student, module.teacher)] == [1, 3]
    assert module.solver.steps == 4
    assert module.student.sampler.steps == 1
    before = student_of(module)
    fitting(tmp_path, steps=2, ema=0.0).fit(module, Pairs())
    assert all(not torch.equal(value, before[name]) for name, value in student_of(module).items() if "freq" not in name)


# Parts of a batch.


def one_update(folder: Path, module: Distillation, size: int = 7, **options: Any) -> Distillation:
    fitting(folder, steps=1, ema=0.0, **options).fit(module, Pairs(batch_size=size))
    return module


def test_parts_of_a_batch_make_the_update_of_the_whole(tmp_path: Path):
    found = []
    for parts in (1, 3):
        terms = [Regression(), HighFrequencyScore(), Data()]
        module = distillation(terms, exact=True, micro_batches=parts)
        before = student_of(module)
        found.append(student_of(one_update(tmp_path, module)))
        assert distance(found[-1], before) > 1e-3
    assert distance(*found) < 1e-6


def test_parts_of_a_batch_have_the_gradient_norms_of_the_whole(tmp_path: Path):
    """Seven examples in parts of three, three and one."""
    found = []
    for parts in (1, 3):
        terms, logger = [Regression(2.0), HighFrequencyScore(), Data()], Recorded()
        one_update(tmp_path, distillation(terms, exact=True, micro_batches=parts), logger=logger)
        row = logger.rows[0][1]
        found.append({name: value for name, value in row.items() if name.endswith("_gradient")})
    names = ("regression", "high_frequency_score", "data")
    assert set(found[0]) == {f"train/{name}_gradient" for name in names}
    assert found[1] == pytest.approx(found[0], rel=1e-4)


class Still(Adversarial):
    """Its heads' spectral norms stand still, as power iterations are made in each call."""

    def build(self, teacher):
        super().build(teacher)
        for part in cast(torch.nn.Module, self.heads).modules():
            if hasattr(part, "n_power_iterations"):
                cast(Any, part).n_power_iterations = 0


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("still", [True, False])
def test_parts_of_a_batch_and_critics(tmp_path: Path, still: bool, reuse: bool):
    """Equal but for spectral norms, whose estimates move on with every part."""
    found = []
    for parts in (1, 3):
        torch.manual_seed(0)
        critic = (Still if still else Adversarial)(1.0, hidden=4)
        terms = [HighFrequencyScore(), critic]
        module = distillation(terms, exact=True, micro_batches=parts, reuse_sample=reuse)
        torch.nn.init.normal_(cast(Any, critic.heads).heads[0].conv.weight, std=0.3)
        before = critics_of(module)
        one_update(tmp_path, module)
        found.append({**student_of(module), **critics_of(module)})
        moved = distance(critics_of(module), before)
        assert moved > 1e-3
    trained = [
        {name: value for name, value in each.items() if "._u" not in name and "._v" not in name} for each in found
    ]
    assert distance(*trained) < (1e-6 if still else 0.1 * moved)


def test_a_part_of_a_batch_has_noise_of_its_own():
    # Without exact draws the noise is made for a part as a whole: no two parts may get the same.
    module = distillation([Regression()], micro_batches=2)
    starts = []
    for number in range(2):
        module._train_draw = lambda batch: Draw(3)  # type: ignore[method-assign]
        part = batch(2)
        starts.append(module._know(part, module.teacher.encode(part), number, 0).start)
    assert not torch.equal(*starts)


# Clipping, precision, what is logged.


def test_both_optimisers_are_clipped(tmp_path: Path):
    norms: dict[int, list[float]] = {}

    def look(run: Any, model: Any) -> None:
        for number, optimizer in enumerate(run.optimizers):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.setdefault(number, []).append(float(torch.stack([g.norm() for g in grads]).norm()))

    for clip in (None, 1e-4):
        module = distillation([Regression(10.0), Adversarial(hidden=4)], clip=clip)
        fitting(tmp_path, Watch(on_train_batch_end=look), steps=2).fit(module, Pairs())
    assert all(len(found) == 4 for found in norms.values())
    assert all(min(found[:2]) > 2e-4 for found in norms.values())
    assert all(found[2:] == pytest.approx([1e-4] * 2, rel=0.01) for found in norms.values())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"gradient_clip_val": 0.5}, r"set model\.clip to 0\.5"),
        ({"accumulate_grad_batches": 3}, r"3 times as large, and set model\.micro_batches"),
    ],
)
def test_the_trainers_own_options_are_refused_in_one_line(tmp_path: Path, option: Any, message: str):
    with pytest.raises(ValueError, match=message):
        fitting(tmp_path, **option).fit(distillation([Regression()]), Pairs())
    # They may stay in a recipe that is used to judge the model.
    fitting(tmp_path, limit_test_batches=1, **option).test(distillation([Regression()]), Pairs(), verbose=False)


@pytest.mark.parametrize("parts", [1, 2])
def test_bfloat16_learns_nearly_the_same(tmp_path: Path, parts: int):
    """Also where the student's sample is first made without a graph, which must not be what it learns from."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module = distillation(all_terms(), exact=True, critic_steps=2, micro_batches=parts, reuse_sample=parts == 1)
        before = student_of(module)
        one_update(tmp_path, module, 4, precision=precision)
        found.append(student_of(module))
    moved = distance(found[0], before)
    assert all(value.isfinite().all() for value in found[1].values())
    assert 0 < distance(*found) < 0.1 * moved


def test_what_is_logged(tmp_path: Path):
    logger = Recorded()
    module = distillation(all_terms(), critic_steps=2)
    fitting(tmp_path, steps=4, logger=logger, log_every_n_steps=2).fit(module, Pairs())
    rows = [row for _, row in logger.rows if "train/loss" in row]
    terms = ("regression", "high_frequency_score", "adversarial")
    assert {name.removeprefix("train/") for name in rows[0]} == {
        "loss",
        "learning_rate",
        "adversarial_critic",
        "score_gap",
        "logit_real",
        "logit_fake",
        *terms,
        *(f"{name}_gradient" for name in terms),
    }
    first = rows[0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    weighted = sum(w * first[f"train/{name}"] for name, w in zip(terms, (1.0, 1.0, 0.02), strict=True))
    assert first["train/loss"] == pytest.approx(weighted, rel=1e-5)
    # A new discriminator says 0 of everything: its loss is 2, however many updates it makes per step.
    assert first["train/adversarial_critic"] == pytest.approx(2.0, abs=0.1)
    assert first["train/regression_gradient"] > 0
    assert first["train/score_gap"] > 0


def test_gradients_of_terms_are_those_at_the_sample(tmp_path: Path):
    logger = Recorded()
    module = distillation([Regression(3.0)], exact=True)
    fitting(tmp_path, steps=1, logger=logger).fit(module, Pairs())
    row = logger.rows[0][1]
    # d/dz of 3 mean ((z - z_t) / s)^2 has the norm 6 / (n s) |z - z_t| / s = 6 / s sqrt(loss / n).
    count = BATCH * 12 * 64
    expected = 6.0 / module.scale * math.sqrt(row["train/regression"] / count)
    assert row["train/regression_gradient"] == pytest.approx(expected, rel=1e-4)


# Judging.


@pytest.mark.parametrize("compare", [True, False])
def test_the_teacher_beside_the_student(tmp_path: Path, compare: bool):
    module = distillation([Regression()], compare=compare, metrics=[Fidelity()])
    data = Pairs()
    run = trainer(tmp_path)
    (found,) = run.test(module, data, verbose=False)
    ways = {name.split("/")[1] for name in found if name.count("/") == 3}
    assert ways == {"samples", "bicubic", "nearest", *(["teacher"] if compare else [])}
    assert found["test/samples/evaluations"] == 1
    restored = module.sample(torch.arange(3))
    assert ("teacher" in restored) == compare
    given = {"low": data.low[:1], "index": torch.arange(1)}
    with torch.no_grad():
        answer = module.predict_step(given, 0)
        assert torch.equal(answer["x"], module.student.restore(given["low"], given["index"]))
        if compare:
            assert torch.equal(answer["teacher"], module.teacher.restore(given["low"], given["index"]))
            assert distance({"x": answer["x"]}, {"x": answer["teacher"]}) > 0.01


def test_distances_of_validation_are_to_the_solution_and_to_the_data():
    module, shown = distillation([Regression()]), batch(3)
    with torch.no_grad():
        found = module.losses(shown, Draw(1, shown["index"]))
        x0, conditions = module.teacher.encode(shown)
        start = module.solver.prior(module.process, tuple(x0.shape), Draw(1, shown["index"]))
        given = {"low": conditions["low"]}
        sample = module.student.denoiser.x0(start, 1.0, **given)
        solution = module.solver(module.teacher.guided, None, Draw(0), start=start, **conditions)
    for name, target in (("loss", solution), ("to_data", x0)):
        expected = ((sample - target) / 0.2).square().flatten(1).mean(1)
        torch.testing.assert_close(found[name], expected)


def test_differences_count_in_units_of_the_residuals():
    assert distillation([Regression()]).scale == 0.2  # the teacher's sigma_data
    assert distillation([Regression()], scale=3.0).scale == 3.0
