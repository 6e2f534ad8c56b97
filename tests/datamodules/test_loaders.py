"""Order, ranks, resuming and hashes of the loaders."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import DataModule
from datamodules.loaders import EvalLoader, TrainLoader, hashed, permutation, splitmix, uniform


def fetch(index, epoch):
    return {"x": index * 10, "epoch": torch.full_like(index, -1 if epoch is None else epoch)}


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def flat(rows):
    return [index for row in rows for index in row]


# ---- hashes


def test_splitmix_is_the_published_generator():
    # Vigna's splitmix64.c with seed 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    got = splitmix(np.array([1234567], dtype=np.uint64), np.arange(5, dtype=np.uint64))
    assert got.tolist() == expected


@given(seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6), start=st.integers(0, 10**9))
@settings(max_examples=25, deadline=None)
def test_hash_of_an_example_does_not_depend_on_its_batch(seed, epoch, start):
    index = torch.arange(start, start + 7)
    together = hashed(index, seed, epoch)
    alone = [hashed(index[i : i + 1], seed, epoch)[0] for i in range(7)]
    assert together.tolist() == alone
    assert len({*together.tolist(), *hashed(index, seed, epoch + 1).tolist()}) == 14


def test_hashed_uniforms_are_uniform_and_independent_of_neighbours():
    numbers = uniform(hashed(torch.arange(2000), 5, 0), 51)
    assert numbers.shape == (2000, 51)
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.bincount((numbers.reshape(-1) * 10).astype(int), minlength=10)
    expected = numbers.size / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.08  # the two halves of one word
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.08


def test_permutation_ignores_and_keeps_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = permutation(50, 3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(permutation(50, 3, 4), first)
    assert not torch.equal(permutation(50, 3, 5), first)
    assert first.sort().values.tolist() == list(range(50))


# ---- training order


@given(examples=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(1, 4), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_training_ranks_get_equal_full_batches_without_duplicates(examples, batch, world, epoch):
    if examples < world:
        return
    rows = min(batch, examples // world)
    loaders = [TrainLoader(fetch, examples, batch, seed=7, ranks=(rank, world)) for rank in range(world)]
    for loader in loaders:
        loader.sampler.set_epoch(epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [indices(loader) for loader in loaders]
    steps = examples // (rows * world)
    assert {len(loader) for loader in loaders} == {steps} == {len(part) for part in parts}
    assert all(len(row) == rows for part in parts for row in part)
    seen = flat(flat(parts))
    assert len(seen) == len(set(seen)) == steps * rows * world
    assert set(seen) <= set(range(examples))


def test_every_index_once_per_epoch_in_an_order_of_its_own():
    loader = TrainLoader(fetch, 24, 4, seed=1)
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append(flat(indices(loader)))
    assert all(sorted(order) == list(range(24)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    assert flat(indices(TrainLoader(fetch, 24, 4, seed=2))) != epochs[0]


def test_two_processes_see_the_global_batches_of_one():
    one = indices(TrainLoader(fetch, 26, 6, seed=3))
    two = [indices(TrainLoader(fetch, 26, 3, seed=3, ranks=(rank, 2))) for rank in (0, 1)]
    assert [first + second for first, second in zip(*two, strict=True)] == one


def test_epoch_and_index_reach_the_batch():
    loader = TrainLoader(fetch, 8, 4)
    loader.set_epoch(5)
    for batch in loader:
        assert torch.equal(batch["x"], batch["index"] * 10)
        assert batch["epoch"].tolist() == [5] * 4
        assert batch["index"].dtype == torch.int64


def test_without_reshuffle_epochs_are_the_same():
    loader = TrainLoader(fetch, 8, 4, reshuffle=False)
    loader.set_epoch(0)
    first = list(loader)
    loader.set_epoch(3)
    second = list(loader)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)


def test_too_large_batch_shrinks_with_a_warning():
    loader = TrainLoader(fetch, 5, 4, ranks=(1, 2))
    with pytest.warns(UserWarning, match="have 5 examples, fewer than one batch of 4 on each of 2 .* batches of 2"):
        assert [len(row) for row in indices(loader)] == [2]


def test_fewer_examples_than_processes_is_an_error():
    with pytest.raises(ValueError, match="have 3 examples, fewer than the 4 processes"):
        len(TrainLoader(fetch, 3, 1, ranks=(0, 4)))


def test_ranks_come_from_torch_distributed_when_iteration_starts(monkeypatch):
    loader, evaluation = TrainLoader(fetch, 12, 2), EvalLoader(fetch, 7, 2)
    assert (len(loader), len(evaluation)) == (6, 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert (len(loader), len(evaluation)) == (2, 1)
    assert indices(evaluation) == [[1, 4]]
    assert indices(loader) == indices(TrainLoader(fetch, 12, 2, ranks=(1, 3)))


# ---- evaluation


@given(examples=st.integers(0, 40), batch=st.integers(1, 9), world=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_evaluation_visits_every_index_once_over_all_ranks(examples, batch, world):
    loaders = [EvalLoader(fetch, examples, batch, ranks=(rank, world)) for rank in range(world)]
    parts = [indices(loader) for loader in loaders]
    assert sorted(flat(flat(parts))) == list(range(examples))
    for rank, (loader, part) in enumerate(zip(loaders, parts, strict=True)):
        assert len(loader) == len(part)
        assert flat(part) == list(range(examples))[rank::world]


def test_evaluation_asks_for_unaugmented_examples():
    assert {value for batch in EvalLoader(fetch, 5, 2) for value in batch["epoch"].tolist()} == {-1}


# ---- resuming


@given(done=st.integers(0, 6), epoch=st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_resume_continues_with_the_next_batch(done, epoch):
    straight = TrainLoader(fetch, 25, 4, seed=9)
    straight.set_epoch(epoch)
    iterator = iter(straight)
    for _ in range(done):
        next(iterator)
    state = straight.state_dict()
    resumed = TrainLoader(fetch, 25, 4, seed=9)
    resumed.load_state_dict(state if done else {"epoch": epoch, "batches": 0})
    assert resumed.state_dict()["batches"] == done
    iter(resumed)  # Lightning makes and drops iterators before it sets the epoch
    resumed.set_epoch(epoch)
    assert indices(resumed) == [batch["index"].tolist() for batch in iterator]
    assert len(indices(resumed)) == 6  # skipping happens once


def test_state_of_a_finished_epoch_does_not_shorten_the_next():
    loader = TrainLoader(fetch, 24, 4)
    loader.load_state_dict({"epoch": 2, "batches": 5})
    loader.set_epoch(3)
    assert len(indices(loader)) == 6


class Recorder(LightningModule):
    """Adds up a weight that depends on the order of the batches, bit by bit."""

    def __init__(self, interrupt_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.interrupt_at = interrupt_at
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.interrupt_at:
            raise InterruptedError
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return ((self.weight - batch["x"]) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        torch.rand(3)  # validation that draws must not change training

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Line(DataModule):
    """A user's data module: noisy numbers, augmented by the epoch."""

    def __init__(self):
        super().__init__(batch_size=2, seed=4)
        self.spec = {"kind": "image", "shape": [1]}

    def load(self):
        self.values = torch.arange(13.0)

    def count(self, split):
        return len(self.values) if split == "train" else 3

    def fetch(self, split, index, epoch):
        return {"x": self.values[index] + (epoch or 0) / 7}


