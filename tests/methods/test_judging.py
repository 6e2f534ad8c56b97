"""Numbers of samples, their floors and rivals: those of the metric computed by hand over all examples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchmetrics import Metric

from lightning_sgm.methods.judging import Rivalry, judge
from lightning_sgm.metrics import ClassifierTwoSample, Fidelity, FrechetDistance, PerceptualDistance
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
    for name, each in zip(ways, judges, strict=True):
        alone = PerceptualDistance("judge", metric.frozen[0])
        alone.update(ways[name], truth)
        alone.update(ways[name].flip(0) * 0.5, truth)
        assert float(each.compute()) == pytest.approx(float(alone.compute()), rel=1e-6)
    assert len({round(float(judge.compute()), 6) for judge in judges}) == 3
    with pytest.raises(ValueError, match="has seen no image"):
        metric.compute()


def test_no_metrics_no_restoring(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = model()
    monkeypatch.setattr(type(module), "rivals_of", None)
    (values,) = trainer(tmp_path).test(module, data, verbose=False)
    assert set(values) == {"test/loss"}


# Samples, the floor, and samples against what was learnt from.

TRAIN, TEST, SAMPLED = 600, 40, 1000.0  # training examples are 0..599, test examples -1..-40, samples 1000 and more


class Recorder(Metric):
    """Remembers which examples it was fed, in which pieces; its value is the difference of their means."""

    name = "recorder"
    inputs = ("x", "extra")

    def __init__(self, log: list[Any], against: bool = False) -> None:
        super().__init__()
        self.halves, self.against_train = True, against
        self.log = log
        self.seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def __deepcopy__(self, memo: Any) -> Recorder:
        other = Recorder(self.log, self.against_train)
        other.seen = {real: list(parts) for real, parts in self.seen.items()}
        return other

    def update(self, x: torch.Tensor, extra: torch.Tensor, real: bool) -> None:
        assert torch.equal(extra[:, 0], 2 * x)
        self.seen[real].append(x)

    def compute(self) -> dict[str, torch.Tensor]:
        real, samples = (torch.cat(self.seen[side]) for side in (True, False))
        pieces = {side: [len(part) for part in self.seen[side]] for side in (True, False)}
        self.log.append({"real": real, "samples": samples, "pieces": pieces, "halves": self.halves})
        found = {"recorder": samples.mean() - real.mean(), "worst": samples.max()}
        return found | {"halves": torch.tensor(9.0)}  # even where none are asked for

    def reset(self) -> None:
        self.seen = {True: [], False: []}


def examples_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": x, "extra": torch.stack([2 * x, x], 1)}


def sampler_of(rank: int = 0, world: int = 1, **data: Any) -> Any:
    """What ``judge`` asks of a model: batches of 7 samples, x of number i is 1000 + i."""
    source = SimpleNamespace(examples=lambda split, count: examples_of(torch.arange(float(min(count, TRAIN)))), **data)
    return SimpleNamespace(
        trainer=SimpleNamespace(
            datamodule=source, world_size=world, strategy=SimpleNamespace(reduce=lambda value, reduce_op: value)
        ),
        global_rank=rank,
        device=torch.device("cpu"),
        sampler_evaluations=3,
        sample_batches=lambda count: torch.arange(rank, count, world).split(7),
        sample=lambda indices: examples_of(SAMPLED + indices.double()),
    )


def recorder(log: list[Any], against: bool = False) -> Recorder:
    metric = Recorder(log, against)
    metric.update(**examples_of(-torch.arange(1.0, TEST + 1)), real=True)
    return metric


def test_training_examples_come_in_pieces_and_their_halves_are_no_floor():
    log: list[Any] = []
    metric = recorder(log)
    found = judge(sampler_of(), [metric], TRAIN)
    floor, samples = log
    assert floor["pieces"][False] == [256, 256, 88]
    assert torch.equal(floor["samples"], torch.arange(float(TRAIN)))
    assert torch.equal(floor["real"], samples["real"])
    assert torch.equal(samples["samples"], SAMPLED + torch.arange(TRAIN))
    assert (floor["halves"], samples["halves"]) == (False, True)
    assert metric.halves
    assert {name: float(value) for name, value in found.items()} == {
        "floor/recorder": pytest.approx(299.5 + 20.5),
        "floor/recorder/worst": 599.0,
        "samples/recorder": pytest.approx(1299.5 + 20.5),
        "samples/recorder/worst": 1599.0,
        "samples/recorder/halves": 9.0,
        "samples/evaluations": 3.0,
    }
    assert metric.seen == {True: [], False: []}  # ready for the next time


def test_samples_are_compared_with_what_was_learnt_from_too_where_a_metric_asks_for_it():
    log: list[Any] = []
    metric = recorder(log, against=True)
    found = judge(sampler_of(held_out=True), [metric, recorder([])], 300)
    (against,) = [entry for entry in log if entry["real"].min() >= 0]
    assert torch.equal(against["real"], torch.arange(300.0))
    assert against["pieces"][True] == [256, 44]
    assert torch.equal(against["samples"], SAMPLED + torch.arange(300))
    names = {name for name in found if name.startswith("against_train")}
    assert names == {"against_train/recorder", "against_train/recorder/worst"}
    assert float(found["against_train/recorder"]) == pytest.approx(1000.0)
    assert float(found["floor/recorder"]) == pytest.approx(149.5 + 20.5)
    assert float(found["samples/recorder"]) == pytest.approx(1149.5 + 20.5)


def test_every_process_feeds_its_share():
    log: list[list[Any]] = [[], []]
    for rank in (0, 1):
        judge(sampler_of(rank, 2), [recorder(log[rank], against=True)], 301)
    for part, side in ((0, "samples"), (1, "real")):  # floor, then against_train
        seen = [log[rank][part][side] for rank in (0, 1)]
        assert [len(each) for each in seen] == [151, 150]
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(301.0))


@pytest.mark.parametrize(("held_out", "floor"), [(False, True), (True, False)])
def test_no_floor_where_nothing_is_held_out_or_none_is_wanted(held_out: bool, floor: bool):
    found = judge(sampler_of(held_out=held_out), [recorder([], against=True)], 20, floor)
    assert {name.partition("/")[0] for name in found} == {"samples"}


def test_a_classifier_of_two_samples_is_not_trained_on_halves_for_the_floor(monkeypatch: pytest.MonkeyPatch):
    windows = torch.randn(24, 6, 2, generator=torch.Generator().manual_seed(0))
    metric = ClassifierTwoSample()
    metric.update(windows[:12], real=True)
    module = sampler_of()
    module.trainer.datamodule.examples = lambda split, count: {"x": windows[12:]}
    module.sample = lambda indices: {"x": windows[indices] + 3.0}
    asked: list[int] = []

    def accuracy(self: Any, *sides: torch.Tensor) -> tuple[float, float]:
        asked.append(sum(map(len, sides)))
        return 0.75, 0.1

    monkeypatch.setattr(ClassifierTwoSample, "_accuracy", accuracy)
    found = judge(module, [metric], 12)
    assert asked == [24, 24, 12]  # the floor, the samples, the halves of the real windows
    assert {name for name in found if name.endswith("halves")} == {"samples/two_sample/halves"}
