"""``import`` as a user types it, and what can be done with the checkpoint it writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sgm.io.checkpoint import load, read_checkpoint
from lightning_sgm.io.released.configurations import named
from tests.io.released_files import network, recipe, write

OWN = (
    *("--data.path", "pictures", "--data.batch_size", "4"),
    *("--data.val_fraction", "0.3", "--data.test_fraction", "0.3"),
)
IMPORT = ("import", "--source", "score_sde", "--checkpoint", "released.pth", "--output", "ours.ckpt")


@pytest.fixture
def released(tmp_path: Path):
    settings = recipe(tmp_path, sampler={"init_args": {"steps": 2}})
    return write(tmp_path / "released.pth", network(named(str(settings))))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.usefixtures("released", "pictures")
def test_import_predict_and_test(cli, tmp_path: Path):
    code, out, err = cli(*IMPORT, "--model", "my.yaml")
    assert code == 0, err
    assert "step 7, average of decay 0.999" in out
    assert f"{sum(p.numel() for p in load('ours.ckpt').parameters()):,} parameters" in out
    (following,) = [line for line in out.splitlines() if line.startswith("next: ")]
    code, out, err = cli(*shlex.split(following)[4:-1], "3")
    assert code == 0, err
    assert "3 samples" in out
    (picture, *_), others = (sorted(tmp_path.rglob(f"predictions/{kind}*.png")) for kind in ("0", ""))
    assert Image.open(picture).size == (32, 32)
    assert len(others) >= 3

    # The data are CIFAR-10 unless the user has others.
    code, _, err = cli("test", "--ckpt_path", "ours.ckpt", *OWN)
    assert code == 0, err
    (numbers,) = tmp_path.rglob("test.json")
    assert json.loads(numbers.read_text())["test/loss"] > 0


@pytest.mark.usefixtures("released", "pictures")
def test_fit_goes_on_from_the_raw_weights_and_moves_the_average(cli):
    assert cli(*IMPORT, "--model", "my.yaml")[0] == 0
    code, _, err = cli(
        *("fit", "--ckpt_path", "ours.ckpt", *OWN, "--trainer.max_steps", "1", "--trainer.run_dir", "run"),
        *("--ema.decay", "0.75", "--samples.count", "1", "--model.optimizer", "torch.optim.SGD"),
        *("--model.optimizer.init_args.lr", "0.0"),
    )
    assert code == 0, err
    after, before = read_checkpoint("run/checkpoints/last.ckpt"), read_checkpoint("ours.ckpt")
    decay = (1 + 8) / (10 + 8)  # the eighth update of the average, whose ramp is below 0.75
    for name, raw in before["raw_state"].items():
        assert torch.equal(after["raw_state"][name], raw)  # a learning rate of 0
        torch.testing.assert_close(after["state_dict"][name], decay * before["state_dict"][name] + (1 - decay) * raw)


@pytest.mark.usefixtures("released")
def test_mistakes(cli, tmp_path: Path):
    def error(*arguments: str) -> tuple[int, str]:
        code, out, err = cli(*arguments)
        assert out == ""
        assert "Traceback" not in err
        assert len(err.strip().splitlines()) == 1
        return code, err

    code, err = error(*[part.replace("score_sde", "scoresde") for part in IMPORT])
    assert (code, "did you mean score_sde?" in err) == (2, True)
    code, err = error(*IMPORT[:-2])
    assert (code, "--output" in err) == (2, True)
    code, err = error(*IMPORT, "--model", "ve/cifar10_ncsnpp_continous")
    assert (code, "did you mean ve/cifar10_ncsnpp_continuous" in err) == (2, True)
    code, err = error(*[part.replace("released.pth", "absent.pth") for part in IMPORT])
    assert (code, "absent.pth" in err) == (2, True)
    code, err = error(*IMPORT, "--model", "radd")
    assert (code, "fit NCSNpp or DDPM, but the network of radd is MaskedTransformer" in err) == (1, True)
    code, err = error(*IMPORT)
    assert (code, "none of the released models" in err) == (1, True)
    assert not Path("ours.ckpt").exists()
    Path("ours.ckpt").write_text("precious")
    code, err = error(*IMPORT, "--model", "my.yaml")
    assert (code, "exists already" in err) == (2, True)
    assert Path("ours.ckpt").read_text() == "precious"
    Path("ours.ckpt").unlink()
    content = Path("released.pth").read_bytes()
    Path("released.pth").write_bytes(content[:-1000])
    code, err = error(*IMPORT, "--model", "my.yaml")
    assert (code, "cut off" in err) == (1, True)


def test_help_lists_sources_and_models(cli):
    code, out, _ = cli("import", "--help")
    assert code == 0
    for word in ("score_sde", "radd", "mdlm", "vp/cifar10_ddpmpp_deep_continuous", "--checkpoint", "--output"):
        assert word in out
    assert "import " in cli("--help")[1]


@pytest.mark.slow
def test_in_full_size_without_a_name(cli, tmp_path: Path):
    held = write(tmp_path / "released.pth", network(named("ve/cifar10_ncsnpp_continuous")))
    assert len(held["model"]) == 572
    code, out, err = cli(*IMPORT)
    assert code == 0, err
    assert "model: ve/cifar10_ncsnpp_continuous, NCSNpp for images 3 x 32 x 32, 62,758,915 parameters" in out
    code, _, err = cli("predict", "--ckpt_path", "ours.ckpt", "--num_samples", "1", "--model.sampler.steps", "2")
    assert code == 0, err
