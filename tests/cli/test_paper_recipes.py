"""The paper's recipes: built in full size, updated once on random pictures, validated and sampled in two steps."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

RECIPES = sorted(f"paper/{path.stem}" for path in (ROOT / "recipes" / "paper").glob("score_sde*.yaml"))
# Trained ones; released NCSN++ with Fourier features count 128 more, their fixed frequencies.
PARAMETERS = {
    "paper/score_sde_celeba_ncsnpp_ve": 62_693_251,
    "paper/score_sde_cifar10_ncsnpp_ve": 62_758_787,
    "paper/score_sde_cifar10_ddpm": 35_218_947,
    "paper/score_sde_cifar10_ddpmpp_vp": 61_804_419,
    "paper/score_sde_cifar10_ddpmpp_subvp": 61_804_419,
    "paper/score_sde_cifar10_edm": 61_804_419 + 128 * 512,  # sine and cosine of 128 frequencies
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_update_in_full_size(cli, recipe: str, tmp_path: Path):
    side = (218, 178) if "celeba" in recipe else (32, 32)
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        pixels = generator.integers(0, 256, (*side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{number}.png")
    options = {
        "data.path": "pictures",
        "data.batch_size": 1,
        "data.val_fraction": 0.25,
        "data.test_fraction": 0.25,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_checkpointing": "false",
        "samples.count": 1,
        "model.sampler.init_args.steps": 2,
    }
    code, _, err = cli("fit", "--config", recipe, *(f"--{name}={value}" for name, value in options.items()))
    assert code == 0, err
    assert f"with {PARAMETERS[recipe]:,} parameters" in err
    (run,) = tmp_path.glob("runs/*/version_0")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    for name in ("train/loss", "val/loss"):
        (loss,) = [float(row[name]) for row in rows if row.get(name)]
        assert math.isfinite(loss)
        assert loss > 0
    assert (run / "samples/00000001.png").exists()
