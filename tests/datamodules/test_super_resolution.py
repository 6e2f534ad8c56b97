"""Photographs in pairs: what a batch holds, places of crops, seeds, fixed examples, fingerprints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from datamodules import SuperResolutionDataModule
from lightning_sgm.io.writers import writer_for
from tests.datamodules.image_files import SPLITS, everything, save
from tests.datamodules.photograph_files import SMALL, levels, map_of, maps, pairs, ready


def test_crops_are_parts_of_one_picture_on_the_grid_of_the_low_resolution(tmp_path):
    path = maps(tmp_path)
    data = ready(path=path, flip=False, **SMALL)
    assert [data.count(split) for split in SPLITS] == [64, 6, 6]
    corners = set()
    for split in SPLITS:
        batch = data.examples(split, 64)
        assert batch["x"].shape[1:] == (3, 8, 8)
        assert batch["low"].shape[1:] == (3, 2, 2)
        for x, low in zip(levels(batch["x"]), levels(batch["low"]), strict=True):
            top, left, number = x[:, 0, 0].tolist()
            assert np.array_equal(x.permute(1, 2, 0), map_of(24, 32, number)[top : top + 8, left : left + 8])
            with Image.open(tmp_path / f"{number:02d}.png") as image:
                small = np.asarray(image.resize((8, 6), Image.Resampling.BICUBIC))
            assert np.array_equal(low.permute(1, 2, 0), small[top // 4 : top // 4 + 2, left // 4 : left // 4 + 2])
            assert (split == "train") == (number != 0)
            corners |= {(top, left)} if split == "train" else set()
    everywhere = {(top, left) for top in range(0, 17, 4) for left in range(0, 25, 4)}
    assert len(corners) > 25
    assert corners <= everywhere


def test_all_places_are_equally_likely(tmp_path):
    data = ready(path=maps(tmp_path), flip=False, **SMALL | {"crops_per_image": 2000})
    x = levels(data.fetch("train", torch.arange(8000), 3)["x"])
    assert x[:, 2, 0, 0].bincount().tolist() == [0, 2000, 2000, 2000, 2000]
    counts = (x[:, 0, 0, 0] // 4 * 7 + x[:, 1, 0, 0] // 4).bincount(minlength=35)
    assert len(counts) == 35
    assert (counts - 8000 / 35).abs().max() < 5 * (8000 / 35) ** 0.5


def test_mirroring_is_of_both_resolutions_and_of_half_the_training_crops(tmp_path):
    data = ready(path=maps(tmp_path), **SMALL)
    index = torch.arange(64)
    plain = ready(path=str(tmp_path), **SMALL, flip=False).fetch("train", index, 0)
    batch = data.fetch("train", index, 0)
    mirrored = levels(batch["x"])[:, 1, 0, 0] > levels(batch["x"])[:, 1, 0, 7]
    assert 20 < mirrored.sum() < 44
    for key in ("x", "low"):
        expected = torch.where(mirrored[:, None, None, None], plain[key].flip(-1), plain[key])
        assert torch.equal(batch[key], expected)
    still = levels(data.fetch("train", index, None)["x"])
    assert (still[:, 1, 0, 0] < still[:, 1, 0, 7]).all()


@pytest.mark.parametrize("degradation", ["bicubic", "blind"])
def test_examples_are_functions_of_seed_epoch_and_index(tmp_path, degradation):
    arguments = {"path": maps(tmp_path, 5, 96, 112), "factor": 2, "crop": 48, "eval_size": 48, "eval_crops": 5}
    data, same, other = (ready(**arguments, degradation=degradation, seed=seed) for seed in (0, 0, 1))
    index = torch.tensor([5, 3, 200])
    batch = data.fetch("train", index, 7)
    for key in ("x", "low"):
        assert torch.equal(batch[key], same.fetch("train", index, 7)[key])
        assert torch.equal(batch[key][1:2], data.fetch("train", index[1:2], 7)[key])
        assert not torch.equal(batch[key], data.fetch("train", index, 8)[key])
        assert not torch.equal(batch[key], other.fetch("train", index, 7)[key])
        assert torch.equal(everything(data, "val", key), everything(other, "val", key))
        assert torch.equal(everything(data, "val", key), everything(data, "test", key))
    moved = ready(**arguments, degradation=degradation, eval_seed=1)
    assert not torch.equal(everything(moved, "val"), everything(data, "val"))


@pytest.mark.parametrize("degradation", ["bicubic", "blind"])
def test_fixed_examples_are_functions_of_seed_and_index(tmp_path, degradation):
    arguments = {"path": maps(tmp_path, 5, 96, 112), "factor": 2, "crop": 48, "eval_size": 48, "eval_crops": 5}
    arguments |= {"degradation": degradation, "crops_per_image": 8}
    data, other = (ready(**arguments, fixed=True, seed=seed) for seed in (0, 1))
    assert data.spec["fixed"]
    assert not ready(**arguments).spec["fixed"]
    index = torch.arange(32)
    whole = data.fetch("train", index, 7)
    mirrored = levels(whole["x"])[:, 1, 0, 0] > levels(whole["x"])[:, 1, 0, 47]
    assert 6 < mirrored.sum() < 26
    order = torch.tensor([5, 3, 31, 0, 17])
    for key in ("x", "low"):
        for epoch in (None, 0, 8):
            assert torch.equal(whole[key][order], data.fetch("train", order, epoch)[key])
            assert torch.equal(whole[key][3:4], data.fetch("train", index[3:4], epoch)[key])
        assert torch.equal(whole[key], everything(data, "train", key))
        assert not torch.equal(whole[key], other.fetch("train", index, 7)[key])
        assert torch.equal(everything(data, "test", key), everything(ready(**arguments), "test", key))
    assert len({tuple(x[:, 0, 0].tolist()) for x in levels(whole["x"])}) > 24  # different squares, though fixed
    still = ready(**arguments, fixed=True, flip=False).fetch("train", index, 0)["x"]
    assert torch.equal(whole["x"], torch.where(mirrored[:, None, None, None], still.flip(-1), still))


def test_fixed_training_serves_the_same_pairs_in_another_order(tmp_path):
    data = ready(path=maps(tmp_path), **SMALL, batch_size=16, fixed=True)
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        joined = {key: torch.cat([batch[key] for batch in batches]) for batches in [list(loader)] for key in batches[0]}
        epochs.append((joined["index"], joined["x"][joined["index"].argsort()]))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(epochs[0][1], epochs[1][1])


def test_the_fingerprint_names_the_training_pairs(tmp_path):
    path, files = maps(tmp_path / "a"), SMALL | {"hold_out": 5}
    first = SuperResolutionDataModule(path=path, **files).fingerprint  # loads the data itself
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert ready(path=maps(tmp_path / "elsewhere"), **files).fingerprint == first
    assert ready(path=path, **files | {"eval_crops": 2, "eval_seed": 3}, batch_size=2).fingerprint == first
    changes: list[dict[str, Any]] = [
        *({"seed": 1}, {"fixed": True}, {"flip": False}, {"crops_per_image": 15}, {"crop": 12}, {"factor": 2}),
        *({"hold_out": 4}, {"short_side": 20}, {"test_path": maps(tmp_path / "b", 1)}),
    ]
    found = {ready(path=path, **files | change).fingerprint for change in changes}
    save(tmp_path / "a" / "00.png", map_of(24, 32, 200))  # not for training
    assert ready(path=path, **files).fingerprint == first
    save(tmp_path / "a" / "03.png", map_of(24, 32, 1))
    save(tmp_path / "a" / "01.png", map_of(24, 32, 3))  # the same pictures in another order
    found.add(ready(path=path, **files).fingerprint)
    blind = {"crop": 48, "eval_size": 48, "factor": 2}
    maps(tmp_path / "large", 5, 64, 64)
    found |= {
        ready(path=str(tmp_path / "large"), degradation=name, **SMALL | blind).fingerprint
        for name in ("bicubic", "blind")
    }
    assert first not in found
    assert len(found) == len(changes) + 3


def test_the_fingerprint_tells_apart_low_resolutions(tmp_path):
    arguments: dict[str, Any] = {"path": str(pairs(tmp_path)), "factor": 2, "crop": 8, "eval_size": 4}
    before = ready(**arguments).fingerprint
    save(tmp_path / "lq" / "deep" / "03.bmp", map_of(12, 16, 77))
    assert ready(**arguments).fingerprint != before


def test_blind_degradation_changes_from_epoch_to_epoch_where_the_place_cannot(tmp_path):
    arguments = {"path": maps(tmp_path, 2, 48, 48), "crop": 48, "crops_per_image": 2, "degradation": "blind"}
    arguments |= {"eval_size": 48, "eval_crops": 2, "flip": False}
    data, other = ready(**arguments), ready(**arguments, seed=1)
    batches = [data.fetch("train", torch.arange(2), epoch) for epoch in (0, 1)] + [
        other.fetch("train", torch.arange(2), 0)
    ]
    assert all(torch.equal(batch["x"], batches[0]["x"]) for batch in batches)
    lows = torch.cat([batch["low"] for batch in batches])
    assert len({tuple(low.flatten().tolist()) for low in lows}) == 6


def test_blind_low_resolution_differs_from_the_bicubic_one(tmp_path):
    arguments = {"path": maps(tmp_path, 5, 96, 112), "factor": 2, "crop": 48, "eval_size": 48, "eval_crops": 5}
    plain, blind = (ready(**arguments, degradation=name).examples("val", 5) for name in ("bicubic", "blind"))
    assert torch.equal(plain["x"], blind["x"])
    assert blind["low"].shape == plain["low"].shape
    assert 0.02 < (plain["low"] - blind["low"]).abs().mean() < 0.5
    levels(blind["low"])


def test_whole_photographs(tmp_path):
    save(tmp_path / "00.png", map_of(22, 33))  # the parts that do not divide by 4 are cut off
    save(tmp_path / "01.png", map_of(24, 16, 1))
    save(tmp_path / "05.png", map_of(12, 40, 5))
    for number in (2, 3, 4):
        save(tmp_path / f"{number:02d}.png", map_of(24, 32, number))
    data = ready(path=str(tmp_path), **SMALL | {"eval_crops": None}, batch_size=3)
    loader = data.val_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == data.count("val") == 2
    assert [tuple(batch["x"].shape) for batch in batches] == [(1, 3, 20, 32), (1, 3, 12, 40)]
    assert [tuple(batch["low"].shape) for batch in batches] == [(1, 3, 5, 8), (1, 3, 3, 10)]
    assert np.array_equal(levels(batches[1]["x"])[0].permute(1, 2, 0), map_of(12, 40, 5))
    common = data.examples("val", 2)
    assert common["x"].shape == (2, 3, 12, 32)
    corner = {int(x[2, 0, 0]): x[:2, 0, 0].tolist() for x in levels(common["x"])}
    assert corner == {0: [4, 0], 5: [0, 4]}
    assert common["low"].shape == (2, 3, 3, 8)


def test_spec_and_writer(tmp_path):
    data = SuperResolutionDataModule(path=maps(tmp_path / "in"), **SMALL)
    assert data.spec["kind"] == "image"
    assert (data.spec["shape"], data.spec["low_shape"], data.spec["factor"]) == ([3, 8, 8], [3, 2, 2], 4)
    assert data.spec["sigma_data"] is None
    data.setup()
    pixels = np.concatenate([map_of(24, 32, number).ravel() for number in range(1, 5)])
    assert data.spec["sigma_data"] == pytest.approx(pixels.std() / 127.5, rel=1e-6)
    batch = data.fetch("train", torch.arange(64), None)
    residual = batch["x"] - functional.interpolate(batch["low"], scale_factor=4, mode="bicubic")
    assert data.spec["sigma_residual"] == pytest.approx(float(residual.std()), rel=0.1)
    files = writer_for(data.spec).save_each(data.examples("val", 2), tmp_path / "out")
    assert [Image.open(file).size for file in files] == [(8, 8)] * 2


def test_training_batches(tmp_path):
    data = ready(path=maps(tmp_path), **SMALL, batch_size=10)
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    assert len({int(i) for batch in batches for i in batch["index"]}) == 60
