"""Teachers and students that fit each other, and what is said of those that do not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import GraphDataModule
from lightning_sgm.methods import GDSS, Distillation
from lightning_sgm.methods.solutions import outline
from lightning_sgm.methods.students import choose_samplers, describe
from lightning_sgm.networks import GraphScore
from lightning_sgm.objectives import Adversarial, Regression
from lightning_sgm.samplers import ChainGrid, Heun, Karras, LogUniform, ODESampler, Sampler, UniformTime
from tests.methods.distillations import Pairs, Points, distillation, fitting, points, resshift


def other_data(**changes: Any) -> Pairs:
    data = Pairs()
    data.spec = {**data.spec, **changes}
    return data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"factor": 4},
            "the teacher was made for data with factor 2, but these have 4: choose data like the teacher's",
        ),
        ({"kind": "array"}, "the teacher was made for data with kind image, but these have array"),
        ({"range": [0.0, 1.0]}, r"range \[-1.0, 1.0\], but these have \[0.0, 1.0\]"),
        ({"shape": [1, 16, 16]}, "the teacher's data have 3 channels, these 1"),
    ],
)
def test_other_data_than_the_teachers(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        distillation([Regression()], data=other_data(**changes))


def test_larger_squares_are_fine(tmp_path: Path):
    module = distillation([Regression()], resshift(spec={**Pairs().spec, "shape": [3, 8, 8], "low_shape": [3, 4, 4]}))
    fitting(tmp_path, steps=1).fit(module, Pairs())


def test_no_teacher(tmp_path: Path):
    with pytest.raises(ValueError, match=r"needs a teacher: give --model\.teacher CHECKPOINT, as `fit --config"):
        Distillation([Regression()], Pairs().spec)
    with pytest.raises(FileNotFoundError, match=r"there is no teacher .*nowhere\.ckpt: give --model\.teacher CHECK"):
        Distillation([Regression()], Pairs().spec, teacher=str(tmp_path / "nowhere.ckpt"))
    (tmp_path / "broken.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"broken\.ckpt is not a checkpoint of lightning_sgm or is damaged"):
        Distillation([Regression()], Pairs().spec, teacher=str(tmp_path / "broken.ckpt"))


def test_teachers_that_cannot_be_distilled():
    graphs = GraphDataModule(graphs=8)
    others: dict[str, Any] = {
        "GDSS": GDSS(lambda spec: GraphScore(spec, width=8), graphs.spec),
        "Distillation": distillation([Regression()]),
    }
    for name, teacher in others.items():
        with pytest.raises(ValueError, match=f"is a {name}, which cannot be distilled: give a ResShift or ScoreSDE"):
            distillation([Regression()], teacher)


def test_a_network_without_features_has_no_discriminator():
    with pytest.raises(ValueError, match="MLP has no features and feature_channels: take a teacher with them"):
        distillation([Regression(), Adversarial()], points(), Points())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": []}, "needs terms"),
        ({"critic_steps": 0}, "critic_steps >= 1"),
        ({"micro_batches": 0}, "micro_batches >= 1"),
        ({"clip": 0.0}, "clip > 0 or null"),
        ({"scale": 0.0}, "scale must be positive, got 0"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        distillation(**{"terms": [Regression()], **arguments})


# Students.


def test_students_that_are_no_students_of_this_teacher():
    with pytest.raises(ValueError, match="the student is a ScoreSDE and the teacher a ResShift: make them alike"):
        distillation([Regression()], student=points())
    noisy = resshift(process={"class_path": "ResidualShift", "init_args": {"steps": 4, "kappa": 2.0}})
    with pytest.raises(ValueError, match="other noise at the same time: give both the same process"):
        distillation([Regression()], student=noisy)
    other = resshift(spec={**Pairs().spec, "factor": 1, "low_shape": [3, 16, 16]})
    with pytest.raises(ValueError, match="the student was made for data with factor 1, but these have 2"):
        distillation([Regression()], student=other)
    space = resshift(codec={"class_path": "Identity"})
    with pytest.raises(ValueError, match=r"on 3 channels of Identity, 1 .*, the teacher on 12 .*: give both the same"):
        distillation([Regression()], student=space)


def test_a_teacher_that_has_just_been_trained(tmp_path: Path):
    """Its student is no copy of the trainer too."""
    teacher = resshift(warmup=0).train()
    run = fitting(tmp_path, steps=1)
    run.fit(teacher, Pairs())
    module = distillation([Regression()], teacher)
    assert module.student._trainer is None
    fitting(tmp_path / "second", steps=1).fit(module, Pairs())


# Samplers.


@pytest.mark.parametrize("grid", [Karras(), LogUniform(), UniformTime()])
def test_every_grid_of_vp_begins_where_the_student_learns(grid: Any):
    model = points()
    model.sampler = Sampler(Heun(), 5, grid)
    solver, sampler = choose_samplers(model, None, None)
    assert (solver.steps, sampler.steps) == (5, 1)
    assert len(sampler.levels(model.process)) == 2
    assert abs(float(sampler.levels(model.process)[0].t) - 1.0) < 1e-6


def test_samplers_that_do_not_fit():
    late = Sampler(Heun(), 5, Karras(ratio_max=10.0))
    for arguments in ({"solver": late}, {"sampler": late}):
        with pytest.raises(
            ValueError, match=r"must begin at t = 1, where the student learns, not at 0\.\d+: give them"
        ):
            distillation([Regression()], points(), Points(), **arguments)
    with pytest.raises(ValueError, match="ChainGrid needs a discrete chain"):
        distillation([Regression()], points(), Points(), solver=Sampler(grid=ChainGrid()))
    adaptive = points()
    adaptive.sampler = ODESampler()
    with pytest.raises(
        ValueError, match="the teacher samples by ODESampler, which has no grid: give solver and sampler"
    ):
        distillation([Regression()], adaptive, Points())
    given = {"solver": Sampler(), "sampler": Sampler(steps=1)}
    assert distillation([Regression()], adaptive, Points(), **given).solver.steps == 18


def test_a_student_is_described_as_a_recipe_would(tmp_path: Path):
    spec = {**Pairs().spec, "more": 1}
    described = describe(resshift(), spec, None)
    assert described is not None
    arguments = described["init_args"]
    assert described["class_path"] == "lightning_sgm.methods.resshift.ResShift"
    assert arguments["spec"] == spec
    assert arguments["sampler"]["init_args"]["steps"] == 1
    assert "ChainGrid" in str(arguments["sampler"]["init_args"]["grid"])
    assert "ChainGrid" not in str(describe(resshift(), spec, {"class_path": "x"}))


# What tells one solver from another.


def test_outlines_differ_where_solvers_do():
    parts = [
        Sampler(),
        Sampler(Heun(0.1)),
        Sampler(steps=17),
        Sampler(grid=Karras(rho=5.0)),
        Sampler(finish="mean"),
        *(resshift(seed=seed).guided for seed in (1, 2)),
        resshift(preconditioning={"class_path": "EDMPreconditioning", "init_args": {"sigma_data": 0.3}}).guided,
    ]
    found = [repr(outline(part)) for part in parts]
    assert len({*found}) == len(found)
    assert not any(re.search("0x[0-9a-f]{6}", text) for text in found)  # no addresses, which change from run to run


def test_an_outline_does_not_tell_what_was_done_last():
    model = resshift()
    before = repr(outline(model.guided)), repr(outline(model.sampler))
    with torch.no_grad():
        model.restore(Pairs().examples("val", 1)["low"], torch.arange(1))
    assert before == (repr(outline(model.guided)), repr(outline(model.sampler)))
