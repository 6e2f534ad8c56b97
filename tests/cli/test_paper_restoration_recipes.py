"""The restoration papers' recipes: they say what the papers do, and are updated once with small networks."""

from __future__ import annotations

import csv
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sgm.io.released.first_stage import write_folder
from lightning_sgm.io.released.model import Imported, build, image_spec, save, with_spec
from lightning_sgm.networks import SwinUNet
from lightning_sgm.processes import ResidualShift
from lightning_sgm.recipes import content, overlay
from tests.io.released_restoration_files import NETWORK, stage_state

# T, first and last sqrt(eta), LPIPS, batch, updates (Yue et al. 2023, 2024; the authors' configurations).
TEACHERS: dict[str, tuple[int, float, float, int, int]] = {
    "resshift_realsr_x4": (15, 0.02, 0.0, 64, 300_000),
    "resshift_realsr_x4_s4": (4, 0.1, 1.0, 96, 400_000),
    "resshift_faces": (4, 0.1, 10.0, 56, 400_000),
}
# Terms by weight, batch, updates, teacher (He et al. 2024; Wang et al. 2024).
STUDENTS: dict[str, tuple[dict[str, float], int, int, str]] = {
    "tad_sr_realsr_x4": (
        {"Regression": 1.0, "HighFrequencyScore": 1.0, "Adversarial": 0.02},
        8,
        30_000,
        "resshift_realsr_x4",
    ),
    "tad_sr_faces": ({"Regression": 1.0, "HighFrequencyScore": 0.1, "Adversarial": 0.2}, 7, 30_000, "resshift_faces"),
    "sinsr_realsr_x4": ({"Regression": 1.0, "Inverse": 1.0, "GroundTruth": 1.0}, 64, 500_000, "resshift_realsr_x4"),
}
SMALL = {f"--model.network.init_args.{name}": value for name, value in NETWORK.items()}


def sections(name: str) -> dict[str, Any]:
    return content(f"paper/{name}")


def settings(values: dict[str, Any]) -> tuple[Any, ...]:
    """Those that all of the papers' models share."""
    model = values["model"]["init_args"]
    optimizer = model["optimizer"]["init_args"]
    return optimizer, model["warmup"], values["ema"]["decay"]


def test_recipes_say_what_the_papers_do():
    common = {"lr": 5e-5, "weight_decay": 0.0}, 5000, 0.999
    for name, (steps, first, lpips, batch, updates) in TEACHERS.items():
        values = sections(name)
        model = values["model"]["init_args"]
        table = ResidualShift(**model["process"]["init_args"]).table
        assert (len(table), float(table[0]), float(table[-1])) == (steps, pytest.approx(first), pytest.approx(0.99))
        assert (model["process"]["init_args"]["kappa"], model["sampler"]["init_args"]["steps"]) == (2.0, steps)
        assert (model.get("perceptual_weight", 0.0) if "perceptual" in model else 0.0) == lpips
        assert (values["data"]["init_args"]["batch_size"], values["trainer"]["max_steps"]) == (batch, updates)
        assert settings(values) == common
    for name, (terms, batch, updates, _) in STUDENTS.items():
        values = sections(name)
        given = {term["class_path"]: term.get("init_args", {}) for term in values["model"]["init_args"]["terms"]}
        assert {term: arguments.get("weight", 1.0) for term, arguments in given.items()} == terms
        assert given.get("Inverse", {}).get("answer", "x0") == "x0"
        assert (values["data"]["init_args"]["batch_size"], values["trainer"]["max_steps"]) == (batch, updates)
        assert settings(values) == common
        assert values["model"]["init_args"].get("critic_optimizer", {}).get("init_args") == common[0]


@pytest.mark.parametrize("name", TEACHERS)
def test_networks_are_those_of_the_papers(name: str):
    faces = name == "resshift_faces"
    low = [3, 512, 512] if faces else [3, 64, 64]
    with torch.device("meta"):
        network = SwinUNet(
            {"shape": [8 if faces else 3, 64, 64], "low_shape": low},
            **sections(name)["model"]["init_args"]["network"]["init_args"],
        )
    count = sum(parameter.numel() for parameter in network.parameters())
    # Faces: convolutions that bring the image down, 128 channels of it for 3, and 5 more latent ones in and out.
    stem = sum(3 * 3 * a * b + b for a, b in ((3, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128)))
    assert count == 118_593_583 + (stem + 130 * 160 * 9 + 5 * (160 * 9 + 1) if faces else 0)


