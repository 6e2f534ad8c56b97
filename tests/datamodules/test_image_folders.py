"""Folders of pictures and of idx files: splits, classes, formats, messages."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageDataModule, pictures
from tests.datamodules.image_files import SPLITS, everything, gray_folder, idx_folder, ready, save, write_idx

# ---- idx files


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_folder(tmp_path, ending):
    sets = idx_folder(tmp_path, ending)
    data = ImageDataModule("cifar10", path=str(tmp_path), labels=True)  # the path takes the set's place
    assert data.spec["shape"] == [1, 4, 4]
    assert data.spec["classes"] == 3
    assert data.spec["sigma_data"] is None
    data.setup()
    for split, name in (("train", "train"), ("val", "t10k"), ("test", "t10k")):
        expected = torch.from_numpy(sets[name][0])[:, None] / 127.5 - 1
        assert torch.allclose(everything(data, split), expected.float(), atol=1e-6)
        assert everything(data, split, "label").tolist() == sets[name][1].tolist()
    assert data.spec["sigma_data"] == pytest.approx(float(everything(data, "train").std(correction=0)), rel=1e-5)
    assert type(data.spec["sigma_data"]) is float


def test_idx_folder_without_test_files_or_labels_is_cut(tmp_path):
    write_idx(tmp_path / "train-images.idx3-ubyte", np.zeros((40, 3, 5)))
    data = ready(path=str(tmp_path))
    assert data.spec["shape"] == [1, 3, 5]
    assert [data.count(split) for split in SPLITS] == [36, 2, 2]
    with pytest.raises(FileNotFoundError, match="has no train-labels-idx1-ubyte or train-labels-idx1-ubyte"):
        ImageDataModule(path=str(tmp_path), labels=True)


def test_broken_idx_files_are_named(tmp_path):
    idx_folder(tmp_path)
    name = tmp_path / "train-images-idx3-ubyte"
    whole = name.read_bytes()
    name.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is damaged: .* promises 320 bytes, it has 319"):
        ready(path=str(tmp_path))
    name.write_bytes(b"hello")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not an idx file of bytes"):
        ready(path=str(tmp_path))
    write_idx(name, np.zeros(5))
    with pytest.raises(ValueError, match=r"does not hold images: its shape is \[5\]"):
        ready(path=str(tmp_path))
    write_idx(name, np.zeros((5, 2, 2)))
    with pytest.raises(ValueError, match="has 20 labels for the 5 images"):
        ready(path=str(tmp_path), labels=True)
    name.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-12])
    with pytest.raises(ValueError, match=r"cannot read .*train-images-idx3-ubyte.gz"):
        ready(path=str(tmp_path))


# ---- folders of pictures


def test_folder_is_cut_into_disjoint_splits_that_do_not_depend_on_the_seed(tmp_path):
    path = gray_folder(tmp_path, 60)
    parts = [[int(x[0, 0, 0] * 127.5 + 127.5 + 0.5) for x in everything(ready(path=path), split)] for split in SPLITS]
    assert [len(part) for part in parts] == [54, 3, 3]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(60))
    assert parts[1] != [0, 1, 2]
    again = ready(path=path, seed=5)
    assert all(torch.equal(everything(again, split), everything(ready(path=path), split)) for split in SPLITS)


def test_values_reach_both_ends_exactly(tmp_path):
    data = ready(path=gray_folder(tmp_path, 20))
    x = torch.cat([everything(data, split) for split in SPLITS])
    assert (x.min(), x.max()) == (-1, 1)
    row = x[(x[:, 0, 0, 0] == 7 / 127.5 - 1)]
    assert torch.allclose(row[0, 0], torch.tensor([[7.0, 7], [7, 248]]) / 127.5 - 1)


def test_sub_folders_are_classes(tmp_path):
    path = gray_folder(tmp_path, 30, ("cat", "dog", "emu"))
    save(tmp_path / "dog" / "deeper" / "x.png", np.zeros((2, 2)))
    data = ready(path=path, labels=True)
    assert data.spec["classes"] == 3
    for split in SPLITS:
        value = ((everything(data, split)[:, 0, 0, 0] + 1) * 127.5).round().long()
        expected = torch.where(everything(data, split)[:, 0, 1, 1] == -1, 1, value % 3)
        assert torch.equal(everything(data, split, "label"), expected)
    assert ready(path=path).spec["classes"] == 0


def test_own_folders_for_validation_and_test(tmp_path):
    train = gray_folder(tmp_path / "a", 10, ("cat", "dog"))
    val = gray_folder(tmp_path / "b", 4, ("dog",))
    data = ready(path=train, val_path=val, labels=True)
    assert [data.count(split) for split in SPLITS] == [9, 4, 1]
    assert everything(data, "val", "label").tolist() == [1] * 4
    data = ready(path=train, val_path=val, test_path=val)
    assert [data.count(split) for split in SPLITS] == [10, 4, 4]
    strange = gray_folder(tmp_path / "c", 2, ("emu",))
    with pytest.raises(ValueError, match=r"c has the class 'emu', which the training folder has not"):
        ImageDataModule(path=train, val_path=strange, labels=True)


def test_pictures_are_cut_in_the_middle_and_resampled(tmp_path):
    wide = np.zeros((8, 48, 3))
    wide[:, 14:34] = [200, 100, 50]  # the middle and as much around it as the filter sees
    for number in range(3):
        save(tmp_path / f"{number}.png", wide)
    save(tmp_path / "3.bmp", np.full((40, 10, 3), [200, 100, 50]))
    data = ready(path=str(tmp_path), size=4)
    assert data.spec["shape"] == [3, 4, 4]
    expected = torch.tensor([200.0, 100, 50])[:, None, None] / 127.5 - 1
    for split in SPLITS:
        assert torch.allclose(everything(data, split), expected.expand(data.count(split), 3, 4, 4))


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp", "PNG", "bmp"])
def test_formats(tmp_path, ending):
    for number in range(3):
        save(tmp_path / f"{number}.{ending}", np.full((6, 6, 3), 90))
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    assert ready(path=str(tmp_path)).examples("train", 1)["x"].sub(90 / 127.5 - 1).abs().max() < 0.05


def test_transparency_palette_and_orientation(tmp_path):
    clear = np.zeros((2, 4, 4), dtype=np.uint8)
    clear[:, :2] = [10, 20, 30, 255]
    image = Image.fromarray(clear)
    upright = pictures._open(save(tmp_path / "plain.png", clear))
    assert np.asarray(upright)[0].tolist() == [[10, 20, 30]] * 2 + [[255, 255, 255]] * 2
    image.convert("RGB").quantize(4).save(tmp_path / "palette.png")
    assert pictures._open(tmp_path / "palette.png").mode == "RGB"
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    image.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert pictures._open(tmp_path / "turned.jpg").size == (2, 4)


def test_gray_and_coloured_pictures(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png", np.full((2, 2), 100))
    save(tmp_path / "z.png", np.full((2, 2, 3), [0, 100, 0]))
    with pytest.raises(ValueError, match=r"z.png is in colour and the first picture is gray: set channels to 1 or 3"):
        ready(path=str(tmp_path))
    assert ready(path=str(tmp_path), channels=1).spec["shape"] == [1, 2, 2]
    assert ready(path=str(tmp_path), channels=3).spec["shape"] == [3, 2, 2]


def test_crop_keeps_the_centre(tmp_path):
    """The margins, which differ from picture to picture in size and value, are gone before pictures are resampled."""
    for number in range(4):
        framed = np.full((10 + 2 * number, 12), 255)
        framed[3 + number : 7 + number, 4:8] = 10 * number
        save(tmp_path / f"{number}.png", framed)
    for size in (None, 2):
        data = ready(path=str(tmp_path), crop=4, size=size)
        assert data.spec["shape"] == [1, size or 4, size or 4]
        values = torch.cat([everything(data, split) for split in SPLITS])
        assert set(((values + 1) * 127.5).round().unique().tolist()) == {0, 10, 20, 30}
    with pytest.raises(ValueError, match=r"0.png is 12 x 10 pixels, too small for crop: 11"):
        ImageDataModule(path=str(tmp_path), crop=11)
    with pytest.raises(ValueError, match="crop belong to a path"):
        ImageDataModule(crop=4)


def test_resized_digits_keep_their_levels():
    data = ready(size=16)
    assert data.spec["shape"] == [1, 16, 16]
    x = everything(data, "train")
    levels = (x + 1) * 8
    assert torch.equal(levels, levels.round())
    assert data.spec["sigma_data"] == pytest.approx(float(x.std()), rel=1e-4)
    assert x.mean() == pytest.approx(float(everything(ready(), "train").mean()), abs=0.02)


# ---- messages


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        ImageDataModule(path=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no pictures .* in the folder"):
        ImageDataModule(path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ImageDataModule(path=__file__)


def test_labels_need_sub_folders(tmp_path):
    with pytest.raises(ValueError, match="have no classes: put each class into a sub-folder"):
        ImageDataModule(path=gray_folder(tmp_path, 3), labels=True)


def test_broken_picture_is_named(tmp_path):
    path = gray_folder(tmp_path, 5)
    (tmp_path / "003.png").write_bytes((tmp_path / "003.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cannot read the picture .*003.png"):
        ready(path=path)
    (tmp_path / "000.png").write_bytes(b"no picture at all")
    with pytest.raises(ValueError, match=r"cannot read the picture .*000.png"):
        ImageDataModule(path=path)


def test_deep_picture_is_named(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: it has more than 8 bits per channel"):
        ImageDataModule(path=str(tmp_path))


def test_other_size_is_named(tmp_path):
    path = gray_folder(tmp_path, 5)
    save(tmp_path / "z.png", np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"z.png is 2 x 3 pixels and the first picture 2 x 2: set size"):
        ready(path=path)


def test_too_few_pictures(tmp_path):
    with pytest.raises(ValueError, match="2 images are too few to cut"):
        ready(path=gray_folder(tmp_path, 2))


def test_too_many_pictures_for_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_physical_memory", lambda: 20)
    with pytest.raises(ValueError, match=r"5 pictures of shape \[1, 2, 2\] need .* give a smaller size"):
        ready(path=gray_folder(tmp_path, 5))


def test_other_shape_of_validation_idx(tmp_path):
    idx_folder(tmp_path / "a")
    idx_folder(tmp_path / "b", size=5)
    with pytest.raises(ValueError, match=r"have shape \[1, 5, 5\], training images \[1, 4, 4\]"):
        ready(path=str(tmp_path / "a"), val_path=str(tmp_path / "b"))


def test_debian_fashion_mnist():
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    data = ready(path=str(folder), labels=True)
    assert [data.count(split) for split in SPLITS] == [60000, 10000, 10000]
    known = ImageDataModule(dataset="fashion_mnist").spec["sigma_data"]
    assert data.spec["sigma_data"] == pytest.approx(known, abs=1e-3)
