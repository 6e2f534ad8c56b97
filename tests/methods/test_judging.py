"""Numbers of restorers: those of the metric computed by hand over all examples, for every rival."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sgm.methods.judging import Rivalry
from lightning_sgm.metrics import Fidelity, FrechetDistance, PerceptualDistance
from tests.methods.restoring import ancestral, awake, model, pictures, ready, trainer


@pytest.fixture
def data(tmp_path: Path):
    return ready(path=str(pictures(tmp_path / "pictures")), batch_size=2)  # 5 examples in 3 batches


def by_hand(module: Any, data: Any) -> dict[str, float]:
    batch = data.examples("val", 5)
    low, x, index = (batch[name] for name in ("low", "x", "index"))
    with torch.no_grad():
        answers = {
            "samples": module.restore(low, index),
            "bicubic": torch.nn.functional.interpolate(low, scale_factor=4, mode="bicubic").clamp(-1, 1),
            "nearest": low.repeat_interleave(4, 2).repeat_interleave(4, 3),
        }
    found: dict[str, float] = {}
    for name, answer in answers.items():
        metric = Fidelity()
        metric.update(answer, x)
        found |= {f"{name}/fidelity/{key}": float(value) for key, value in metric.compute().items()}
    return found


def check(values: Any, stage: str, expected: dict[str, float]) -> None:
    for key, value in expected.items():
        assert float(values[f"{stage}/{key}"]) == pytest.approx(value, rel=1e-4), key


def test_rivals_are_judged_as_by_hand(data: Any, tmp_path: Path):
    module = awake(model(metrics=[Fidelity()], sampler=ancestral(3)))
    (values,) = trainer(tmp_path).test(module, data, verbose=False)
    expected = by_hand(module, data)
    check(values, "test", expected)
    assert expected["samples/fidelity/psnr"] < expected["bicubic/fidelity/psnr"] - 0.1  # untrained
    assert values["test/samples/evaluations"] == 3
    assert {key.split("/")[1] for key in values} == {"loss", "samples", "bicubic", "nearest"}  # and no floor
    batch = data.examples("test", 5)
    with torch.no_grad():
        losses = module.losses(batch, module.evaluation_draw(batch))["loss"]
    assert values["test/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    again = trainer(tmp_path).test(module, data, verbose=False)[0]
    assert again == values  # nothing is left over from the first time


def test_batches_do_not_matter(data: Any, tmp_path: Path):
    module = awake(model(metrics=[Fidelity()]))
    whole = ready(path=str(tmp_path / "pictures"), batch_size=5)
    one, other = (trainer(tmp_path).test(module, each, verbose=False)[0] for each in (data, whole))
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("wanted", [0, 1])
def test_validation_judges_only_where_that_is_asked_for(data: Any, tmp_path: Path, wanted: int):
    module = awake(model(metrics=[Fidelity()], val_samples=wanted))
    (values,) = trainer(tmp_path).validate(module, data, verbose=False)
    if wanted:
        check(values, "val", by_hand(module, data))
    else:
        assert set(values) == {"val/loss"}


def test_judging_during_training_is_repeated_and_not_of_the_sanity_check(data: Any, tmp_path: Path):
    module = awake(model(metrics=[Fidelity()], val_samples=1))
    run = trainer(tmp_path, max_steps=4, val_check_interval=2, num_sanity_val_steps=1)
    run.fit(module, data)
    check(run.callback_metrics, "val", by_hand(module.eval(), data))


def test_metrics_of_whole_sets_see_each_rival_and_the_data(data: Any, tmp_path: Path):
    module = awake(model(metrics=[FrechetDistance()]))
    (values,) = trainer(tmp_path).test(module, data, verbose=False)
    names = {key for key in values if "frechet" in key}
    assert len(names) == 3
    assert len({round(values[key], 6) for key in names}) == 3


class Judge(torch.nn.Module):
    """Distances by a network."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return (self.weights(x) - self.weights(truth)).square().mean((1, 2, 3))


def test_frozen_networks_of_metrics_are_shared_and_their_sums_are_not():
    metric = PerceptualDistance("judge", Judge())
    ways = {name: torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    truth = torch.zeros(2, 3, 32, 32)
    rivalry = Rivalry([metric, Fidelity()], list(ways))
    judges: list[Any] = [judges[0] for judges in rivalry._judges.values()]
    assert {id(judge.frozen[0]) for judge in judges} == {id(metric.frozen[0])}
    assert len({id(judge) for judge in judges}) == 3
    rivalry.update(ways, truth, 1.0)
    rivalry.update({name: x.flip(0) * 0.5 for name, x in ways.items()}, truth, 1.0)
    for name, judge in zip(ways, judges, strict=True):
        alone = PerceptualDistance("judge", metric.frozen[0])
        alone.update(ways[name], truth)
        alone.update(ways[name].flip(0) * 0.5, truth)
        assert float(judge.compute()) == pytest.approx(float(alone.compute()), rel=1e-6)
    assert len({round(float(judge.compute()), 6) for judge in judges}) == 3
    with pytest.raises(ValueError, match="has seen no image"):
        metric.compute()


def test_no_metrics_no_restoring(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = model()
    monkeypatch.setattr(type(module), "rivals_of", None)
    (values,) = trainer(tmp_path).test(module, data, verbose=False)
    assert set(values) == {"test/loss"}
