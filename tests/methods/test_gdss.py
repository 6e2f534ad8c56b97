"""GDSS on plain graphs: training, clipping by network, judging, pictures, mistakes, released weights."""

from __future__ import annotations

import csv
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from datamodules import GraphDataModule
from lightning_sgm import Trainer
from lightning_sgm.io.checkpoint import load
from lightning_sgm.io.released.gdss import import_gdss
from lightning_sgm.io.released.model import save
from lightning_sgm.methods import GDSS
from lightning_sgm.methods.base import Curve
from lightning_sgm.methods.denormals import flushed, without_denormals
from lightning_sgm.methods.graph_checks import require_clipping
from lightning_sgm.metrics import GraphMMD, MoleculeQuality, UnigramEntropy
from lightning_sgm.processes import VE, VP, GraphProcess
from lightning_sgm.samplers import S4, Sampler, UniformTime
from tests.conftest import SHARED
from tests.methods.graph_models import model, training


@pytest.fixture(scope="module")
def data() -> GraphDataModule:
    return GraphDataModule(batch_size=16)


@pytest.mark.parametrize(
    ("process", "start", "told"),
    [
        (GraphProcess(adj=VE(0.2, 1.0)), "standard", "keeps 76% of x, 100% of adj"),
        (GraphProcess(), "matched", None),
        (GraphProcess(VP(), VP()), "standard", None),
    ],
)
def test_a_start_that_is_not_where_training_ends_is_told(
    data: GraphDataModule,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    process: GraphProcess,
    start: Any,
    told: Any,
):
    options = {"max_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    training(tmp_path, **options).fit(model(data.spec, process=process, start=start), data)
    warned = [str(each.message) for each in recwarn if "model.start: matched" in str(each.message)]
    assert len(warned) == (told is not None)
    assert told is None or told in warned[0]


# Training.


def norm(part: torch.nn.Module) -> float:
    return float(torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None]).norm())


def test_each_network_is_clipped_on_its_own(data: GraphDataModule):
    gdss: Any = model(data.spec)
    for part, size in ((gdss.network.x, 10.0), (gdss.network.adj, 0.5)):
        parameters = list(part.parameters())
        entries = sum(p.numel() for p in parameters)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, size / math.sqrt(entries))
    gdss.configure_gradient_clipping(None, 1.0, "norm")

    assert norm(gdss.network.x) == pytest.approx(1.0, rel=1e-4)
    assert norm(gdss.network.adj) == pytest.approx(0.5, rel=1e-4)
    gdss.configure_gradient_clipping(None, None)
    assert norm(gdss.network.adj) == pytest.approx(0.5, rel=1e-4)


def test_parameters_in_no_part_are_clipped_too(data: GraphDataModule):
    gdss: Any = model(data.spec)
    gdss.network.own = torch.nn.Parameter(torch.zeros(4))
    gdss.network.own.grad = torch.full((4,), 10.0)
    gdss.configure_gradient_clipping(None, 1.0, "norm")
    assert gdss.network.own.grad.norm() == pytest.approx(1.0, rel=1e-4)


def test_the_shared_embedding_of_the_time_is_clipped_on_its_own(data: GraphDataModule):
    gdss: Any = model(data.spec, time=True)
    for parameter in gdss.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    gdss.configure_gradient_clipping(None, 1.0, "norm")
    assert [name for name, _ in gdss.network.named_children()] == ["embed", "x", "adj"]
    assert [norm(part) for part in gdss.network.children()] == pytest.approx([1.0] * 3, rel=1e-4)


def test_the_trainer_clips_by_network(data: GraphDataModule, tmp_path: Path):
    norms: list[list[float]] = []

    class Watch(GDSS):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            # Lightning calls this before it clips: look again when the step is made.
            clip = self.configure_gradient_clipping

            def after(*arguments: Any, **more: Any) -> None:
                clip(*arguments, **more)
                norms.append([norm(part) for part in self.network.children()])
                self.configure_gradient_clipping = clip  # type: ignore[method-assign]

            self.configure_gradient_clipping = after  # type: ignore[method-assign]

    gdss = model(data.spec)
    gdss.__class__ = Watch
    training(tmp_path, gradient_clip_val=0.01, limit_val_batches=0, enable_checkpointing=False).fit(gdss, data)
    assert norms == [[pytest.approx(0.01, rel=1e-3)] * 2] * 4


