"""Photographs in pairs: places of crops, partners, splits, seeds, messages."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from datamodules import SuperResolutionDataModule, photographs
from lightning_sgm.io.writers import writer_for
from tests.datamodules.image_files import SPLITS, everything, save


def ready(**arguments):
    data = SuperResolutionDataModule(**arguments)
    data.setup()
    return data


def map_of(height, width, number=0):
    """A picture whose pixels say where they are: red the row, green the column, blue the picture."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([rows, columns, np.full_like(rows, number)], -1)


def maps(folder, count=5, height=24, width=32):
    for number in range(count):
        save(folder / f"{number:02d}.png", map_of(height, width, number))
    return str(folder)


def levels(x):
    """[-1, 1] to 0..255, exact."""
    values = (x + 1) * 127.5
    assert (values - values.round()).abs().max() < 1e-4
    return values.round().long()


SMALL: dict[str, Any] = {"factor": 4, "crop": 8, "crops_per_image": 16, "eval_size": 8, "eval_crops": 6}


# ---- what a batch holds


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


# ---- where photographs come from


def names(data, split):
    return [entry.high.stem for entry in data._files[split]]


def test_splits_are_by_picture(tmp_path):
    path = maps(tmp_path / "a", 11)
    data = SuperResolutionDataModule(path=path, **SMALL)
    assert names(data, "val") == names(data, "test") == ["00", "05", "10"]
    assert names(data, "train") == ["01", "02", "03", "04", "06", "07", "08", "09"]
    assert names(SuperResolutionDataModule(path=path, hold_out=10, **SMALL), "val") == ["00", "10"]
    data = SuperResolutionDataModule(path=path, val_fraction=0.2, test_fraction=0.3, **SMALL)
    assert [len(names(data, split)) for split in SPLITS] == [6, 2, 3]
    assert sorted(name for split in SPLITS for name in names(data, split)) == [f"{i:02d}" for i in range(11)]
    data = SuperResolutionDataModule(path=path, test_path=maps(tmp_path / "b", 2), **SMALL)
    assert [len(names(data, split)) for split in SPLITS] == [11, 2, 2]


def test_photographs_of_installed_packages():
    data = SuperResolutionDataModule()
    assert names(data, "test") == names(data, "val") == ["china"]
    assert names(data, "train") == ["flower", "grace_hopper"]
    data.setup()
    assert everything(data, "val").shape == (24, 3, 128, 128)
    assert 0.05 < data.spec["sigma_residual"] < 0.2


def test_sets_that_are_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(photographs, "BACKGROUNDS", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"apt-get install budgie-backgrounds.*give its folder as path"):
        SuperResolutionDataModule("budgie")
    monkeypatch.setattr(photographs, "BACKGROUNDS", tmp_path)
    maps(tmp_path, 6)
    assert names(SuperResolutionDataModule("budgie", **SMALL), "val") == ["00", "05"]
    missing = "datamodules.photographs.find_spec"
    monkeypatch.setattr(missing, lambda name: None if name == "skimage" else find_spec(name))
    with pytest.raises(FileNotFoundError, match=r"astronaut.png comes with skimage.*pip install scikit-image"):
        SuperResolutionDataModule("skimage")


