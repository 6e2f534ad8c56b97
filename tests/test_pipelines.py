"""The pipeline restores as ``predict`` does, whatever way pictures are given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_sgm
from lightning_sgm import SuperResolutionPipeline
from lightning_sgm.io.export import export
from lightning_sgm.io.released.model import Imported, build, save
from lightning_sgm.random import run_seed, seeded
from tests.io.students import distillation

SPEC = {
    "kind": "image",
    "shape": [3, 32, 32],
    "low_shape": [3, 8, 8],
    "factor": 4,
    "range": [-1.0, 1.0],
    "levels": 256,
    "classes": 0,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    arguments = {
        "network": {"class_path": "SRResNet", "init_args": {"channels": 8, "blocks": 3}},
        "spec": SPEC,
        "codec": {"class_path": "PixelUnshuffle", "init_args": {"factor": 4}},
        "process": {"class_path": "ResidualShift", "init_args": {"kappa": 0.3}},
        "metrics": [],
    }
    section = {"class_path": "ResShift", "init_args": arguments}
    torch.manual_seed(0)
    weights = {k: v + 0.05 * torch.randn_like(v) for k, v in build(section).state_dict().items()}
    save(Imported(section, None, weights, {}, 0, []), tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def pictures(folder: Path) -> list[Path]:
    generator, files = np.random.default_rng(0), []
    folder.mkdir()
    for name, size in (("a", (20, 13)), ("b", (7, 9))):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        files.append(folder / f"{name}.png")
    return files


def same(images: list[Any], others: list[Any]) -> bool:
    return len(images) == len(others) and all(
        np.array_equal(np.array(a), np.array(b)) for a, b in zip(images, others, strict=True)
    )


def test_pictures_are_those_of_predict(cli, tmp_path: Path, checkpoint: Path):
    files = pictures(tmp_path / "pictures")
    code, _, err = cli(
        *("predict", "--ckpt_path", checkpoint, "--data.path", "pictures", "--seed_everything", "5"),
        *("--trainer.run_dir", "run"),
    )
    assert code == 0, err
    wanted = [Image.open(tmp_path / "run/restored" / file.name) for file in files]
    pipe = SuperResolutionPipeline.from_pretrained(checkpoint)
    found = pipe([Image.open(file) for file in files], seed=5).images
    assert [image.size for image in found] == [(80, 52), (28, 36)]
    assert same(found, wanted)
    assert same(pipe(tmp_path / "pictures", seed=5).images, wanted)
    assert same(pipe([str(files[0]), Image.open(files[1])], seed=5).images, wanted)
    assert same(pipe(files[0], seed=5).images, wanted[:1])
    assert same(pipe(Image.open(files[0]), seed=5).images, wanted[:1])
    assert not same(pipe(files, seed=6).images, wanted)
    assert not same(pipe(files).images, wanted)


def test_steps(tmp_path: Path, checkpoint: Path):
    (file, _) = pictures(tmp_path / "pictures")
    pipe = SuperResolutionPipeline.from_pretrained(checkpoint)
    model, seen = pipe.model, {}
    for steps in (None, 1, 4, 15):
        calls: list[Any] = []
        handle = model.network.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        seen[steps] = pipe(file, num_inference_steps=steps).images[0]
        handle.remove()
        assert len(calls) == (steps or 15)
    assert same([seen[None]], [seen[15]])
    assert not same([seen[1]], [seen[15]])
    for steps, message in ((0, "num_inference_steps must be at least 1, got 0"), (16, "at most 15 steps")):
        with pytest.raises(ValueError, match=message):
            pipe(file, num_inference_steps=steps)
    assert model.sampler.steps == 15


def test_other_kinds_of_pictures(checkpoint: Path):
    pipe = SuperResolutionPipeline.from_pretrained(checkpoint).to("cpu")
    assert pipe.device == torch.device("cpu")
    gray = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8), dtype=np.uint8))
    assert same(pipe(gray).images, pipe(gray.convert("RGB")).images)
    assert same(pipe(gray.convert("RGBA")).images, pipe(gray.convert("RGB")).images)
    turned = gray.convert("RGB")
    turned.getexif()[0x0112] = 6  # stored on its side
    assert pipe(turned).images[0].size == (36, 32)
    with pytest.raises(ValueError, match=r"more than 8 bits per channel \(mode I;16\): convert it to RGB"):
        pipe(Image.fromarray(np.zeros((8, 8), dtype=np.uint16)))
    with pytest.raises(ValueError, match="takes PIL images and paths, got a Tensor"):
        pipe([torch.zeros(3, 8, 8)])  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        pipe("absent.png")


def test_exports_and_distillations(tmp_path: Path, checkpoint: Path):
    (file, _) = pictures(tmp_path / "pictures")
    export(checkpoint, tmp_path / "folder")
    pipe, other = (SuperResolutionPipeline.from_pretrained(path) for path in (checkpoint, tmp_path / "folder"))
    assert same(pipe(file).images, other(file).images)
    path = distillation(tmp_path, "unshuffle")
    student = SuperResolutionPipeline.from_pretrained(path)
    assert student.model.sampler.steps == 1
    export(path, tmp_path / "student")
    assert same(student(file).images, SuperResolutionPipeline.from_pretrained(tmp_path / "student")(file).images)


def test_other_models_are_refused(tmp_path: Path):
    spec = {"kind": "array", "shape": [2], "classes": 0, "mean": [0.0, 0.0], "std": [1.0, 1.0], "sigma_data": 1.0}
    section = {"class_path": "ScoreSDE", "init_args": {"network": {"class_path": "MLP"}, "spec": spec}}
    save(Imported(section, None, dict(build(section).state_dict()), {}, 0, []), tmp_path / "points.ckpt")
    with pytest.raises(ValueError, match=r"points.ckpt holds a ScoreSDE, which restores no images"):
        SuperResolutionPipeline.from_pretrained(tmp_path / "points.ckpt")
    with pytest.raises(FileNotFoundError):
        SuperResolutionPipeline.from_pretrained(tmp_path / "absent.ckpt")
    assert lightning_sgm.SuperResolutionPipeline is SuperResolutionPipeline


@pytest.mark.parametrize("before", [None, "3"])
def test_a_seed_lasts_for_a_block(monkeypatch: pytest.MonkeyPatch, before: str | None):
    if before is None:
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    else:
        monkeypatch.setenv("PL_GLOBAL_SEED", before)
    with seeded(7):
        assert run_seed() == 7
    assert run_seed() == int(before or 0)
    assert os.environ.get("PL_GLOBAL_SEED") == before