def test_a_number_as_decay_multiplies_every_epoch_and_survives_a_resumption(data: GraphDataModule, tmp_path: Path):
    rates: list[float] = []

    class Watch(GDSS):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    def fit(steps: int, **more: Any) -> None:
        gdss = model(data.spec, decay=0.5)
        gdss.__class__ = Watch
        training(tmp_path, max_steps=steps, limit_val_batches=0).fit(gdss, data, **more)

    fit(6)
    fit(11, ckpt_path=str(tmp_path / "checkpoints/last.ckpt"))
    assert rates == pytest.approx([1e-2 * 0.5 ** (update // 4) for update in range(11)])  # 70 graphs, 16 at a time


def test_validations_judge_samples_where_asked(data: GraphDataModule, tmp_path: Path):
    gdss = model(data.spec, metrics=[GraphMMD(repeats=20)], val_samples=4, test_samples=4)
    run = training(tmp_path, max_steps=4, val_check_interval=2, logger=True, enable_checkpointing=False)
    run.fit(gdss, data)
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row.get("val/samples/mmd_emd/degree")]
    assert [int(row["step"]) for row in rows] == [1, 3]
    for row in rows:
        assert 0 <= float(row["val/samples/mmd_emd/degree"]) < 2
        assert float(row["val/samples/mmd_emd/graphs"]) == 4
        assert float(row["val/samples/mmd_emd/graphs_real"]) == data.count("val")
    assert not [name for name in run.callback_metrics if name.startswith("val/floor")]
    (numbers,) = run.test(gdss, data, verbose=False)
    assert numbers["test/floor/mmd_emd/connected"] == 1.0
    assert numbers["test/samples/evaluations"] == 5.0


@pytest.mark.parametrize("fails", [False, True])
def test_the_smallest_numbers_count_as_zero_while_it_works(data: GraphDataModule, tmp_path: Path, fails: bool):
    """Adam with L2 decay leaves many weights at 1e-40, with which CPUs are slow (gdss.md section 8, trap 3)."""
    seen: dict[str, list[bool]] = {"forward": [], "backward": [], "step": [], "between": []}

    class Watch(GDSS):
        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            seen["between"].append(flushed())

        def on_validation_batch_end(self, *arguments: Any) -> None:
            seen["between"].append(flushed())

    class Step(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            seen["step"].append(flushed())
            return found

    def forward(*_: Any) -> None:
        seen["forward"].append(flushed())
        if fails and len(seen["step"]) == 1:
            raise RuntimeError("out of luck")

    gdss = model(data.spec, optimizer=lambda pairs: Step(pairs, lr=1e-3))
    gdss.__class__ = Watch
    gdss.generate(1)
    gdss.network.register_forward_hook(forward)
    for parameter in gdss.network.parameters():
        parameter.register_hook(lambda _: seen["backward"].append(flushed()))
    # Two batches make an update: the first of them is differentiated outside of the optimiser's step.
    run = training(tmp_path, max_steps=2, accumulate_grad_batches=2, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="out of luck") if fails else nullcontext():
        run.fit(gdss, data)
    assert not flushed()
    for place in ("forward", "backward", "step"):
        assert seen[place]
        assert all(seen[place])
    assert len(seen["between"]) >= 2
    assert not any(seen["between"])
    with without_denormals(), without_denormals():
        assert flushed()
    assert not flushed()


def test_few_updates_lower_the_loss(data: GraphDataModule, tmp_path: Path):
    gdss = model(data.spec, decay="constant")
    run = training(tmp_path, max_steps=60, enable_checkpointing=False, gradient_clip_val=1.0)
    (before,) = run.validate(gdss, data, verbose=False)
    run.fit(gdss, data)
    (after,) = run.validate(gdss, data, verbose=False)
    assert after["val/loss"] < 0.8 * before["val/loss"]
    for name in ("val/loss_x", "val/loss_adj"):
        assert after[name] < before[name]


def test_pictures_show_graphs_coming_out_of_noise_and_losses_over_time(data: GraphDataModule, tmp_path: Path):
    gdss = model(data.spec, sampler=Sampler(S4(), 12, UniformTime(1e-4))).eval()
    gdss.trainer = training(tmp_path)
    gdss.trainer.datamodule = data  # type: ignore[attr-defined]
    with torch.no_grad():
        found = gdss.pictures()
        samples = gdss.sample(torch.arange(3))
    strip: Any = found["reverse_process"]
    nodes = data.spec["nodes"]
    assert strip["adj_steps"].shape == (3, 8, nodes, nodes)
    assert strip["t"].shape == (8,)
    assert (strip["t"].diff() < 0).all()
    assert strip["t"][-1] == 0.0
    assert torch.equal(strip["adj"], samples["adj"])
    # The last picture is the sample before it is rounded.
    assert torch.equal(torch.floor(strip["adj_steps"][:, -1] + 0.5).clamp(0, 1), samples["adj"])
    for name in ("x", "adj"):
        curve: Any = found[f"loss_{name}_by_time"]
        assert isinstance(curve, Curve)
        assert curve.x.shape == curve.y.shape == (24,)
        assert (curve.y > 0).all()


def test_pictures_need_no_data(data: GraphDataModule, tmp_path: Path):
    gdss = model(data.spec).eval()
    gdss.trainer = training(tmp_path)
    with torch.no_grad():
        assert set(gdss.pictures()) == {"reverse_process"}


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"kind": "image"}, {}, "GDSS is for graphs and molecules, got data of kind 'image'"),
        ({}, {"nodes": 0}, r"nodes must be in 1 \.\. 20, the largest graph of the data, got 0"),
        ({}, {"nodes": 21}, r"nodes must be in 1 \.\. 20"),
        ({}, {"start": "zero"}, "start must be standard or matched, got 'zero'"),
        ({"edge_mean": None}, {"start": "matched"}, "matched needs statistics of the data"),
        ({}, {"decay": 1.5}, r"it must lie in \(0, 1\], got 1.5"),
        ({}, {"val_samples": -1}, "val_samples must be at least 0"),
    ],
)
def test_mistakes(data: GraphDataModule, changes: dict[str, Any], arguments: dict[str, Any], message: str):
    spec = {name: value for name, value in {**data.spec, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        model(spec, **arguments)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (UnigramEntropy(), "metric UnigramEntropy cannot judge these data, of kind 'graph'"),
        (MoleculeQuality(), "metrics of molecules cannot judge data of kind 'graph'"),
        (MoleculeQuality(["C"]), "metric MoleculeQuality cannot judge these data, of kind 'graph'"),
    ],
)
def test_metrics_of_other_data_are_refused_before_training(
    data: GraphDataModule, tmp_path: Path, metric: Any, message: str
):
    options: dict[str, Any] = {"max_steps": 1, "enable_checkpointing": False, "limit_val_batches": 1}
    gdss = model(data.spec, metrics=[GraphMMD(repeats=2), metric], val_samples=2)
    run = training(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        run.fit(gdss, data)
    assert run.fit_loop.epoch_loop.batch_progress.total.ready == 0
    training(tmp_path, **options).fit(model(data.spec, metrics=[metric]), data)  # where no validation asks it


def test_clipping_of_another_kind_is_refused_before_training(data: GraphDataModule, tmp_path: Path):
    run = training(tmp_path, gradient_clip_val=1.0, gradient_clip_algorithm="value", enable_checkpointing=False)
    with pytest.raises(ValueError, match="leave out gradient_clip_algorithm"):
        run.fit(model(data.spec), data)
    assert run.fit_loop.epoch_loop.batch_progress.total.ready == 0


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy])
def test_clipping_is_refused_where_parameters_are_in_pieces(kind: Any):
    trainer: Any = SimpleNamespace(gradient_clip_val=1.0, gradient_clip_algorithm=None, strategy=kind())
    with pytest.raises(ValueError, match=rf"under {kind.__name__}, .*: leave out gradient_clip_val, or use .*ddp"):
        require_clipping(trainer)
    trainer.gradient_clip_val = None
    require_clipping(trainer)
    require_clipping(Trainer(strategy="ddp", gradient_clip_val=1.0, accelerator="cpu", devices=1, logger=False))


