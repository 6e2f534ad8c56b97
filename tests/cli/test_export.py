"""``export`` as a user types it, and what can be done with the folder it writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sgm.io.checkpoint import load, read_checkpoint
from tests.conftest import TINY

EXPORT = ("export", "--checkpoint", "run/checkpoints/last.ckpt", "--output", "folder")


@pytest.fixture
def trained(cli):
    code, _, err = cli("fit", "--config", "radd", *TINY["radd"], "--trainer.run_dir", "run", "--ema.decay", "0.5")
    assert code == 0, err
    held = read_checkpoint("run/checkpoints/last.ckpt")
    name = "network.output_layer.linear.weight"
    assert not torch.equal(held["raw_state"][name], held["state_dict"][name])
    return held["state_dict"]


def test_train_export_and_use(cli, trained):
    status, out, err = cli(*EXPORT)
    assert status == 0, err
    assert "model: RADD, " in out
    model: Any = load("folder")
    assert set(model.state_dict()) == set(trained)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name])  # the average
    (following,) = [line for line in out.splitlines() if line.startswith("next: ")]
    program, option, code = shlex.split(following.removeprefix("next: "))
    assert (program, option) == ("python", "-c")
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(names["model"].network.output_layer.linear.weight, model.network.output_layer.linear.weight)

    status, _, err = cli("import", "--source", "radd", "--checkpoint", "folder", "--output", "ours.ckpt")
    assert status == 0, err
    for name, tensor in load("ours.ckpt").state_dict().items():
        assert torch.equal(tensor, trained[name])


def test_a_folder_is_tested_as_its_checkpoint(cli, trained):
    assert cli(*EXPORT)[0] == 0
    found = []
    for path in ("run/checkpoints/last.ckpt", "folder"):
        code, _, err = cli(
            *("test", "--ckpt_path", path, "--trainer.limit_test_batches", "1", "--trainer.run_dir", f"of_{path[:3]}"),
            *("--model.passes", "2"),
        )
        assert code == 0, err
        (numbers,) = Path(f"of_{path[:3]}").rglob("test.json")
        found.append({k: v for k, v in json.loads(numbers.read_text()).items() if k.startswith("test/")})
    assert found[0] == found[1]
    assert found[0]["test/perplexity"] > 1
    code, out, err = cli("predict", "--ckpt_path", "folder", "--num_samples", "2")
    assert code == 0, err
    assert "2 samples" in out


def test_mistakes(cli, tmp_path: Path):
    def error(*arguments: str) -> tuple[int, str]:
        code, out, err = cli(*arguments)
        assert out == ""
        assert "Traceback" not in err
        assert len(err.strip().splitlines()) == 1
        return code, err

    code, err = error(*EXPORT)
    assert (code, "there is no run/checkpoints/last.ckpt" in err) == (2, True)
    code, err = error(*EXPORT[:-2])
    assert (code, "--output" in err) == (2, True)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/last.ckpt").write_text("no checkpoint")
    code, err = error(*EXPORT)
    assert (code, "is damaged" in err) == (1, True)
    hyper = {"_class_path": "tests.io.models.Plain", "rate": 1.0}
    torch.save({"state_dict": {}, "hyper_parameters": hyper}, "run/checkpoints/last.ckpt")
    code, err = error(*EXPORT)
    assert (code, "asks for tests.io.models.Plain; if you trust it, add --allow tests" in err) == (1, True)
    code, err = error(*EXPORT, "--allow", "tests")
    assert (code, "parts built in Python are not in the file" in err) == (1, True)
    assert not Path("folder").exists()
    Path("folder").mkdir()
    code, err = error(*EXPORT)
    assert (code, "exists already" in err) == (2, True)


def test_help(cli):
    code, out, _ = cli("export", "--help")
    assert code == 0
    for word in ("--checkpoint", "--output", "--allow", "model.safetensors"):
        assert word in out
    assert "export " in cli("--help")[1]


def test_of_a_distillation_the_student_is_exported(cli, tmp_path: Path):
    """Predicts as the checkpoint does, without the teacher."""
    for recipe, more in (("resshift", ()), ("tad_sr", ("--model.teacher", "resshift/checkpoints/last.ckpt"))):
        code, _, err = cli("fit", "--config", recipe, *TINY[recipe], *more, "--trainer.run_dir", recipe)
        assert code == 0, err
    code, out, err = cli("export", "--checkpoint", "tad_sr/checkpoints/last.ckpt", "--output", "folder")
    assert code == 0, err
    assert "model: ResShift, " in out
    Image.new("RGB", (19, 14), "orange").save(tmp_path / "a.png")
    for path in ("tad_sr/checkpoints/last.ckpt", "folder"):
        code, _, err = cli(
            "predict", "--ckpt_path", path, "--data.path", "a.png", "--trainer.run_dir", f"of_{path[:3]}"
        )
        assert code == 0, err
    theirs, ours = (np.array(Image.open(f"{folder}/restored/a.png")) for folder in ("of_tad", "of_fol"))
    assert ours.shape == (56, 76, 3)
    assert np.array_equal(ours, theirs)
