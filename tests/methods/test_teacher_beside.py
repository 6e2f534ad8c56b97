"""The teacher that is shown and judged beside its student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_sgm.metrics import Fidelity
from lightning_sgm.objectives import Regression
from lightning_sgm.samplers import Ancestral, Euler
from tests.callbacks.tiny import trainer
from tests.methods.distillations import Pairs, distillation, keep, resshift


@torch.no_grad()
@pytest.mark.parametrize("given", ["file", "model"])
def test_it_samples_as_the_student_learns_from_it_and_keeps_its_own_sampler(given: str, tmp_path: Path):
    own = resshift()
    module = distillation([Regression()], own if given == "model" else keep(own, tmp_path / "teacher.ckpt")).eval()
    ancestral = own.sampler
    data = Pairs()
    batch = data.examples("val", 3)
    low, numbers = batch["low"], batch["index"]
    solver = resshift()
    solver.sampler = module.solver
    expected, noisy = solver.restore(low, numbers), resshift().restore(low, numbers)
    assert (expected - noisy).abs().max() > 0.05
    assert torch.equal(module.rivals_of(batch)["teacher"], expected)
    assert torch.equal(module.predict_step({"low": low, "index": numbers}, 0)["teacher"], expected)
    trainer(tmp_path).validate(module, data, verbose=False)  # a trainer has the data of pictures
    assert torch.equal(module.sample(torch.arange(3))["teacher"], expected)
    assert isinstance(module.solver.rule, Euler)
    assert own.sampler is ancestral
    assert isinstance(ancestral.rule, Ancestral)
    assert torch.equal(own.restore(low, numbers), noisy)


def test_it_is_judged_by_these_samples(tmp_path: Path):
    module, data = distillation([Regression()], metrics=[Fidelity()]).eval(), Pairs()
    (found,) = trainer(tmp_path).test(module, data, verbose=False)
    batch = data.examples("test", 4)
    solver = resshift()
    solver.sampler = module.solver
    metric = Fidelity()
    with torch.no_grad():
        metric.update(solver.restore(batch["low"], batch["index"]), batch["x"])
    assert found["test/teacher/fidelity/psnr"] == pytest.approx(float(metric.compute()["psnr"]), rel=1e-4)


@torch.no_grad()
def test_both_make_images_in_the_pieces_that_the_user_wants_of_the_student():
    """And both tell of them."""
    module = distillation([Regression()]).eval()
    told: list[tuple[int, int]] = []
    module.on_part = lambda done, total: told.append((done, total))
    module.student.tile, module.student.overlap, module.student.tile_batch = 8, 4, 1
    batch = {"low": torch.rand(1, 3, 12, 8) * 2 - 1, "index": torch.arange(1)}
    found = module.predict_step(batch, 0)
    assert told == [(1, 2), (2, 2)] * 2
    for name, sampler in (("x", module.student.sampler), ("teacher", module.solver)):
        alone = resshift(tile=8, overlap=4)
        alone.sampler = sampler
        torch.testing.assert_close(found[name], alone.restore(batch["low"], batch["index"]), rtol=0, atol=1e-4)
        alone.tile = None
        assert (found[name] - alone.restore(batch["low"], batch["index"])).abs().max() > 0.01
    module.on_part = None
    assert torch.equal(module.rivals_of(batch)["teacher"], found["teacher"])
    assert len(told) == 4 + 4  # judging shows no parts of its own
