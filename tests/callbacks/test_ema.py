"""The average against a loop by hand, and where it is seen, saved and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_sgm.callbacks import EMA
from lightning_sgm.io.checkpoint import read_checkpoint
from tests.callbacks.tiny import Data, Tiny, TwoOptimizers, Watch, module, same, trainer, weights

TRAINED = ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]


def average(ema: EMA) -> dict[str, Tensor]:
    return {name.removeprefix("network."): ema._average[i].clone() for name, i in ema._names.items()}


def test_ramp_of_the_decay():
    ema = EMA(decay=0.9)
    assert [ema.decay_at(n) for n in (1, 2, 3, 8)] == [2 / 11, 3 / 12, 4 / 13, 9 / 18]
    assert ema.decay_at(79) == pytest.approx(80 / 89)
    assert ema.decay_at(79) < 0.9
    assert ema.decay_at(81) == 0.9
    assert ema.decay_at(10**6) == 0.9
    assert EMA(decay=0.9, ramp=False).decay_at(1) == 0.9


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_decay_outside_the_unit_interval_is_refused(decay: float):
    with pytest.raises(ValueError, match="decay"):
        EMA(decay=decay)


def by_hand(history: list[dict[str, Tensor]], start: dict[str, Tensor], decay: float) -> dict[str, Tensor]:
    """The definition, in float64."""
    result = {name: start[name].double() for name in TRAINED}
    for n, now in enumerate(history, start=1):
        d = min(decay, (1 + n) / (10 + n))
        result = {name: d * result[name] + (1 - d) * now[name].double() for name in TRAINED}
    return result


@pytest.mark.parametrize(
    ("kind", "options", "updates"),
    [
        (Tiny, {"max_steps": 11}, list(range(1, 12))),
        (Tiny, {"max_epochs": 1, "accumulate_grad_batches": 3}, [3, 6, 8]),  # the last batch of an epoch steps too
        (TwoOptimizers, {"max_steps": 22}, list(range(1, 12))),
    ],
    ids=["plain", "accumulation", "two optimisers"],
)
def test_equals_the_loop_by_hand(tmp_path: Path, kind: type[Tiny], options: dict, updates: list[int]):
    ema, model = EMA(decay=0.4), module(kind)
    start, batches, history = weights(model.network), [0], []

    def record(run, pl_module):
        batches[0] += 1
        if batches[0] in updates:
            history.append(weights(pl_module.network))
        if history:
            expected = by_hand(history, start, 0.4)
            torch.testing.assert_close(average(ema), expected, check_dtype=False, rtol=0, atol=1e-6)
            assert not torch.allclose(average(ema)["0.weight"], history[-1]["0.weight"])

    trainer(tmp_path, ema, Watch(on_train_batch_end=record), limit_val_batches=0, **options).fit(model, Data())
    assert ema.state_dict() == {"updates": len(updates)}
    assert model.updates == len(updates)


def test_several_updates_in_one_batch_count_each(tmp_path: Path):
    class Twice(TwoOptimizers):
        @property
        def updates(self) -> int:
            return self.trainer.global_step

    ema, model = EMA(decay=0.5, ramp=False), module(Twice)
    start = weights(model.network)
    trainer(tmp_path, ema, max_steps=2, limit_val_batches=0).fit(model, Data())
    assert ema.state_dict() == {"updates": 2}
    assert ema._raw is not None
    raw = {name.removeprefix("network."): ema._raw[i] for name, i in ema._names.items()}
    expected = {name: 0.25 * start[name] + 0.75 * raw[name] for name in TRAINED}
    torch.testing.assert_close(average(ema), expected)


def test_only_trained_float_parameters_of_the_named_parts(tmp_path: Path):
    ema, model = EMA(decay=0.5), module()
    before = weights(model)
    trainer(tmp_path, ema, max_steps=5, limit_val_batches=0).fit(model, Data())
    after = weights(model)
    assert list(average(ema)) == TRAINED
    assert torch.equal(after["network.fixed"], before["network.fixed"])
    assert same(weights(model.teacher), {k[8:]: v for k, v in before.items() if k.startswith("teacher.")})
    assert int(after["network.2.num_batches_tracked"]) == 5


def test_validation_sees_the_average_and_training_does_not(tmp_path: Path):
    ema, model = EMA(decay=0.9), module()
    seen: list[bool] = []
    raw: list[dict[str, Tensor]] = []
    model.during_validation = [lambda m: seen.append(same({n: weights(m.network)[n] for n in TRAINED}, average(ema)))]

    def keep(run, pl_module):
        raw.append(weights(pl_module.network))

    def compare(run, pl_module):
        assert same(weights(pl_module.network), raw[-1])

    watch = Watch(on_train_batch_end=keep, on_validation_end=compare)
    trainer(tmp_path, ema, watch, max_steps=6, val_check_interval=2).fit(model, Data())
    assert seen == [True] * 6
    assert not torch.equal(raw[-1]["0.weight"], average(ema)["0.weight"])


def test_files_hold_the_average_and_the_raw_weights(tmp_path: Path):
    ema, model = EMA(decay=0.9), module()
    full = ModelCheckpoint(tmp_path, "full", every_n_train_steps=5)
    slim = ModelCheckpoint(tmp_path, "slim", every_n_train_steps=5, every_n_epochs=None, save_weights_only=True)
    expected: dict[str, dict[str, Tensor]] = {}

    def keep(run, pl_module):
        expected["raw"], expected["average"] = weights(pl_module.network), average(ema)

    run = trainer(tmp_path, ema, Watch(on_train_batch_end=keep), full, max_steps=5, limit_val_batches=0)
    run.callbacks.append(slim)  # type: ignore[attr-defined]  # Lightning refuses two with the same triggers
    run.fit(model, Data())
    for name in ("full", "slim"):
        state = read_checkpoint(tmp_path / f"{name}.ckpt")["state_dict"]
        assert same({n: state[f"network.{n}"] for n in TRAINED}, expected["average"])
        assert torch.equal(state["network.2.running_mean"], expected["raw"]["2.running_mean"])
        fresh = module(seed=1)
        fresh.load_state_dict(state)
    raw = read_checkpoint(tmp_path / "full.ckpt")["raw_state"]
    assert same(raw, {f"network.{n}": expected["raw"][n] for n in TRAINED})
    assert "raw_state" not in read_checkpoint(tmp_path / "slim.ckpt")


def test_average_stays_after_fit_and_raw_weights_are_not_lost(tmp_path: Path):
    ema, model = EMA(decay=0.9), module()
    raw: dict[str, Tensor] = {}
    watch = Watch(on_train_batch_end=lambda run, m: raw.update(weights(m.network)))
    run = trainer(tmp_path, ema, watch, max_steps=5)
    run.fit(model, Data())
    assert same({n: weights(model.network)[n] for n in TRAINED}, average(ema))
    run.save_checkpoint(tmp_path / "after.ckpt")
    run.save_checkpoint(tmp_path / "slim.ckpt", weights_only=True)
    checkpoint = read_checkpoint(tmp_path / "after.ckpt")
    assert same(checkpoint["raw_state"], {f"network.{n}": raw[n] for n in TRAINED})
    for state in (checkpoint["state_dict"], read_checkpoint(tmp_path / "slim.ckpt")["state_dict"]):
        assert same({n: state[f"network.{n}"] for n in TRAINED}, average(ema))
    # A second fit goes on from the raw weights, not from the average.
    begun: dict[str, Tensor] = {}
    watch = Watch(on_train_start=lambda run, m: begun.update(weights(m.network)))
    trainer(tmp_path, ema, watch, max_steps=1, limit_val_batches=0).fit(model, Data())
    assert same(begun, raw)
    assert ema.state_dict() == {"updates": 6}


def test_weights_loaded_between_two_fits_are_kept(tmp_path: Path):
    ema, model, other = EMA(decay=0.9), module(), module(seed=1)
    trainer(tmp_path, ema, max_steps=3, limit_val_batches=0).fit(model, Data())
    model.load_state_dict(other.state_dict())
    begun: dict[str, Tensor] = {}
    watch = Watch(on_train_start=lambda run, m: begun.update(weights(m.network)))
    trainer(tmp_path, ema, watch, max_steps=1, limit_val_batches=0).fit(model, Data())
    assert same(begun, weights(other.network))
    assert ema.state_dict() == {"updates": 1}


def test_context_is_reentrant_and_survives_errors(tmp_path: Path):
    ema, model = EMA(decay=0.9), module()

    def look(run, pl_module):
        raw = weights(pl_module.network)
        with ema.averaged(pl_module):
            inside = {n: weights(pl_module.network)[n] for n in TRAINED}
            assert same(inside, average(ema))
            assert not torch.equal(inside["0.weight"], raw["0.weight"])
            with ema.averaged(pl_module):
                assert same({n: weights(pl_module.network)[n] for n in TRAINED}, average(ema))
            assert same({n: weights(pl_module.network)[n] for n in TRAINED}, average(ema))
        assert same(weights(pl_module.network), raw)
        with pytest.raises(KeyError), ema.averaged(pl_module):
            raise KeyError
        assert same(weights(pl_module.network), raw)
        with ema.averaged(module(seed=5)):
            assert same(weights(pl_module.network), raw)

    trainer(tmp_path, ema, Watch(on_train_batch_end=look), max_steps=3, limit_val_batches=0).fit(model, Data())
    with ema.averaged(model):
        assert same({n: weights(model.network)[n] for n in TRAINED}, average(ema))
    assert same({n: weights(model.network)[n] for n in TRAINED}, average(ema))


def fail(*_: object) -> None:
    raise ArithmeticError("on purpose")


def test_failed_fit_leaves_raw_weights_yet_evaluation_sees_the_average(tmp_path: Path):
    ema, model = EMA(decay=0.9), module()
    raw: dict[str, Tensor] = {}
    watch = Watch(on_train_batch_end=lambda run, m: raw.update(weights(m.network)))
    model.during_validation = [fail]
    run = trainer(tmp_path, ema, watch, max_steps=6, val_check_interval=3)
    with pytest.raises(ArithmeticError):
        run.fit(model, Data())
    assert same(weights(model.network), raw)
    seen: list[bool] = []
    model.during_validation = [lambda m: seen.append(same({n: weights(m.network)[n] for n in TRAINED}, average(ema)))]
    run = trainer(tmp_path, ema)
    run.validate(model, Data(), verbose=False)
    run.test(model, Data(), verbose=False)
    assert seen == [True] * 4
    begun: dict[str, Tensor] = {}
    watch = Watch(on_train_start=lambda run, m: begun.update(weights(m.network)))
    trainer(tmp_path, ema, watch, max_steps=1, limit_val_batches=0).fit(model, Data())
    assert same(begun, raw)


def test_test_of_another_checkpoint_is_of_its_weights_as_they_are(tmp_path: Path):
    first, model = EMA(decay=0.9), module()
    run = trainer(tmp_path, first, max_steps=3, limit_val_batches=0)
    run.fit(model, Data())
    run.save_checkpoint(tmp_path / "early.ckpt")
    early = weights(model.network)
    run = trainer(tmp_path, EMA(decay=0.9), max_steps=8, limit_val_batches=0)
    run.fit(model, Data())
    assert not same(early, weights(model.network))
    seen: list[bool] = []
    model.during_validation = [lambda m: seen.append(same(weights(m.network), early))]
    run.test(model, Data(), ckpt_path=str(tmp_path / "early.ckpt"), verbose=False)
    assert seen == [True, True]
    run.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    state = read_checkpoint(tmp_path / "again.ckpt")["state_dict"]
    assert same({n: state[f"network.{n}"] for n in early}, early)


class Tied(Tiny):
    """The first weight appears twice, and once more outside the part."""

    def __init__(self) -> None:
        super().__init__()
        self.network.append(nn.Linear(3, 4))
        self.network[4].weight = self.network[0].weight
        self.alias = self.network[0]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(batch["x"]).square().mean()


def test_tied_parameters_are_averaged_once_and_saved_under_all_names(tmp_path: Path):
    ema, model = EMA(decay=0.9), module(Tied)
    run = trainer(tmp_path, ema, max_steps=3, limit_val_batches=0)
    run.fit(model, Data())
    run.save_checkpoint(tmp_path / "tied.ckpt")
    assert len(ema._average) == 7
    checkpoint = read_checkpoint(tmp_path / "tied.ckpt")
    for state in (checkpoint["state_dict"], checkpoint["raw_state"]):
        names = ("network.0.weight", "network.4.weight", "alias.weight")
        assert all(torch.equal(state[name], state[names[0]]) for name in names)
    assert not torch.equal(checkpoint["raw_state"]["alias.weight"], checkpoint["state_dict"]["alias.weight"])


def test_half_precision_weights_have_a_float32_average(tmp_path: Path):
    ema, model = EMA(decay=0.9999, ramp=False), module()
    start = weights(model.network)
    run = trainer(tmp_path, ema, max_steps=8, limit_val_batches=0, precision="bf16-true")
    run.fit(model, Data())
    assert model.network[0].weight.dtype == torch.bfloat16
    moved = average(ema)["0.weight"] - start["0.weight"].bfloat16().float()
    assert moved.dtype == torch.float32
    # Every weight moves by about 0.05 per step; a bfloat16 average would not move at all.
    assert bool((moved != 0).all())
    assert float(moved.abs().max()) < 1e-3


def test_module_without_parts_trains_without_average(tmp_path: Path):
    class Bare(Tiny):
        ema_parts = ()

    ema, model = EMA(), module(Bare)
    run = trainer(tmp_path, ema, max_steps=2)
    run.fit(model, Data())
    run.save_checkpoint(tmp_path / "bare.ckpt")
    assert ema._average == []
    assert same(read_checkpoint(tmp_path / "bare.ckpt")["state_dict"], weights(model))


def test_part_that_does_not_exist_is_named(tmp_path: Path):
    class Wrong(Tiny):
        ema_parts = ("nettwork",)

    with pytest.raises(ValueError, match="nettwork"):
        trainer(tmp_path, EMA(), max_steps=2).fit(module(Wrong), Data())