def test_pictures_are_shrunk_but_never_enlarged(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png", map_of(40, 120))
    sizes = {}
    for sides in ((60, None), (None, 30), (60, 12), (500, 500)):
        data = ready(path=str(tmp_path), long_side=sides[0], short_side=sides[1], **SMALL | {"eval_crops": None})
        sizes[sides] = tuple(data.examples("val", 1)["x"].shape[-2:])
    assert sizes == {(60, None): (20, 60), (None, 30): (28, 88), (60, 12): (12, 36), (500, 500): (40, 120)}
    with Image.open(tmp_path / "0.png") as image:
        expected = np.asarray(image.resize((60, 20), Image.Resampling.LANCZOS))
    data = ready(path=str(tmp_path), long_side=60, **SMALL | {"eval_crops": None})
    assert np.array_equal(levels(data.examples("val", 1)["x"])[0].permute(1, 2, 0), expected)


def test_gray_transparent_and_deep_pictures_are_converted_and_said_once(tmp_path):
    save(tmp_path / "0.png", np.full((8, 8), 100))
    clear = np.full((8, 8, 4), [10, 20, 30, 0])
    clear[:, :4, 3] = 255
    save(tmp_path / "1.png", clear)
    Image.fromarray(np.full((8, 8), 200 * 257, dtype=np.uint16)).save(tmp_path / "2.png")
    save(tmp_path / "3.png", np.full((8, 8, 3), 7))
    with pytest.warns(UserWarning, match=r"3 pictures become RGB with 8 bits per colour: .*[012]\.png") as caught:
        data = ready(path=str(tmp_path), **SMALL, hold_out=3, flip=False)
    assert len(caught) == 1
    x = levels(data.fetch("train", torch.tensor([0, 16]), 0)["x"])
    assert x[0, :, 0, 0].tolist() == [10, 20, 30]
    assert x[0, :, 0, 7].tolist() == [255, 255, 255]
    assert (x[1] == 200).all()
    assert levels(data.examples("val", 1)["x"]).unique().tolist() in ([100], [7])


# ---- pairs


def pairs(folder, factor=2, count=6):
    for number in range(count):
        save(folder / "gt" / "deep" / f"{number:02d}.png", map_of(12 * factor, 16 * factor, number))
        save(folder / "lq" / "deep" / f"{number:02d}.bmp", map_of(12, 16, 100 + number))
    return folder


@pytest.mark.parametrize("factor", [1, 2])
def test_pairs_are_cut_at_the_same_places(tmp_path, factor):
    pairs(tmp_path, factor)
    arguments = {"factor": factor, "crop": 8, "eval_size": 4, "eval_crops": 9, "flip": False}
    data = ready(path=str(tmp_path), **arguments)
    batch = data.fetch("train", torch.arange(200), 0)
    for x, low in zip(levels(batch["x"]), levels(batch["low"]), strict=True):
        assert (low[:2, 0, 0] * factor).tolist() == x[:2, 0, 0].tolist()
        assert int(low[2, 0, 0]) == 100 + int(x[2, 0, 0])
        assert low.shape == (3, 8 // factor, 8 // factor)
    apart = ready(path=str(tmp_path / "gt"), low_path=str(tmp_path / "lq"), test_path=str(tmp_path), **arguments)
    assert [len(apart._files[split]) for split in SPLITS] == [6, 6, 6]
    assert set(levels(everything(apart, "test", "low"))[:, 2, 0, 0].tolist()) == set(range(100, 106))


def test_pictures_without_partner_are_named(tmp_path):
    pairs(tmp_path)
    save(tmp_path / "gt" / "deep" / "04a.png", map_of(24, 32))
    with pytest.raises(ValueError, match=r"04a.png has no partner of the same name in .*lq \(1 have none\)"):
        SuperResolutionDataModule(path=str(tmp_path), factor=2)
    save(tmp_path / "lq" / "deep" / "04a.png", map_of(12, 16))
    save(tmp_path / "lq" / "zoo.png", map_of(12, 16))
    with pytest.raises(ValueError, match=r"zoo.png has no partner of the same name in .*gt"):
        SuperResolutionDataModule(path=str(tmp_path / "gt"), low_path=str(tmp_path / "lq"), factor=2)
    save(tmp_path / "gt" / "zoo.png", map_of(24, 32))
    save(tmp_path / "gt" / "zoo.jpg", map_of(24, 32))
    with pytest.raises(ValueError, match=r"zoo\..* and .*zoo\..* have the same name"):
        SuperResolutionDataModule(path=str(tmp_path), factor=2)


def test_pairs_of_other_factors_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"0\d.png is 32 x 24 pixels and .*0\d.bmp 16 x 12.*not a factor of 4"):
        ready(path=str(pairs(tmp_path)), **SMALL)
    with pytest.raises(ValueError, match=r"0\d.png has a low-resolution partner.*leave out long_side"):
        SuperResolutionDataModule(path=str(tmp_path), factor=2, long_side=100)
    with pytest.raises(ValueError, match="has a low-resolution partner"):
        SuperResolutionDataModule(path=str(tmp_path), factor=2, degradation="blind")


# ---- messages


def test_small_and_broken_pictures_are_named(tmp_path):
    path, other = maps(tmp_path / "a"), maps(tmp_path / "b", 1)
    with pytest.raises(ValueError, match=r"0\d.png has 32 x 24 pixels to use, too few for crop: 28"):
        ready(path=path, **SMALL | {"crop": 28})
    with pytest.raises(ValueError, match=r"00.png has 32 x 24 pixels to use, too few for eval_size: 32"):
        ready(path=path, **SMALL | {"eval_size": 32})
    save(tmp_path / "large" / "x.png", map_of(48, 48))
    blind = {"degradation": "blind", "crop": 48, "eval_crops": None}
    with pytest.raises(ValueError, match=r"00.png has 32 x 24 .*too few for the degradation, which needs 47"):
        ready(path=str(tmp_path / "large"), test_path=other, **SMALL | blind)
    save(tmp_path / "b" / "00.png", map_of(3, 9))
    with pytest.raises(ValueError, match=r"00.png has 8 x 0 .*too few for the degradation, which needs 4"):
        ready(path=path, test_path=other, **SMALL | {"eval_crops": None})
    (tmp_path / "a" / "03.png").write_bytes((tmp_path / "a" / "03.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read the picture .*03.png"):
        ready(path=path, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "imagenet"}, "no dataset 'imagenet': choose one of packages, skimage, budgie"),
        ({"crop": 10}, "crop must be divisible by the factor 4, got 10"),
        ({"eval_size": 10}, "eval_size must be divisible by the factor 4, got 10"),
        ({"factor": 0}, "factor must be at least 1"),
        ({"eval_crops": 0}, "eval_crops must be at least 1"),
        ({"degradation": "blur"}, "no degradation 'blur': choose bicubic or blind"),
        ({"degradation": "blind", "crop": 44}, "crop must be at least 47 for the blind degradation, got 44"),
        ({"val_fraction": 0.1}, "belong to a path"),
        ({"low_path": "x"}, "belong to a path"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SuperResolutionDataModule(**arguments)


def test_splits_out_of_range(tmp_path):
    path = maps(tmp_path, 2)
    with pytest.raises(ValueError, match="give val_fraction and test_fraction together"):
        SuperResolutionDataModule(path=path, val_fraction=0.1, **SMALL)
    with pytest.raises(ValueError, match="hold_out must be at least 2"):
        SuperResolutionDataModule(path=path, hold_out=1, **SMALL)
    with pytest.raises(ValueError, match="2 pictures are too few"):
        SuperResolutionDataModule(path=path, val_fraction=0.1, test_fraction=0.1, **SMALL)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        SuperResolutionDataModule(path=path, test_path=str(tmp_path / "none"), **SMALL)