def first_stages(folder: Path) -> None:
    """Small ones where the recipes look for them."""
    for name, sizes in {
        "vq-f4": {},
        "vq-f8-faces": {"multipliers": (1, 1, 1, 1), "layers": (1, 1, 1, 1), "channels": 8},
    }.items():
        torch.save(stage_state(**sizes), folder / f"{name}.pth")  # type: ignore[arg-type]
        (folder / "checkpoints").mkdir(exist_ok=True)
        write_folder(folder / f"{name}.pth", folder / "checkpoints" / name)


def pictures(folder: Path, paired: bool) -> None:
    generator = np.random.default_rng(0)
    for part in ("gt", "lq") if paired else ("",):
        (folder / part).mkdir(parents=True)
        for number in range(3):
            pixels = generator.integers(0, 256, (80, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number}.png")


def shortened(faces: bool) -> dict[str, Any]:
    return {
        "--data.path": "data",
        "--data.hold_out": 3,
        "--data.crop": 64,
        "--data.eval_size": 64,
        "--data.eval_crops": 2,
        "--data.batch_size": 2,
        **({} if faces else {"--data.short_side": 64}),
        "--model.warmup": 2,
        "--trainer.max_steps": 1,
        "--trainer.val_check_interval": 1,
        "--trainer.log_every_n_steps": 1,
        "--trainer.run_dir": "run",
        "--samples.count": 1,
        "--samples.every": 1,
    }


def fitted(cli: Any, name: str, options: dict[str, Any]) -> dict[str, float]:
    """Numbers of a run with one update."""
    arguments = [f"{option}={value}" for option, value in options.items()]
    code, _, err = cli("fit", "--config", f"paper/{name}", *arguments)
    assert code == 0, err
    assert Path("run/samples/00000001.png").exists()
    rows = list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))
    found = {key: float(value) for row in rows for key, value in row.items() if value and "/" in key}
    assert all(math.isfinite(value) for value in found.values())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_one_update(cli, name: str, tmp_path: Path):
    faces = name == "resshift_faces"
    first_stages(tmp_path)
    pictures(tmp_path / "data", faces)
    # Another distance, whose weights need no download.
    other = "lightning_sgm.metrics.STLPIPS" if find_spec("stlpips_pytorch") else "null"
    perceptual = {"--model.perceptual": other} if TEACHERS[name][2] else {}
    found = fitted(cli, name, {**shortened(faces), **SMALL, **perceptual})
    assert found["train/loss"] > 0
    assert found["val/loss"] > 0
    if perceptual and other != "null":
        total = found["train/error"] + TEACHERS[name][2] * found["train/perceptual"]
        assert found["train/loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_one_update_of_a_student(cli, name: str, tmp_path: Path):
    faces = name == "tad_sr_faces"
    first_stages(tmp_path)
    pictures(tmp_path / "data", faces)
    changes: dict[str, Any] = {"network": {"init_args": NETWORK}, "perceptual": None, "metrics": []}
    model = overlay(sections(STUDENTS[name][3])["model"], {"init_args": changes})
    factor = 1 if faces else 4
    spec = {**image_spec(3, 64), "low_shape": [3, 64 // factor, 64 // factor], "factor": factor}
    teacher = build(with_spec(model, spec))
    torch.manual_seed(0)
    weights = {key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in teacher.state_dict().items()}
    save(Imported(with_spec(model, spec), None, weights, {}, 0, []), tmp_path / "teacher.ckpt")
    found = fitted(cli, name, {**shortened(faces), "--model.teacher": "teacher.ckpt"})
    assert {key for key in found if key.startswith("train/")} >= {"train/loss", "train/regression"}
    assert ("train/adversarial_critic" in found) == ("Adversarial" in STUDENTS[name][0])
    assert found["val/loss"] > 0


def test_a_missing_first_stage_or_teacher_is_named(cli, tmp_path: Path):
    pictures(tmp_path / "data", False)
    arguments = [f"{option}={value}" for option, value in shortened(False).items()]
    code, out, err = cli("fit", "--config", "paper/resshift_realsr_x4", *arguments)
    assert (code, out, len(err.strip().splitlines())) == (1, "", 1)
    assert "no VQModel with safetensors at './checkpoints/vq-f4'" in err
    code, out, err = cli("fit", "--config", "paper/tad_sr_realsr_x4", *arguments)
    assert (code, out, len(err.strip().splitlines())) == (1, "", 1)
    assert "give --model.teacher CHECKPOINT" in err