# Released weights.


@pytest.mark.skipif(not (SHARED / "checkpoints" / "gdss").is_dir(), reason="the released weights are absent")
def test_the_released_community_model_samples_and_is_tested(tmp_path: Path):
    path = SHARED / "checkpoints" / "gdss" / "gdss_community_small.safetensors"
    save(import_gdss(path), tmp_path / "model.ckpt")
    gdss: Any = load(tmp_path / "model.ckpt")
    graphs = SHARED / "data" / "graphs" / "community_small.npz"
    if not graphs.exists():
        pytest.skip("the shared graphs are absent")
    data = GraphDataModule(path=str(graphs), features=10, batch_size=128)
    terms = training(tmp_path).validate(gdss, data, verbose=False)[0]
    # gdss.md section 10: 9.2 (.2) and 20.0 (.4) on test, with other noise.
    assert terms["val/loss_x"] == pytest.approx(9.2, abs=0.8)
    assert terms["val/loss_adj"] == pytest.approx(20.0, abs=1.6)
    gdss.sampler.steps = 20
    found = gdss.generate(16)
    edges = found["adj"].sum((1, 2)) / 2
    nodes = found["node_mask"].sum(1)
    assert set(nodes.tolist()) <= {12, 14, 16, 18, 20}
    share = np.asarray(edges / (nodes * (nodes - 1) / 2))
    assert 0.1 < share.mean() < 0.6  # of the data: some 0.35
