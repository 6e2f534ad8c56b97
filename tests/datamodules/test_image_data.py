"""Images: values, dequantisation, mirroring, the named sets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from datamodules import ImageDataModule
from tests.datamodules.image_files import everything, idx_folder, ready

# ---- digits


def test_digits_are_the_split_of_the_specification():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    data = ready(labels=True)
    for split, rows in (("train", order[:1500]), ("val", order[1500:]), ("test", order[1500:])):
        expected = torch.from_numpy(bunch.images)[rows][:, None] / 8 - 1
        assert torch.equal(everything(data, split), expected.float())
        assert torch.equal(everything(data, split, "label"), torch.from_numpy(bunch.target)[rows])


@pytest.mark.parametrize("dequantize", [False, True])
def test_digits_spec_is_known_at_construction_and_true(dequantize):
    data = ImageDataModule(dequantize=dequantize, labels=True)
    spec = dict(data.spec)
    assert spec | {"sigma_data": None} == {
        "kind": "image",
        "shape": [1, 8, 8],
        "classes": 10,
        "levels": 17,
        "range": [-1.0, 1.0],
        "dequantized": dequantize,
        "sigma_data": None,
    }
    assert json.loads(json.dumps(spec)) == spec
    batch = data.examples("train", 4)
    assert batch["x"].shape == (4, 1, 8, 8)
    assert batch["x"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert data.spec == spec
    assert float(everything(data, "train").std()) == pytest.approx(spec["sigma_data"], abs=4e-4)
    assert spec["sigma_data"] == pytest.approx(0.708 if dequantize else 0.752, abs=1e-3)


def test_without_labels_there_are_none():
    data = ImageDataModule()
    assert data.spec["classes"] == 0
    assert set(data.examples("val", 2)) == {"x", "index"}


# ---- dequantisation and mirroring


def test_dequantisation_fills_the_levels_uniformly():
    exact, noisy = ready(), ready(dequantize=True)
    levels = (everything(exact, "train") + 1) * 8
    noise = (everything(noisy, "train") + 1) / 2 * 17 - levels
    assert noise.min() > -1e-5
    assert noise.max() < 1 + 1e-5
    counts = torch.histc(noise, 10, 0, 1)
    expected = noise.numel() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    assert noise.flatten(1).T.corrcoef().fill_diagonal_(0).abs().max() < 0.15


def test_noise_depends_on_seed_epoch_index_and_pixel_alone():
    data = ready(dequantize=True)
    index = torch.arange(6)
    together = data.fetch("train", index, 3)["x"]
    assert torch.equal(data.fetch("train", torch.tensor([4]), 3)["x"][0], together[4])
    assert data.fetch("train", index, 4)["x"].ne(together).all()
    assert ready(dequantize=True, seed=1).fetch("train", index, 3)["x"].ne(together).all()
    assert torch.equal(everything(data, "val"), everything(data, "val"))


def test_half_of_the_training_images_are_mirrored_and_no_others(tmp_path):
    data = ready(flip=True)
    index = torch.arange(1500)
    plain = everything(data, "train")
    same = []
    for epoch in (0, 1):
        x = data.fetch("train", index, epoch)["x"]
        kept = (x == plain).flatten(1).all(1)
        assert ((x == plain.flip(-1)).flatten(1).all(1) | kept).all()
        assert 650 < kept.sum() < 850
        same.append(kept)
    assert 650 < (same[0] == same[1]).sum() < 850
    assert torch.equal(data.fetch("train", index[9:10], 1)["x"], x[9:10])
    assert torch.equal(data.fetch("val", index[:297], 5)["x"], everything(data, "val"))
    assert torch.equal(plain, everything(ready(), "train"))  # the stored images are not touched


@pytest.mark.parametrize(("dataset", "flips"), [("digits", False), ("mnist", False), ("cifar10", True)])
def test_mirroring_by_default(dataset, flips):
    assert ImageDataModule(dataset=dataset).flip is flips
    assert ImageDataModule(dataset=dataset, flip=not flips).flip is not flips


def test_training_batches_resume_exactly():
    def loader():
        data = ready(dequantize=True, flip=True, labels=True)
        loader = data.train_dataloader()
        loader.set_epoch(2)
        return loader

    straight = loader()
    iterator = iter(straight)
    next(iterator)
    resumed = loader()
    resumed.load_state_dict(straight.state_dict())
    pairs = list(zip(iterator, resumed, strict=True))
    assert len(pairs) == 1500 // 64 - 1
    assert all(torch.equal(first[key], second[key]) for first, second in pairs for key in first)


# ---- sets by torchvision


@pytest.mark.parametrize(("dataset", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_from_files_that_torchvision_keeps(tmp_path, dataset, folder):
    sets = idx_folder(tmp_path / folder / "raw", size=28)
    data = ImageDataModule(dataset=dataset, data_dir=str(tmp_path), labels=True, download=False)
    assert data.spec["shape"] == [1, 28, 28]
    assert data.spec["sigma_data"] == pytest.approx({"mnist": 0.616, "fashion_mnist": 0.706}[dataset], abs=1e-3)
    data.prepare_data()
    data.setup()
    expected = torch.from_numpy(sets["train"][0])[:, None] / 127.5 - 1
    assert torch.allclose(everything(data, "train"), expected.float(), atol=1e-6)
    assert torch.equal(everything(data, "val"), everything(data, "test"))
    assert everything(data, "test", "label").tolist() == sets["t10k"][1].tolist()


def test_cifar10_channels(monkeypatch):
    from torchvision import datasets  # type: ignore[import-untyped]

    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)

    class Fake:
        def __init__(self, root, train, download):
            self.data, self.targets = pixels, [0, 1, 2, 3, 9]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    data = ready(dataset="cifar10", labels=True)
    assert data.spec["shape"] == [3, 32, 32]
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(everything(data, "test"), expected, atol=1e-6)
    assert everything(data, "test", "label").tolist() == [0, 1, 2, 3, 9]


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_sets_that_are_not_there(tmp_path, dataset, monkeypatch):
    data = ImageDataModule(dataset=dataset, data_dir=str(tmp_path), download=False)
    with pytest.raises(FileNotFoundError, match=f"{dataset} is not in .* use dataset: digits"):
        data.examples("train", 1)

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    with pytest.raises(FileNotFoundError, match=f"{dataset} is not in .* could not be downloaded"):
        ImageDataModule(dataset=dataset, data_dir=str(tmp_path)).prepare_data()


# ---- messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "imagenet"}, "no dataset 'imagenet': choose one of digits, mnist, fashion_mnist, cifar10"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"val_path": "x"}, "val_path, test_path, channels and crop belong"),
        ({"val_fraction": -0.1}, "must be above 0"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**arguments)
