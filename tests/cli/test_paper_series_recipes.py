"""The time series paper's recipes: they say what its table says, and run on small files in place of the data."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from datamodules.series import SeriesDataModule
from lightning_sgm.networks import DualChannel
from lightning_sgm.recipes import content
from tests.conftest import ROOT, SHARED


class Row(NamedTuple):
    """pad_ts.md section 4, and the parameters of section 3, where L H are counted that nothing uses."""

    dims: int
    windows: int
    width: int
    chain: int
    batch: int
    steps: int
    alpha: float
    counted: int


TABLE = {
    "sines": Row(5, 10000, 128, 250, 64, 70000, 5e-4, 2_289_181),
    "stocks": Row(6, 3662, 128, 250, 64, 70000, 8e-4, 2_289_438),
    "energy": Row(28, 19735 - 24 + 1, 256, 500, 64, 100000, 5e-4, 8_981_044),
    "fmri": Row(50, 9977, 256, 500, 32, 70000, 2e-5, 8_992_330),
    "mujoco": Row(14, 10000, 256, 500, 64, 100000, 5e-4, 8_973_862),
}
METRICS = ["ValueDistance", "CorrelationDistance", "DiscriminativeAccuracy", "PredictiveScore"]
FILES = {"stocks": "stock_data.csv", "energy": "energy_data.csv", "fmri": "fmri_sim4.npz"}


def parameters(row: Row) -> int:
    return row.counted - 24 * row.width


def test_none_is_forgotten():
    assert {path.stem for path in (ROOT / "recipes" / "paper").glob("pad_ts*")} == {f"pad_ts_{name}" for name in TABLE}


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_says_what_the_table_says(name: str):
    row, values = TABLE[name], content(f"paper/pad_ts_{name}")
    model, data, trainer = values["model"]["init_args"], values["data"]["init_args"], values["trainer"]
    assert model["network"] == {
        "class_path": "DualChannel",
        "init_args": {"width": row.width, "heads": 4, "encoders": 1, "blocks": 3, "dropout": 0.1},
    }
    with torch.device("meta"):
        network = DualChannel({"shape": [24, row.dims]}, **model["network"]["init_args"])
    assert sum(p.numel() for p in network.parameters()) == parameters(row)
    assert model["process"] == {"class_path": "CosineChain", "init_args": {"steps": row.chain}}
    assert model["sampler"]["init_args"] == {
        "steps": row.chain,
        "rule": {"class_path": "Ancestral", "init_args": {"noise": "transition"}},
        "grid": "ChainGrid",
    }
    assert model["objective"]["init_args"]["population"]["init_args"] == {"alpha": row.alpha}
    assert model["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.0}}
    assert (model["warmup"], model["decay"], values["ema"]) == (0, "linear", {"decay": 0.0})
    assert [metric.rpartition(".")[2] for metric in model["metrics"]] == METRICS
    assert model["test_samples"] == row.windows
    assert (data["length"], data["batch_size"], data["val_fraction"], data["test_fraction"]) == (24, row.batch, 0, 0)
    assert trainer["max_steps"] == row.steps
    assert {"gradient_clip_val", "precision", "accumulate_grad_batches"}.isdisjoint(trainer)
    own = FILES.get(name)
    assert data.get("path") == own
    if own is None:
        assert (data["dataset"], data["windows"]) == (name, row.windows)


@pytest.mark.parametrize("name", ["sines", "stocks", "fmri"])
def test_as_many_windows_as_in_the_table(name: str):
    arguments = content(f"paper/pad_ts_{name}")["data"]["init_args"]
    if name in FILES:
        path = SHARED / "data" / "time_series" / FILES[name]
        if not path.exists():
            pytest.skip("the data are absent")
        arguments["path"] = str(path)
    with pytest.warns(UserWarning, match="nothing is held out"):
        module = SeriesDataModule(**arguments)
    row = TABLE[name]
    assert (module.count("train"), module.count("test"), module.spec["shape"]) == (
        row.windows,
        row.windows,
        [24, row.dims],
    )
    if name == "fmri":
        with pytest.warns(UserWarning, match="nothing is held out"):
            assert SeriesDataModule(**{**arguments, "rows_per_series": None}).count("train") == 50 * 177


def small_file(name: str, folder: Path) -> dict[str, Any]:
    """A file in place of the data, under the recipe's own name where it has one; options that it takes."""
    row, generator = TABLE[name], np.random.default_rng(0)
    if name == "sines":
        return {"data.windows": 40}
    if name == "mujoco":
        np.save(folder / "own.npy", generator.normal(size=(40, 24, row.dims)))
        return {"data.path": "own.npy"}
    values = generator.normal(size=(80, row.dims)).cumsum(0)
    if name == "fmri":
        np.savez(folder / FILES[name], ts=values.astype(np.float32), n_timepoints=40, net=np.zeros((2, 50, 50)))
        return {"data.rows_per_series": 80}
    header = ",".join(f"c{i}" for i in range(row.dims))
    np.savetxt(folder / FILES[name], values, delimiter=",", header=header, comments="")
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_two_updates_and_a_test_in_full_size(cli, name: str, tmp_path: Path):
    short = [
        {"class_path": f"lightning_sgm.metrics.{metric}", "init_args": {} if "Dist" in metric else {"iterations": 3}}
        for metric in METRICS
    ]
    options = {
        **small_file(name, tmp_path),
        "data.batch_size": 8,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 1,
        "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 1,
        "samples.count": 2,
        "model.sampler.init_args.steps": 2,
        "model.compared": 8,
        "model.test_samples": 20,
        "model.metrics": json.dumps(short),
    }
    recipe = f"paper/pad_ts_{name}"
    code, _, err = cli("fit", "--config", recipe, *(f"--{key}={value}" for key, value in options.items()))
    assert code == 0, err
    assert f"with {parameters(TABLE[name]):,} parameters" in err
    (run,) = tmp_path.glob("runs/*/version_0")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    for key in ("train/loss", "train/population", "val/loss"):
        found = [float(row[key]) for row in rows if row.get(key)]
        assert found
        assert all(math.isfinite(value) and value > 0 for value in found)
    code, _, err = cli("test", "--ckpt_path", str(run / "checkpoints/last.ckpt"))
    assert code == 0, err
    (numbers,) = tmp_path.rglob("test.json")
    judged = json.loads(numbers.read_text())
    for metric in ("vds", "fdds", "discriminative", "predictive"):
        assert math.isfinite(judged[f"test/samples/{metric}"]), metric
    assert not any(name.startswith("test/floor") for name in judged)  # nothing is held out: it would be 0
    assert judged["test/samples/vds"] > judged["test/samples/vds/halves"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_there_is_named(cli, name: str):
    code, out, err = cli("fit", "--config", f"paper/pad_ts_{name}")
    assert (code, out) == (1, "")
    assert f"there is no file {FILES[name]}" in err
