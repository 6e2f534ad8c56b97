"""Graphs from the command line: the files of a run, own graphs, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from datamodules import GraphDataModule
from tests.conftest import SHARED, TINY

Edges = list[tuple[int, int]]
RINGS: list[Edges] = [[(i, (i + 1) % size) for i in range(size)] for size in range(4, 16)]


def write(path: Path, graphs: list[Edges]) -> str:
    """Packed graphs; of each there are as many nodes as the largest number says."""
    np.savez(
        path,
        num_nodes=np.array([1 + max((max(pair) for pair in edges), default=0) for edges in graphs]),
        num_edges=np.array([len(edges) for edges in graphs]),
        edge_index=np.array([pair for edges in graphs for pair in edges]).reshape(-1, 2).T,
    )
    return path.name


def test_a_run_leaves_numbers_pictures_and_graphs(cli, tmp_path: Path):
    tiny = [*TINY["gdss"], "--model.val_samples=4"]
    code, out, err = cli("fit", "--config", "gdss", *tiny)
    assert code == 0, err
    assert "val/samples" not in out
    run = tmp_path / "runs/gdss/version_0"
    pictures = {"", "_reverse_process", "_loss_x_by_time", "_loss_adj_by_time"}
    assert {f"00000004{name}.png" for name in pictures} <= {path.name for path in (run / "samples").iterdir()}
    events = EventAccumulator(str(run)).Reload().Tags()
    assert {"samples", "reverse_process", "loss_x_by_time", "loss_adj_by_time"} <= set(events["images"])
    assert {"train/loss_x", "train/loss_adj", "val/samples/mmd_emd/degree"} <= set(events["scalars"])

    code, _, err = cli("test", "--config", "gdss", *tiny)
    assert code == 0, err
    numbers = json.loads((run / "test.json").read_text())
    for feature in ("degree", "cluster", "orbit", "spectral"):
        for who in ("samples", "floor"):
            low, value, high = (numbers[f"test/{who}/mmd_emd/{feature}{end}"] for end in ("_low", "", "_high"))
            assert low <= high
            assert value >= -1e-9
        assert numbers[f"test/floor/mmd_emd/{feature}"] < numbers[f"test/samples/mmd_emd/{feature}"]
    assert numbers["test/floor/mmd_emd/connected"] == 1.0
    assert numbers["test/samples/mmd_emd/graphs"] == 9

    code, out, err = cli("predict", "--config", "gdss", "--num_samples=5", "--batch_size=2", *tiny)
    assert code == 0, err
    folder = run / "predictions"
    assert {path.name for path in folder.iterdir()} == {
        *(f"{number:06d}.graphml" for number in range(5)),
        "samples.npz",
        "samples.png",
    }
    packed = np.load(folder / "samples.npz")
    first = nx.read_graphml(folder / "000000.graphml")
    assert (len(first), first.number_of_edges()) == (packed["num_nodes"][0], packed["num_edges"][0])
    read = GraphDataModule(path=str(folder / "samples.npz"))  # what was generated can be learnt from
    assert sum(read.count(split) for split in ("train", "val", "test")) == (packed["num_edges"] > 0).sum()


@pytest.mark.parametrize(
    ("graphs", "options", "message"),
    [
        ([*RINGS, [(0, 1), (1, 1), (0, 0)]], (), "2 self-loops (in 1 of 13 graphs), first in graph 12 of own.npz"),
        ([*RINGS, [*RINGS[0], (1, 0)]], (), "3 one-way edges in directed graphs (in 1 of 13 graphs)"),
        ([*RINGS, [(0, i) for i in range(1, 12)]], ("--data.features=5",), "degree 11, too high for features = 5"),
        (RINGS, ("--data.max_nodes=10",), "5 graphs have more than max_nodes = 10 nodes"),
        ([], (), "own.npz holds no graph with an edge"),
        ([[], []], (), "own.npz holds no graph with an edge"),
        (RINGS[:2], (), "own.npz has 2 graphs, and train would have none"),
        (RINGS, ("--model.nodes=16",), "nodes must be in 1 .. 15"),
        (RINGS, ("--trainer.gradient_clip_algorithm=value",), "leave out gradient_clip_algorithm"),
    ],
)
def test_bad_graphs_are_named(cli, graphs: list[Edges], options: tuple[str, ...], message: str, tmp_path: Path):
    path = write(tmp_path / "own.npz", graphs)
    code, _, err = cli("fit", "--config", "gdss", *TINY["gdss"], "--data.path", path, *options)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_directed_graphs_with_loops_are_mended_by_option(cli, tmp_path: Path):
    path = write(tmp_path / "own.npz", [*RINGS, [*RINGS[0], (1, 0), (2, 2), (5, 6)], [(0, 1), (3, 4)]])
    options = ("--data.path", path, "--data.symmetrize=true", "--trainer.max_steps=1", "--samples.count=1")
    code, _, err = cli("fit", "--config", "gdss", *TINY["gdss"], *options)
    assert code == 0, err
    assert "1 self-loops (in 1 of 14 graphs) are dropped" in err
    assert "4 one-way edges in directed graphs (in 1 of 14 graphs) are made undirected" in err
    assert "2 isolated nodes dropped" in err


def test_data_of_another_kind(cli):
    code, _, err = cli("fit", "--config", "gdss", "--data=ArrayDataModule", "--data.dataset=gaussians")
    assert code == 1
    assert "GDSS is for graphs and molecules, got data of kind 'array'" in err


@pytest.fixture
def released(cli, tmp_path: Path) -> str:
    """The imported community model."""
    path = SHARED / "checkpoints/gdss/gdss_community_small.safetensors"
    if not path.exists():
        pytest.skip("the released weights are absent")
    assert cli("import", "--source", "gdss", "--checkpoint", path, "--output", "model.ckpt")[0] == 0
    return "model.ckpt"


def test_a_released_model_is_tested_and_samples(cli, released: str, tmp_path: Path):
    path = write(tmp_path / "own.npz", RINGS)
    data = ("--data=GraphDataModule", "--data.path", path)
    few: Any = ("--model.sampler.steps=3", "--model.test_samples=4")
    code, _, err = cli("test", "--ckpt_path", released, *data, "--data.features=10", *few)
    assert code == 0, err
    (numbers,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/*/test.json"))
    assert numbers["test/loss"] == pytest.approx(numbers["test/loss_x"] + numbers["test/loss_adj"], rel=1e-5)
    code, out, err = cli("predict", "--ckpt_path", released, "--num_samples=3", "--model.nodes=12", *few[:1])
    assert code == 0, err
    assert "3 samples" in out
    for options, message in (
        (data, "your data (their width: of graphs --data.features)"),
        ((), "test needs data, which neither the checkpoint nor a recipe names"),
    ):
        code, _, err = cli("test", "--ckpt_path", released, *options)
        assert code in (1, 2)
        assert message in err
    code, _, err = cli("predict", "--ckpt_path", released, "--model.start=matched")
    assert code == 1
    assert "matched needs statistics of the data, which imported models have not" in err
