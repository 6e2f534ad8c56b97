"""Weights of GDSS's code: the imported pair of networks computes what theirs does, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_sgm.io.checkpoint import load, read_checkpoint
from lightning_sgm.io.released.gdss import import_gdss
from lightning_sgm.io.released.model import save
from tests.benchmarks.bench_graph_score import Arguments, Literal, noisy
from tests.conftest import SHARED

RELEASED = SHARED / "checkpoints" / "gdss"
PARTS = ("x", "adj")
VP = {"type": "VP", "beta_min": 0.1, "beta_max": 1.0, "num_scales": 7}
VE = {"type": "VE", "beta_min": 0.2, "beta_max": 1.0, "num_scales": 5}
GRAPHS: dict[str, Any] = {
    "data": {"data": "community_small", "max_node_num": 20, "max_feat_num": 4, "init": "deg"},
    "sde": {"x": VP, "adj": VP},
    "train": {"lr": 0.01, "weight_decay": 1e-4, "lr_decay": 0.999, "lr_schedule": True, "reduce_mean": False},
    "sampler": {"predictor": "S4", "corrector": "None", "snr": 0.15, "scale_eps": 0.7},
    "sample": {"use_ema": True},
}
MOLECULES: dict[str, Any] = {
    "data": {"data": "QM9", "max_node_num": 9, "max_feat_num": 4, "init": "atom"},
    "sde": {"x": VP, "adj": VE},
    "train": {"lr": 0.005, "weight_decay": 1e-4, "lr_decay": 0.999, "lr_schedule": True, "reduce_mean": True},
}
SMALL: dict[str, Any] = {"depth": 2, "width": 8, "layers": 3, "attention_width": 4, "heads": 2}


def literal(seed: int = 0, **options: Any) -> Literal:
    """The authors' networks written out, with random weights."""
    return Literal(Arguments(4, **(SMALL | options)), torch.Generator().manual_seed(seed))


def constructors(a: Arguments) -> dict[str, dict[str, Any]]:
    """What the authors' code stores to build both networks again."""
    attention = {
        "nhid": a.width,
        "num_layers": a.layers,
        "num_linears": a.linears,
        "adim": a.attention_width,
        "num_heads": a.heads,
        **dict(zip(("c_init", "c_hid", "c_final"), a.channels, strict=True)),
        "conv": a.attention_conv.upper(),
    }
    x = {"max_feat_num": a.features, "depth": a.depth, "nhid": a.width}
    of_x = {"model_type": "ScoreNetworkX", **x}
    if a.nodes == "attention":
        of_x = {"model_type": "ScoreNetworkX_GMH", **x, **{k: v for k, v in attention.items() if k != "num_layers"}}
    return {"x": of_x, "adj": {"model_type": "ScoreNetworkA", "max_feat_num": 4, "max_node_num": 20, **attention}}


def easydict(values: Any) -> Any:
    """Nested settings as instances of ``easydict.EasyDict``, whose items are attributes too."""
    if not isinstance(values, dict):
        return values
    made = sys.modules["easydict"].EasyDict()
    for key, value in values.items():
        made[key] = easydict(value)
        setattr(made, key, made[key])
    return made


@pytest.fixture
def pth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file as the authors' code does; its reader must do without the package easydict."""

    def write(
        settings: dict[str, Any], raw: Literal, average: Literal | None = None, prefix: str = "", **changes: Any
    ) -> Path:
        held: dict[str, Any] = {f"params_{part}": values for part, values in constructors(raw.a).items()}
        for part in PARTS:
            own = {
                key.removeprefix(f"{part}."): value for key, value in raw.state.items() if key.startswith(f"{part}.")
            }
            held[f"{part}_state_dict"] = {prefix + key: value for key, value in own.items()}
            if average is not None:
                shadow = [average.state[f"{part}.{key}"] for key in own]
                held[f"ema_{part}"] = {"decay": 0.999, "num_updates": 50, "shadow_params": shadow}
        module = types.ModuleType("easydict")
        module.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "easydict", module)
            content = {"model_config": easydict(settings), **held, **changes}
            torch.save({key: value for key, value in content.items() if value is not None}, tmp_path / "released.pth")
        return tmp_path / "released.pth"

    return write