def run(folder, steps, resume=None, keep=None, interrupt_at=None, **options):
    module = Recorder(interrupt_at)
    keep = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **(keep or {"every_n_train_steps": 100}))
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    with contextlib.suppress(InterruptedError):
        trainer.fit(module, datamodule=Line(), ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}, {"val_check_interval": 2}], ids=str)
@pytest.mark.parametrize("at", [2, 4, 5, 6, 8])
def test_lightning_resumes_bit_exactly_anywhere(tmp_path, at, options):
    straight = run(tmp_path / "straight", 15, keep={"every_n_train_steps": at}, **options)
    resumed = run(tmp_path / "resumed", 15, tmp_path / "straight" / f"step={at}.ckpt", **options)
    assert resumed.seen == straight.seen[at:]
    assert torch.equal(resumed.weight, straight.weight)


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}], ids=str)
def test_lightning_resumes_bit_exactly_from_the_end_of_an_epoch(tmp_path, options):
    # Not with max_steps: Lightning 2.6.6 then counts the finished epoch twice after resuming from such a checkpoint.
    options = {**options, "max_epochs": 4}
    straight = run(tmp_path / "straight", -1, keep={"save_on_train_epoch_end": True}, **options)
    at = options.get("limit_train_batches", 6) * 2
    resumed = run(tmp_path / "resumed", -1, tmp_path / "straight" / f"step={at}.ckpt", **options)
    assert len(resumed.seen) == at
    assert resumed.seen == straight.seen[at:]
    assert torch.equal(resumed.weight, straight.weight)


@pytest.mark.parametrize("at", [1, 5, 6, 8])
def test_an_interrupted_step_is_repeated_after_resuming(tmp_path, at):
    straight = run(tmp_path / "straight", 10)
    run(tmp_path / "stopped", 10, keep={"every_n_train_steps": 100, "save_on_exception": True}, interrupt_at=at)
    resumed = run(tmp_path / "resumed", 10, tmp_path / "stopped" / f"step={at}.ckpt")
    assert resumed.seen == straight.seen[at:]
    assert torch.equal(resumed.weight, straight.weight)


def test_lightning_serves_new_orders_each_epoch(tmp_path):
    seen = run(tmp_path, 12).seen
    assert [epoch for epoch, _ in seen] == [0] * 6 + [1] * 6
    first, second = (flat(rows for epoch, rows in seen if epoch == number) for number in (0, 1))
    assert len(set(first)) == len(set(second)) == 12
    assert first != second


def test_lightning_overfits_on_the_same_batches(tmp_path):
    seen = [rows for _, rows in run(tmp_path, 6, overfit_batches=2).seen]
    assert seen[:2] == seen[2:4] == seen[4:]


# ---- the common base


def test_examples_work_before_setup_and_are_a_fixed_selection():
    data = Line()
    few, all_of_them = data.examples("train", 5), data.examples("train", 100)
    assert len(few["index"]) == 5
    assert torch.equal(all_of_them["index"][:5], few["index"])
    assert sorted(all_of_them["index"].tolist()) == list(range(13))
    assert torch.equal(few["x"], few["index"].float())


@pytest.mark.parametrize(("split", "count", "message"), [("valid", 1, "no split 'valid'"), ("val", 0, "count must be")])
def test_examples_refuse_what_is_not_there(split, count, message):
    with pytest.raises(ValueError, match=message):
        Line().examples(split, count)


def test_eval_loader_serves_any_split_without_augmentation():
    data = Line()
    data.setup()
    assert torch.equal(torch.cat([batch["x"] for batch in data.eval_loader("train")]), data.values)
