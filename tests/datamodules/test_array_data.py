import numpy as np
import pytest
import torch

from datamodules import ArrayDataModule
from datamodules.base import SPLITS


def everything(data, split):
    return data.fetch(split, torch.arange(data.count(split)), None)


@pytest.mark.parametrize("dataset", ["gaussians", "moons", "checkerboard"])
def test_points_are_standardised_and_split_once(dataset):
    data = ArrayDataModule(dataset, points=5000)
    data.setup()
    assert [data.count(split) for split in SPLITS] == [4000, 500, 500]
    x = torch.cat([everything(data, split)["x"] for split in SPLITS])
    assert x.dtype == torch.float32
    assert len(x.unique(dim=0)) == 5000
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)


def test_the_laws_are_what_they_say():
    x = {}
    for dataset in ("gaussians", "moons", "checkerboard"):
        data = ArrayDataModule(dataset, points=20000, labels=dataset != "checkerboard")
        data.setup()
        batch = everything(data, "train")
        x[dataset] = batch["x"] * torch.tensor(data.spec["std"]) + torch.tensor(data.spec["mean"])
        if dataset != "checkerboard":
            assert data.spec["classes"] == [8, 2][dataset == "moons"]
            labels = batch["label"]
            for mode in range(data.spec["classes"]):
                own = x[dataset][labels == mode]
                if dataset == "gaussians":
                    angle = torch.tensor(mode * torch.pi / 4)
                    centre = 2 * torch.stack([angle.cos(), angle.sin()])
                    assert (own.mean(0) - centre).abs().max() < 5 * 0.2 / len(own) ** 0.5
                    assert own.std(0).numpy() == pytest.approx([0.2, 0.2], rel=0.1)
                else:
                    centre = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[mode]
                    distance = (own - centre).norm(dim=1)
                    assert distance.mean() == pytest.approx(1.0, abs=0.02)
                    assert distance.std() == pytest.approx(0.1, rel=0.1)
    squares = x["checkerboard"].floor().long()
    assert set(map(tuple, squares.tolist())) == {(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0}


@pytest.mark.parametrize("shape", [(5,), (7, 3), (2, 4, 4), (1, 3, 4, 5)])
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_files_of_any_shape(tmp_path, shape, ending):
    values = np.random.default_rng(0).normal(3.0, 2.0, (50, *shape)).astype(np.float32)
    if ending == "npy":
        np.save(tmp_path / "mine.npy", values)
    else:
        np.savez(tmp_path / "mine.npz", x=values, label=np.arange(50) % 4)
    data = ArrayDataModule(path=str(tmp_path / f"mine.{ending}"), labels=ending == "npz")
    data.setup()
    assert data.spec["shape"] == list(shape)
    assert len(data.spec["mean"]) == (5 if shape == (5,) else 1)
    assert data.spec["classes"] == [0, 4][ending == "npz"]
    x = torch.cat([everything(data, split)["x"] for split in SPLITS])
    assert x.shape == (50, *shape)
    back = x * torch.tensor(data.spec["std"]) + torch.tensor(data.spec["mean"])
    torch.testing.assert_close(back.flatten().sort().values, torch.from_numpy(values).flatten().sort().values)
    assert torch.equal(everything(data, "test")["x"], everything(data, "test")["x"])


def test_a_constant_coordinate_is_kept(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([np.arange(20.0), np.full(20, 7.0)], 1))
    data = ArrayDataModule(path=str(tmp_path / "x.npy"))
    data.setup()
    assert everything(data, "train")["x"][:, 1].abs().max() == 0
    assert data.spec["std"][1] == 1.0


class Bad:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "labels", "message"),
    [
        (np.zeros(5), False, r"must hold numbers of shape \(N, ...\), got float64 of shape \(5,\)"),
        (np.array([["a"], ["b"]]), False, "must hold numbers"),
        (np.array([[1.0], [np.nan], [2.0], [3.0]]), False, "not finite"),
        (np.zeros((2, 3)), False, "has 2 examples, too few"),
        (np.zeros((9, 3)), True, "has no classes"),
        (np.array([[Bad()]]), False, "cannot read .*x.npy"),
        (b"hello", False, "cannot read .*x.npy"),
        ({"y": np.zeros((9, 3))}, False, 'no array "x", only y'),
        ({"x": np.zeros((9, 3)), "label": np.zeros(8, int)}, True, "must be 9 integers from 0, got int64 of shape"),
    ],
)
def test_bad_files_are_named(tmp_path, content, labels, message):
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        path = tmp_path / "x.npz"
        np.savez(path, **content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        ArrayDataModule(path=str(path), labels=labels)


def test_bad_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.npy"):
        ArrayDataModule(path=str(tmp_path / "none.npy"))
    with pytest.raises(ValueError, match="there is no dataset 'spirals': choose one of gaussians"):
        ArrayDataModule("spirals")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="points must be at least 1"):
        ArrayDataModule(points=0)
    with pytest.raises(ValueError, match="checkerboard has no classes"):
        ArrayDataModule("checkerboard", labels=True)
