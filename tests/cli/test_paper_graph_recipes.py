"""The graph paper's recipes: they say what the released models say, and are updated once on random graphs."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_sgm.io.released.gdss import import_gdss
from lightning_sgm.recipes import content
from tests.conftest import ROOT, SHARED

GRAPHS = ("community_small", "ego_small", "enzymes", "grid")
RECIPES = [f"paper/gdss_{name}" for name in GRAPHS if (ROOT / f"recipes/paper/gdss_{name}.yaml").is_file()]
# Those of the released files, without the layers whose answer nothing uses (gdss.md section 8, trap 4).
PARAMETERS = {
    "paper/gdss_community_small": 193_699,
    "paper/gdss_ego_small": 166_702,
    "paper/gdss_enzymes": 373_075,
    "paper/gdss_grid": 360_130,
}


def plain(value: Any) -> Any:
    """Classes without arguments as their names, last parts of names, and no defaults that are written out."""
    if isinstance(value, dict) and "class_path" in value:
        defaults = {"norm": "sample", "times": None}
        given = {k: plain(v) for k, v in value.get("init_args", {}).items()}
        return value["class_path"].rpartition(".")[2], {k: v for k, v in given.items() if k not in defaults}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return (value.rpartition(".")[2], {}) if isinstance(value, str) and value[:1].isupper() else value


@pytest.mark.parametrize("name", GRAPHS)
def test_a_recipe_says_what_the_released_model_says(name: str):
    path = SHARED / "checkpoints" / "gdss" / f"gdss_{name}.safetensors"
    if not path.exists():
        pytest.skip("the released weights are absent")
    released = import_gdss(path)
    own, theirs = (section["init_args"] for section in (content(f"paper/gdss_{name}")["model"], released.model))
    compared = set(theirs) - {"spec"}
    assert {"process", "sampler", "network", "decay", "optimizer", "objective", "adj_preconditioning"} <= compared
    for key in compared:
        expected = theirs[key]
        if key == "network":
            ours = {**{"nodes": "gcn", "attention_conv": "gcn"}, **own[key]["init_args"]}
            assert ours == expected["init_args"]
        else:
            assert plain(own[key]) == plain(expected), key


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_update_in_full_size(cli, recipe: str, tmp_path: Path):
    sizes = np.array([5, 12, 20, 9])
    edges = [[(i, i + 1) for i in range(size - 1)] + [(0, 2), (1, 3)] for size in sizes]
    np.savez(
        tmp_path / "own.npz",
        num_nodes=sizes,
        num_edges=np.array([len(pairs) for pairs in edges]),
        edge_index=np.array([pair for pairs in edges for pair in pairs]).T,
        is_test=np.array([True, False, False, False]),
    )
    options = {
        "data.path": "own.npz",
        "trainer.max_steps": 1,
        "trainer.check_val_every_n_epoch": 1,
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
    assert (run / "samples/00000001_reverse_process.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_that_is_not_there_is_named(cli, recipe: str):
    code, _, err = cli("fit", "--config", recipe)
    assert code == 1
    assert f"there is no {recipe.removeprefix('paper/gdss_')}.npz" in err
