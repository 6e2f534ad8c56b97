"""The text paper's recipes: built in full size, updated once on random tokens, validated and sampled."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

RECIPES = sorted(f"paper/{path.stem}" for path in (ROOT / "recipes" / "paper").glob("radd*.yaml"))
# radd.md, section 3: of the released small model, and of the same with the sizes of medium.
PARAMETERS = {"paper/radd_small_owt": 162_265_682, "paper/radd_medium_owt": 405_191_762}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_update_in_full_size(cli, recipe: str, tmp_path: Path):
    np.random.default_rng(0).integers(0, 50257, 4 * 64, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    options = {
        "data.dataset": "null",
        "data.cache": "null",
        "data.path": "tokens.bin",
        "data.val_path": "tokens.bin",
        "data.test_path": "tokens.bin",
        "data.length": 64,
        "data.batch_size": 1,
        "trainer.max_steps": 1,
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1,
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
    for name in ("train/nll", "val/nll"):
        (nll,) = [float(row[name]) for row in rows if row.get(name)]
        # The head starts at zero, so a masked token costs ln V; how many are masked is drawn.
        assert 0.5 < nll / math.log(50257) < 2
    assert len((run / "samples/00000001.txt").read_text().split()) > 60
