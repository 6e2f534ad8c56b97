"""The graph paper's recipes of molecules: they say what the released models say, and are updated once."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from lightning_sgm.io.released.gdss import import_gdss
from lightning_sgm.recipes import content
from tests.cli.test_paper_graph_recipes import plain
from tests.conftest import SHARED

pytest.importorskip("rdkit")

NAMES = ("qm9", "zinc250k", "zinc250k_v2")
# Those of the released files, without the layers whose answer nothing uses (gdss.md section 8, trap 4).
PARAMETERS = {"qm9": 27_877, "zinc250k": 69_790, "zinc250k_v2": 76_118}
SMILES = ["CCO", "CC(=O)N", "C1CC1O", "c1ccoc1", "CC#N", "NCC(F)F", "OCC1CO1", "CN(C)C"]
OTHERS = ["CCS", "CP(C)C", "ClCCBr", "CI"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_the_released_model_says(name: str):
    path = SHARED / "checkpoints" / "gdss" / f"gdss_{name}.safetensors"
    if not path.exists():
        pytest.skip("the released weights are absent")
    recipe = content(f"paper/gdss_{name}")
    own, theirs = recipe["model"]["init_args"], import_gdss(path).model["init_args"]
    spec = theirs.pop("spec")
    assert theirs.keys() >= {"process", "sampler", "decay", "optimizer", "objective", "x_preconditioning"}
    ours = {"nodes": "gcn", "attention_conv": "gcn"} | own["network"]["init_args"]
    assert ours == theirs.pop("network")["init_args"]
    for key, expected in theirs.items():
        assert plain(own[key]) == plain(expected), key
    data = recipe["data"]["init_args"]
    assert data.get("atoms", ["C", "N", "O", "F"]) == spec["atoms"]
    assert data.get("max_nodes", 9) == spec["nodes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_update_in_full_size(cli, name: str, tmp_path: Path):
    lines = [*SMILES, *(OTHERS if name != "qm9" else [])] * 2
    (tmp_path / "own.csv").write_text("\n".join(["smiles", *lines, ""]))
    options = {
        "data.path": "own.csv",
        "trainer.max_steps": 1,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_checkpointing": "false",
        "samples.count": 1,
        "model.metrics": "[]",  # FCD is slow to load, and has tests of its own
        "model.sampler.init_args.steps": 2,
    }
    code, _, err = cli("fit", "--config", f"paper/gdss_{name}", *(f"--{key}={value}" for key, value in options.items()))
    assert code == 0, err
    assert f"with {PARAMETERS[name]:,} parameters" in err
    assert "left out" not in err
    (run,) = tmp_path.glob("runs/*/version_0")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    for key in ("train/loss", "val/loss"):
        (loss,) = [float(row[key]) for row in rows if row.get(key)]
        assert math.isfinite(loss)
        assert loss > 0
    for end in (".smi", ".png", "_reverse_process.png"):
        assert (run / f"samples/00000001{end}").exists()


def test_missing_data_are_named(cli):
    code, _, err = cli("fit", "--config", "paper/gdss_zinc250k")
    assert code == 1
    assert "there is no file zinc250k.csv" in err
