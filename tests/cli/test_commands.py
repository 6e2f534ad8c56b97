"""fit, validate, test and predict of every recipe, as a user types them."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.conftest import ROOT, TINY

METHODS = ["radd", "score_sde", "classifier", "gdss"]
RESTORERS = {"resshift", "sinsr", "tad_sr", "tad_sr_perceptual"}  # see test_restoration.py
GENERATORS = sorted(set(TINY) - {"classifier"} - RESTORERS)


@pytest.mark.parametrize("recipe", GENERATORS)
def test_fit_validate_test_predict(cli, recipe: str, tmp_path: Path):
    if recipe in ("gdss_molecules", "gdss_qm9"):
        pytest.importorskip("rdkit")
    tiny = TINY[recipe]
    code, out, err = cli("fit", "--config", recipe, *tiny)
    assert code == 0, err
    run = tmp_path / "runs" / recipe / "version_0"
    assert "tensorboard --logdir runs/" + recipe in out
    (following,) = [line for line in out.splitlines() if line.startswith("next: ")]
    assert cli(*shlex.split(following)[4:], "--num_samples=1", "--model.sampler.steps=2")[0] == 0
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert list((run / "samples").iterdir())
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 4
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [float(r["train/loss"]) for r in rows if r.get("train/loss")]
    assert [float(r["val/loss"]) for r in rows if r.get("val/loss")]
    events = EventAccumulator(str(run)).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    shown = events.Tags()["images"] + events.Tags()["tensors"]
    assert any(tag.startswith("samples") for tag in shown)

    code, out, err = cli("validate", "--config", recipe, *tiny)
    assert code == 0, err
    numbers = json.loads((run / "validate.json").read_text())
    assert numbers["val/loss"] > 0

    code, out, err = cli("test", "--config", recipe, *tiny)
    assert code == 0, err
    numbers = json.loads((run / "test.json").read_text())
    assert numbers["test/loss"] > 0
    assert numbers["checkpoint"].endswith("last.ckpt")

    code, out, err = cli("predict", "--config", recipe, "--num_samples", "3", "--batch_size", "2", *tiny)
    assert code == 0, err
    assert "3 samples" in out
    assert not (tmp_path / "runs" / recipe / "version_1").exists()


def test_a_classifier_is_tested_but_does_not_sample(cli, tmp_path: Path):
    code, out, err = cli("fit", "--config", "classifier", *TINY["classifier"])
    assert code == 0, err
    run = tmp_path / "runs/classifier/version_0"
    assert not (run / "samples").exists()
    (following,) = [line for line in out.splitlines() if line.startswith("next: ")]
    code, _, err = cli(*shlex.split(following)[4:])
    assert code == 0, err
    numbers = json.loads((run / "test.json").read_text())
    assert numbers["test/loss"] > 0
    assert {"test/accuracy_clean", "test/accuracy_sigma_0.1", "test/accuracy_sigma_10"} <= set(numbers)
    assert cli("validate", "--config", "classifier", *TINY["classifier"])[0] == 0
    code, _, err = cli("predict", "--config", "classifier", *TINY["classifier"])
    assert code == 1
    assert "error: Classifier does not sample" in err


def test_test_reports_samples_and_floor(cli, tmp_path: Path):
    cli("fit", "--config", "score_sde", *TINY["score_sde"])
    code, _, err = cli("test", "--config", "score_sde", *TINY["score_sde"])
    assert code == 0, err
    numbers = json.loads((tmp_path / "runs/score_sde/version_0/test.json").read_text())
    assert 0 < numbers["test/floor/frechet_pixels"] < numbers["test/samples/frechet_pixels"]
    assert numbers["test/samples/evaluations"] == 3


def test_perplexity_has_a_standard_error(cli, tmp_path: Path):
    cli("fit", "--config", "radd", *TINY["radd"])
    code, _, err = cli("test", "--config", "radd", *TINY["radd"])
    assert code == 0, err
    numbers = json.loads((tmp_path / "runs/radd/version_0/test.json").read_text())
    assert numbers["test/perplexity"] == pytest.approx(2.718281828 ** numbers["test/nll"], rel=1e-4)
    assert 0 < numbers["test/standard_error"] < 0.2 * numbers["test/nll"]


def test_predict_needs_neither_recipe_nor_data_and_does_not_depend_on_the_batch(cli, tmp_path: Path):
    cli("fit", "--config", "score_sde", *TINY["score_sde"])
    checkpoint = tmp_path / "runs/score_sde/version_0/checkpoints/last.ckpt"
    pictures = []
    for batch_size in ("1", "4"):
        code, _out, err = cli("predict", "--ckpt_path", checkpoint, "--num_samples", "4", "--batch_size", batch_size)
        assert code == 0, err
        files = sorted((tmp_path / "runs/score_sde/version_0/predictions").glob("*.png"))
        pictures.append([torch.tensor(list(Image.open(f).tobytes())) for f in files])
    assert len(pictures[0]) >= 4
    for a, b in zip(*pictures, strict=True):
        assert (a - b).abs().max() <= 1


@pytest.mark.parametrize("recipe", METHODS)
def test_last_resumes_exactly(cli, recipe: str, tmp_path: Path):
    """Six updates in one go and three plus three end in the same weights, optimiser and EMA."""
    tiny = [t for t in TINY[recipe] if not t.startswith(("--trainer.max_steps", "--trainer.val_check"))]
    # Cosine looks at the run's length; a number changes the rate within the six updates.
    tiny += ["--trainer.val_check_interval=2", f"--model.decay={0.9 if recipe == 'gdss' else 'constant'}"]
    straight = tmp_path / "straight"
    assert cli("fit", "--config", recipe, *tiny, "--trainer.max_steps=6", "--trainer.run_dir", straight)[0] == 0
    assert cli("fit", "--config", recipe, *tiny, "--trainer.max_steps=3")[0] == 0
    code, _, err = cli("fit", "--config", recipe, *tiny, "--trainer.max_steps=6", "--ckpt_path", "last")
    assert code == 0, err
    run = tmp_path / "runs" / recipe / "version_0"
    assert not (run.parent / "version_1").exists()
    one, two = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (straight, run))
    assert one["global_step"] == two["global_step"] == 6
    for part in ("state_dict", "raw_state"):
        assert one[part].keys() == two[part].keys()
        for key in one[part]:
            assert torch.equal(one[part][key], two[part][key]), key
    for a, b in zip(
        one["optimizer_states"][0]["state"].values(), two["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)
    assert (run / "metrics.1.csv").exists()


def test_the_command_line_beats_the_recipe_and_the_recipe_the_checkpoint(cli, tmp_path: Path):
    tiny = TINY["radd"]
    cli("fit", "--config", "radd", *tiny, "--model.warmup=3")
    checkpoint = tmp_path / "runs/radd/version_0/checkpoints/last.ckpt"
    code, _out, _ = cli("fit", "--ckpt_path", checkpoint, "--print_config")
    assert code == 0
    code, _, err = cli(
        "fit", "--model.passes=2", "--ckpt_path", checkpoint, "--trainer.max_steps=5", "--samples.count=1"
    )
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "runs/run/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["warmup"] == 3  # from the checkpoint
    assert saved["model"]["init_args"]["passes"] == 2  # from the command line
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model:\n  init_args:\n    warmup: 7\n")
    code, _, err = cli("fit", overlay, "--ckpt_path", checkpoint, "--trainer.max_steps=5", "--samples.count=1")
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "runs/overlay/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["warmup"] == 7


def test_print_config_shows_everything(cli):
    code, out, _ = cli("fit", "--config", "radd", "--model.objective.loss", "t_DCE", "--print_config")
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["model"]["init_args"]["objective"]["init_args"]["loss"] == "t_DCE"
    assert shown["ema"]["decay"] == 0.98


def test_the_recipe_tells_the_network_the_noise_level_as_it_expects(cli):
    """EDM preconditioning speaks of ln sigma, which the Fourier embedding is made for."""
    code, out, _ = cli("fit", "--config", "score_sde", "--print_config")
    assert code == 0
    part = yaml.safe_load(out)["model"]["init_args"]["preconditioning"]
    assert part["class_path"].endswith("EDMPreconditioning")
    assert part["init_args"]["label"] is None


def test_a_continued_run_keeps_its_settings(cli, tmp_path: Path):
    cli("fit", "--config", "score_sde", *TINY["score_sde"], "--seed_everything=3", "--trainer.gradient_clip_val=0.3")
    code, _, err = cli("fit", "--config", "score_sde", "--ckpt_path=last", "--trainer.max_steps=5")
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "runs/score_sde/version_0/config.yaml").read_text())
    assert (saved["seed_everything"], saved["trainer"]["gradient_clip_val"]) == (3, 0.3)
    assert saved["trainer"]["max_steps"] == 5
    assert "ckpt_path" not in saved
    code, _, err = cli("fit", "--config", "runs/score_sde/version_0/config.yaml")
    assert code == 0, err
    assert (tmp_path / "runs/score_sde/version_1/checkpoints/last.ckpt").exists()


def test_the_debug_recipe_shortens_any_other(cli, tmp_path: Path):
    tiny = [t for t in TINY["radd"] if not t.startswith("--trainer")]
    code, _, err = cli("fit", "--config", "radd", "--config", "debug/quick", *tiny)
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "runs/radd/version_0/config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 4
    assert "run_dir" not in saved["trainer"]


def test_network_can_be_swapped(cli, tmp_path: Path):
    code, _, err = cli(
        "fit",
        "--config",
        "score_sde",
        *TINY["score_sde"],
        "--model.network=MLP",
        "--model.network.width=8",
    )
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "runs/score_sde/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["network"]["init_args"]["width"] == 8


@pytest.mark.parametrize("recipe", METHODS)
def test_mixed_precision_and_accumulation(cli, recipe: str, tmp_path: Path):
    code, _, err = cli(
        "fit",
        "--config",
        recipe,
        *TINY[recipe],
        "--trainer.precision=bf16-mixed",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=4",
    )
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "runs" / recipe / "version_0" / "metrics.csv").open()))
    steps = [int(r["step"]) for r in rows if r.get("train/loss")]
    assert steps == [1, 2, 3, 4]  # updates, each once


def test_evaluation_follows_the_checkpoint_not_the_recipe(cli, tmp_path: Path):
    tiny = [t for t in TINY["score_sde"] if not t.startswith("--data")]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(80):
        Image.new("RGB", (20, 20), (i, 255 - i, 3 * i % 255)).save(folder / f"{i}.png")
    changed = ("--data.path=pictures", "--data.size=16", "--data.batch_size=16", "--model.network.channels=[8,16]")
    code, _, err = cli("fit", "--config", "score_sde", *tiny, *changed, "--model.network.attention=[]")
    assert code == 0, err
    code, _, err = cli("validate", "--config", "score_sde")
    assert code == 0, err
    folder.rename(tmp_path / "gone")  # samples need no data
    code, _, err = cli("predict", "--config", "score_sde", "--num_samples=2", "--model.sampler.steps=2")
    assert code == 0, err
    picture = Image.open(sorted((tmp_path / "runs/score_sde/version_0/predictions").glob("0*.png"))[0])
    assert picture.size == (16, 16)
    assert (tmp_path / "runs/score_sde/version_0/metrics.csv").exists()


def test_print_config_shows_the_checkpoints_values(cli, tmp_path: Path):
    cli("fit", "--config", "radd", *TINY["radd"])
    code, out, err = cli("fit", "--config", "radd", "--ckpt_path=last", "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["init_args"]["network"]["init_args"]["width"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("recipe", METHODS)
def test_two_processes(recipe: str, tmp_path: Path):
    """The whole journey on two CPU processes; the samples are those of one process."""

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "lightning_sgm", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
    assert "next: python" in run("fit", "--config", recipe, *TINY[recipe], *two)
    folder = tmp_path / "runs" / recipe / "version_0"
    assert not (folder.parent / "version_1").exists()
    numbers = []
    (tmp_path / "small.txt").write_text("one block, for one of two only\n\n")
    corpora = ("--data.corpora=[small.txt]",) if recipe == "radd" else ()
    for processes in ((), two):
        run("test", "--config", recipe, "--trainer.limit_test_batches=1.0", *corpora, *processes)
        numbers.append(json.loads((folder / "test.json").read_text()))
        if recipe != "classifier":
            run("predict", "--config", recipe, "--num_samples=3", *processes)
            files = sorted((folder / "predictions").glob("0*"))
            assert len(files) == 3
            numbers[-1]["files"] = [f.read_bytes() for f in files]
    one, both = numbers
    assert one.keys() == both.keys()
    for key, value in one.items():
        if isinstance(value, float) and "standard_error" not in key:
            assert both[key] == pytest.approx(value, rel=2e-3), key
    if recipe == "radd":
        assert one["files"] == both["files"]