def saved(path: Path, output: Path) -> Any:
    save(import_gdss(path), output)
    return load(output)


def assert_same_function(network: Any, theirs: Literal) -> None:
    x, adj, mask = noisy(torch.tensor([5, 3, 7]), 8, 4, torch.Generator().manual_seed(1))
    flags = mask.float()
    with torch.no_grad():
        found = network({"x": x, "adj": adj}, torch.ones(3), node_mask=mask)
        torch.testing.assert_close(found["x"], theirs.score_x(x, adj, flags), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["adj"], theirs.score_adj(x, adj, flags), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("use_ema", [True, False])
def test_graphs(pth, tmp_path: Path, prefix: str, use_ema: bool):
    raw, average = literal(0), literal(1)
    path = pth(GRAPHS | {"sample": {"use_ema": use_ema}}, raw, average, prefix)
    model = saved(path, tmp_path / "ours.ckpt")
    assert_same_function(model.network, average if use_ema else raw)
    checkpoint = read_checkpoint(tmp_path / "ours.ckpt")
    assert checkpoint["callbacks"]["EMA"]["updates"] == (50 if use_ema else 0)
    if use_ema:  # fit goes on from what training left
        model.load_state_dict(checkpoint["raw_state"])
        assert_same_function(model.network, raw)
    assert model.spec == {
        "kind": "graph",
        "nodes": 20,
        "features": 4,
        "bonds": 1,
        "node_counts": [21 if n == 12 else {14: 20, 16: 15, 18: 13, 20: 11}.get(n, 0) for n in range(21)],
    }
    assert (model.process["adj"].beta_min, model.process["adj"].beta_max) == (0.1, 1.0)
    assert (model.sampler.steps, model.sampler.grid.t_min, model.sampler.before) == (7, 1e-4, [])
    assert (model.sampler.rule.corrector.snr, model.sampler.rule.corrector.noise_scale) == (0.15, 0.7)
    assert (model.objective.reduction, model.decay) == ("half_sum", 0.999)
    assert model.sample(torch.arange(3))["adj"].shape == (3, 20, 20)


@pytest.mark.parametrize(("nodes", "data", "scale"), [("gcn", "QM9", 0.7), ("attention", "ZINC250k", 0.8)])
@pytest.mark.parametrize("trained_here", [True, False], ids=["own", "released"])
def test_molecules(pth, tmp_path: Path, nodes: str, data: str, scale: float, trained_here: bool):
    """Their files say nothing about sampling, and hold an average only if they come from today's code."""
    raw = literal(nodes=nodes, linears=3)
    settings = MOLECULES | {"data": MOLECULES["data"] | {"data": data}}
    model = saved(pth(settings, raw, literal(1, nodes=nodes, linears=3) if trained_here else None), tmp_path / "o.ckpt")
    assert_same_function(model.network, raw)
    assert (model.spec["kind"], model.spec["bonds"], model.spec["atoms"]) == ("molecule", 3, ["C", "N", "O", "F"])
    assert model.spec["node_counts"][9] > 0
    assert [type(model.process[part]).__name__ for part in PARTS] == ["VP", "VE"]
    assert [model.denoiser.preconditioning[part].prediction for part in PARTS] == ["noise", "score"]
    (corrector,) = model.sampler.before
    assert (type(model.sampler.rule).__name__, model.sampler.steps) == ("ReverseDiffusion", 5)
    assert (corrector.snr, corrector.noise_scale, model.objective.reduction) == (0.2, scale, "mean")
    batch = model.sample(torch.arange(4))
    assert torch.isin(batch["adj"], torch.arange(4.0)).all()
    assert torch.isin(batch["x"].sum(2), torch.tensor([0.0, 1.0])).all()


def test_tensors_beside_their_settings(pth, tmp_path: Path):
    raw, average = literal(0, attention_conv="mlp"), literal(1, attention_conv="mlp")
    wanted = import_gdss(pth(GRAPHS, raw, average))
    save_file(raw.state | {f"ema_{key}": value for key, value in average.state.items()}, tmp_path / "plain.safetensors")
    found = constructors(raw.a)
    settings = {"model_config": GRAPHS, "params_x": found["x"], "params_adj": found["adj"]}
    settings["ema"] = {part: {"decay": 0.999, "num_updates": 50} for part in PARTS}
    with pytest.raises(FileNotFoundError, match=r"the settings belong beside plain\.safetensors"):
        import_gdss(tmp_path / "plain.safetensors")
    (tmp_path / "plain.json").write_text(json.dumps(settings))
    imported = import_gdss(tmp_path / "plain.safetensors")
    assert imported.model == wanted.model
    assert imported.updates == wanted.updates == 50
    for ours, theirs in ((imported.weights, wanted.weights), (imported.raw, wanted.raw)):
        assert ours.keys() == theirs.keys() != set()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    del settings["params_adj"]
    (tmp_path / "plain.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="lacks 'params_adj'"):
        import_gdss(tmp_path / "plain.safetensors")


class Harmful:
    """Creates a file where somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_foreign_and_damaged_files(pth, tmp_path: Path):
    raw = literal()
    good = pth(GRAPHS, raw, raw)
    content = good.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 30):
        good.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"released\.pth is not weights of GDSS or is damaged: it is cut off"):
            import_gdss(good)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        import_gdss(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="only tensors and plain values are read"):
        import_gdss(pth(GRAPHS, raw, params_x=Harmful(tmp_path / "harm")))
    good.write_bytes(pickle.dumps({"model_config": Harmful(tmp_path / "harm")}))
    with pytest.raises(ValueError, match=r"was not written by torch\.save"):
        import_gdss(good)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(ValueError, match="leave out --model"):
        import_gdss(good, "gdss")


def state(part: str, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Any]:
    own = {k.removeprefix(f"{part}."): v for k, v in literal().state.items() if k.startswith(f"{part}.")}
    change(own)
    return {f"{part}_state_dict": own}


WRONG = {
    "another program's": (GRAPHS, {"x_state_dict": None, "model_config": None}, "no model_config and no x_state_dict"),
    "a weight is missing": (GRAPHS, state("adj", lambda s: s.popitem()), r"the weights lack adj\.final"),
    "a weight too many": (
        GRAPHS,
        state("x", lambda s: s.update(new=torch.ones(1))),
        r"no place for the weights x\.new",
    ),
    "another shape": (GRAPHS, state("x", lambda s: s.update({"layers.0.bias": torch.ones(3)})), r"x\.layers\.0\.bias"),
    "a short average": (
        GRAPHS,
        {"ema_adj": {"shadow_params": [], "num_updates": 1}},
        "average of adj has other shapes",
    ),
    "half an average": (GRAPHS, {"ema_adj": {}}, "averages lack 'shadow_params'"),
    "settings of nothing": (GRAPHS | {"sde": {}}, {}, "settings lack 'x'"),
    "unknown networks": (GRAPHS, {"params_adj": {"model_type": "BaselineNetwork"}}, "no networks .* BaselineNetwork"),
    "networks that differ": (GRAPHS, {"params_x": constructors(literal(width=16).a)["x"]}, "differ in nhid"),
    "atoms nobody knows": (
        MOLECULES | {"data": MOLECULES["data"] | {"max_feat_num": 5}},
        {},
        "5 types of atoms, and the file does not say which",
    ),
}


@pytest.mark.parametrize(("settings", "changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(pth, settings: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        import_gdss(pth(settings, literal(), literal() if "ema_adj" in changes else None, **changes))


@pytest.mark.parametrize("file", sorted(RELEASED.glob("*.safetensors")), ids=lambda file: file.stem)
def test_the_released_weights(file: Path, tmp_path: Path):
    model = saved(file, tmp_path / "ours.ckpt")
    settings = json.loads(file.with_suffix(".json").read_text())["model_config"]
    assert (model.spec["kind"] == "molecule") == (settings["data"]["init"] == "atom")
    assert (model.spec["nodes"], model.sampler.steps) == (settings["data"]["max_node_num"], 1000)
    model.sampler.steps, model.nodes = 2, 9
    batch = model.sample(torch.arange(2))
    assert batch["adj"].shape == (2, model.spec["nodes"], model.spec["nodes"])
    assert torch.isin(batch["adj"], torch.arange(model.spec["bonds"] + 1.0)).all()
