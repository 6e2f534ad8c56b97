"""Photographs in files: sets, splits, sizes, kinds, partners, messages."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import SuperResolutionDataModule, photographs
from tests.datamodules.image_files import SPLITS, everything, save
from tests.datamodules.photograph_files import SMALL, levels, map_of, maps, pairs, ready

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
