"""fit, resume, validate, test and predict of the recipes that restore pictures, as a user types them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.cli.test_commands import RESTORERS
from tests.conftest import ROOT, TINY

SLOW = {"sinsr", "tad_sr_perceptual"}  # other terms, the same ways
_EXTRA = pytest.mark.skipif(find_spec("stlpips_pytorch") is None, reason="needs the extra restoration")
MARKS = {name: [pytest.mark.slow] * (name in SLOW) + [_EXTRA] * ("perceptual" in name) for name in RESTORERS}
RECIPES = [pytest.param(name, marks=MARKS[name]) for name in sorted(RESTORERS & set(TINY))]
FIDELITY = {f"fidelity/{name}{end}" for name in ("psnr", "ssim") for end in ("", "_y")}
FIDELITY |= {"fidelity/psnr_pooled", "fidelity/psnr_y_pooled"}


def tiny(recipe: str, teacher: Path) -> list[str]:
    return [*TINY[recipe], *(() if recipe == "resshift" else (f"--model.teacher={teacher}",))]


@pytest.fixture
def photographs(tmp_path: Path) -> dict[str, np.ndarray]:
    """Pictures of different sizes in a folder ``mine``."""
    rng, found = np.random.default_rng(0), {}
    for name, size in {"a": (20, 17), "b.c": (9, 31), "trip/d": (1, 5)}.items():
        path = tmp_path / "mine" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        found[name] = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(found[name]).save(path)
    return found


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fit_resume_validate_test_predict(
    cli: Any, recipe: str, teacher: Path, photographs: dict[str, np.ndarray], tmp_path: Path
):
    options = tiny(recipe, teacher)
    code, out, err = cli("fit", "--config", recipe, *options)
    assert code == 0, err
    run = tmp_path / "runs" / recipe / "version_0"
    (following,) = [line for line in out.splitlines() if line.startswith("next: ")]
    assert following.endswith("last.ckpt --data.path FOLDER")
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    # Two rows of panels of four or, with the teacher's, five pictures of 64 x 64.
    names = {p.name for p in (run / "samples").iterdir()}
    assert names == {"00000004.png"} | ({"00000004_loss_by_level.png"} if recipe == "resshift" else set())
    assert opened(run / "samples/00000004.png").shape[1] > (4 if recipe == "resshift" else 5) * 64
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 4
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(r["step"]) for r in rows if r.get("train/loss")] == [1, 2, 3, 4]
    assert [float(r["val/loss"]) for r in rows if r.get("val/loss")]
    events = EventAccumulator(str(run)).Reload()
    assert {"train/loss", "val/loss", "samples/evaluations"} <= set(events.Tags()["scalars"])
    assert "samples" in events.Tags()["images"]

    code, _, err = cli("fit", "--config", recipe, "--ckpt_path", "last", "--trainer.max_steps=6")
    assert code == 0, err
    assert not (run.parent / "version_1").exists()
    assert (run / "metrics.1.csv").exists()
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6

    code, out, err = cli("validate", "--config", recipe)
    assert code == 0, err
    assert json.loads((run / "validate.json").read_text())["val/loss"] > 0

    code, out, err = cli("test", "--config", recipe)
    assert code == 0, err
    numbers = json.loads((run / "test.json").read_text())
    rivals = ["bicubic", "nearest", "samples", *(() if recipe == "resshift" else ("teacher",))]
    judged = {f"test/{rival}/{name}" for rival in rivals for name in FIDELITY}
    assert judged <= set(numbers)
    assert all(key in out for key in judged)  # the table
    assert numbers["test/samples/evaluations"] == (15 if recipe == "resshift" else 1)
    assert numbers["test/loss"] > 0
    assert numbers["checkpoint"].endswith("last.ckpt")

    upscale(cli, recipe, photographs, tmp_path)


def upscale(cli: Any, recipe: str, photographs: dict[str, np.ndarray], tmp_path: Path) -> None:
    """predict of a folder, of a file and of nothing."""
    checkpoint = tmp_path / "runs" / recipe / "version_0/checkpoints/last.ckpt"
    folder = checkpoint.parent.parent / "restored"
    code, out, err = cli("predict", "--config", recipe, "--data.path", "mine")
    assert code == 0, err
    assert "3 samples are in" in out
    assert "file 3/3" in out
    wanted = {f"{name}.png" for name in photographs}
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {*wanted, *(f"panels/{name}" for name in wanted), "panels/README.txt", "samples.png"}
    for name, pixels in photographs.items():
        height, width = 4 * pixels.shape[0], 4 * pixels.shape[1]
        whole, panel = opened(folder / f"{name}.png"), opened(folder / "panels" / f"{name}.png")
        assert whole.shape == (height, width, 3)
        scale = -(-64 // max(height, width))  # small ones are enlarged to be seen
        count = 3 if recipe == "resshift" else 4
        assert panel.shape == (scale * height + 4, count * (scale * width + 2) + 2, 3)
        shown = panel[2:-2:scale, 2 : 2 + scale * width : scale]
        assert np.array_equal(shown, pixels.repeat(4, 0).repeat(4, 1))
        assert np.array_equal(panel[2:-2:scale, -2 - scale * width : -2 : scale], whole)
    teachers = "" if recipe == "resshift" else ", by the teacher"
    told = f"From left to right: what was given, enlarged bicubically{teachers}, by the model.\n"
    assert (folder / "panels/README.txt").read_text() == told

    before = opened(folder / "a.png")
    code, out, err = cli("predict", "--ckpt_path", checkpoint, "--data.path=mine/a.png", "--trainer.run_dir=one")
    assert code == 0, err
    # The first in the folder, so its noise is the same.
    assert np.abs(opened(tmp_path / "one/restored/a.png") - before).max() <= 1
    assert {path.name for path in (tmp_path / "one/restored").iterdir()} == {"a.png", "panels", "samples.png"}

    code, out, err = cli("predict", "--config", recipe)
    assert code != 0
    assert "error: ResShift restores images, give it some: --data.path FOLDER (or FILE)" in err
    assert "Traceback" not in err
    assert not (folder.parent / "predictions").exists()


def test_predict_in_tiles(cli: Any, teacher: Path, photographs: dict[str, np.ndarray]):
    given = ("predict", "--ckpt_path", teacher, "--data.path=mine/a.png")
    assert cli(*given, "--trainer.run_dir=whole")[0] == 0
    code, _, err = cli(*given, "--trainer.run_dir=tiles", "--model.tile=8", "--model.overlap=4")
    assert code == 0, err
    whole, tiles = (opened(Path(name) / "restored/a.png") for name in ("whole", "tiles"))
    assert whole.shape == tiles.shape
    assert 0 < np.abs(whole - tiles).mean() < 20  # other noise
    assert cli(*given, "--trainer.run_dir=one_piece", "--model.tile=null")[0] == 0
    assert np.array_equal(opened(Path("one_piece/restored/a.png")), whole)


@pytest.mark.parametrize("recipe", ["resshift", pytest.param("tad_sr", marks=pytest.mark.slow)])
def test_last_resumes_exactly(cli: Any, recipe: str, teacher: Path, tmp_path: Path):
    """Six updates in one go and three plus three end in the same weights, optimisers and EMA."""
    options = [t for t in tiny(recipe, teacher) if not t.startswith(("--trainer.max_steps", "--trainer.val_check"))]
    options += ["--trainer.val_check_interval=2", "--model.decay=constant"]
    straight = tmp_path / "straight"
    assert cli("fit", "--config", recipe, *options, "--trainer.max_steps=6", "--trainer.run_dir", straight)[0] == 0
    assert cli("fit", "--config", recipe, *options, "--trainer.max_steps=3")[0] == 0
    code, _, err = cli("fit", "--config", recipe, *options, "--trainer.max_steps=6", "--ckpt_path", "last")
    assert code == 0, err
    run = tmp_path / "runs" / recipe / "version_0"
    one, two = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (straight, run))
    assert one["global_step"] == two["global_step"] == 6
    for part in ("state_dict", "raw_state"):
        assert one[part].keys() == two[part].keys()
        for key in one[part]:
            assert torch.equal(one[part][key], two[part][key]), key
    assert len(one["optimizer_states"]) == len(two["optimizer_states"]) == (2 if recipe == "tad_sr" else 1)
    for first, second in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        for a, b in zip(first["state"].values(), second["state"].values(), strict=True):
            assert all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)


@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_precision(cli: Any, recipe: str, teacher: Path, tmp_path: Path):
    code, _, err = cli("fit", "--config", recipe, *tiny(recipe, teacher), "--trainer.precision=bf16-mixed")
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "runs" / recipe / "version_0/metrics.csv").open()))
    assert [int(r["step"]) for r in rows if r.get("train/loss")] == [1, 2, 3, 4]


def test_a_perceptual_loss_and_a_small_swin_unet(cli: Any, tmp_path: Path):
    pytest.importorskip("stlpips_pytorch")
    own = [option for option in TINY["resshift"] if "network" not in option]
    swin: tuple[str, ...] = (
        "--model.network=SwinUNet",
        "--model.network.channels=32",
        "--model.network.multipliers=[1, 2]",
    )
    swin += ("--model.network.swin_channels=32", "--model.network.window=4", "--model.network.blocks=1")
    judge = ("--model.perceptual=lightning_sgm.metrics.STLPIPS", "--model.perceptual_weight=0.1")
    metrics = ("--model.metrics+=lightning_sgm.metrics.STLPIPS", "--model.val_samples=1")
    code, _, err = cli("fit", "--config", "resshift", *own, *swin, *judge, *metrics)
    assert code == 0, err
    (row, *_) = [r for r in csv.DictReader((tmp_path / "runs/resshift/version_0/metrics.csv").open()) if r["val/loss"]]
    assert float(row["val/loss"]) == pytest.approx(
        float(row["val/error"]) + 0.1 * float(row["val/perceptual"]), rel=1e-4
    )
    assert {f"val/{rival}/st_lpips" for rival in ("samples", "bicubic", "nearest")} <= set(row)
    Image.new("RGB", (9, 13)).save(tmp_path / "odd.png")
    code, _, err = cli("predict", "--config", "resshift", "--data.path=odd.png")
    assert code == 0, err
    assert opened(tmp_path / "runs/resshift/version_0/restored/odd.png").shape == (52, 36, 3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes(recipe: str, teacher: Path, photographs: dict[str, np.ndarray], tmp_path: Path):
    """The whole journey on two CPU processes; numbers and pictures are those of one process."""

    def run(*arguments: str) -> None:
        command = [sys.executable, "-m", "lightning_sgm", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]

    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
    run("fit", "--config", recipe, *tiny(recipe, teacher), *two)
    folder = tmp_path / "runs" / recipe / "version_0"
    assert not (folder.parent / "version_1").exists()
    found: list[tuple[dict[str, Any], dict[str, np.ndarray]]] = []
    for processes in ((), two):
        run("test", "--config", recipe, "--trainer.limit_test_batches=1.0", *processes)
        run("predict", "--config", recipe, "--data.path=mine", *processes)
        restored = {name: opened(folder / "restored" / f"{name}.png") for name in photographs}
        found.append((json.loads((folder / "test.json").read_text()), restored))
    (one, pictures), (both, others) = found
    assert one.keys() == both.keys()
    for key, value in one.items():
        if isinstance(value, float):
            assert both[key] == pytest.approx(value, rel=1e-4), key
    for name, pixels in pictures.items():
        assert np.abs(pixels - others[name]).max() <= 1
