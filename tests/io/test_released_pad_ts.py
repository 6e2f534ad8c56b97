"""Weights of PaD-TS's code: the imported model answers as theirs does, and what does not fit is refused."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from lightning_sgm.io.checkpoint import load, read_checkpoint
from lightning_sgm.io.released.model import save
from lightning_sgm.io.released.pad_ts import import_pad_ts

L, D, H = 6, 4, 16
COLUMNS = ["open", "high", "low", "volume"]
UNUSED = "feature2emb.pos_emb.pe"


def authors_weights(length=L, dims=D, width=H, encoders=1, blocks=3):
    """pad_ts.md section 11, with weights large enough that every part is heard."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def linear(name, out, features):
        state[f"{name}.weight"] = torch.randn(out, features, generator=generator) / math.sqrt(features)
        state[f"{name}.bias"] = 0.3 * torch.randn(out, generator=generator)

    for channel, features in (("time", dims), ("feature", length)):
        state[f"{channel}2emb.pos_emb.pe"] = torch.randn(1, length, width, generator=generator)
        linear(f"{channel}2emb.processing.0", width, features)
        for part, count in (("encoder", encoders), ("blocks", blocks)):
            for k in range(count):
                block = f"{channel}_{part}.encoder_blocks.{k}"
                linear(f"{block}.attn.qkv", 3 * width, width)
                linear(f"{block}.attn.proj", width, width)
                linear(f"{block}.mlp.fc1", 4 * width, width)
                linear(f"{block}.mlp.fc2", width, 4 * width)
                if part == "blocks":
                    linear(f"{block}.adaLN_modulation.1", 6 * width, width)
        linear(f"{channel}_blocks.diffusion_step_emb.mlp.0", width, 256)
        linear(f"{channel}_blocks.diffusion_step_emb.mlp.2", width, width)
        linear(f"fc_{channel}", features, width)
    return state


def answer(state, x, t, heads=4, encoders=1, blocks=3):
    """pad_ts.md section 3 in float64, with torch's own attention, which packs q, k and v alike."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(name, h):
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def attention(name, h):
        module = torch.nn.MultiheadAttention(h.shape[-1], heads, batch_first=True, dtype=torch.float64)
        names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
        names |= {f"out_proj.{kind}": f"proj.{kind}" for kind in ("weight", "bias")}
        module.load_state_dict({theirs: w[f"{name}.{own}"] for theirs, own in names.items()})
        return module(h, h, h, need_weights=False)[0].detach()

    def mlp(name, h):
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", h), approximate="tanh"))

    phases = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([phases.cos(), phases.sin()], 1)
    total = 0
    for channel, tokens in (("time", x), ("feature", x.mT)):
        h = linear(f"{channel}2emb.processing.0", tokens)
        h = h + w["time2emb.pos_emb.pe"] if channel == "time" else h
        for k in range(encoders):
            name = f"{channel}_encoder.encoder_blocks.{k}"
            h = h + attention(f"{name}.attn", norm(h))
            h = h + mlp(f"{name}.mlp", norm(h))
        level = F.silu(linear(f"{channel}_blocks.diffusion_step_emb.mlp.0", waves))
        level = F.silu(linear(f"{channel}_blocks.diffusion_step_emb.mlp.2", level))
        collected = torch.zeros_like(h)
        for k in range(blocks):
            name = f"{channel}_blocks.encoder_blocks.{k}"
            b1, a1, g1, b2, a2, g2 = linear(f"{name}.adaLN_modulation.1", level)[:, None].chunk(6, -1)
            u = h + g1 * attention(f"{name}.attn", norm(h) * (1 + a1) + b1)
            u = u + g2 * mlp(f"{name}.mlp", norm(u) * (1 + a2) + b2)
            collected, h = collected + u, h + u
        out = linear(f"fc_{channel}", collected)
        total = total + (out if channel == "time" else out.mT)
    return total


def authors_file(path: Path, state: Any = None, **more: Any) -> Path:
    state = authors_weights() if state is None else state
    optimizer = {"state": {0: {"step": torch.tensor(70000.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"step": 70000, "model_state_dict": state, "opt_state_dict": optimizer, **more}, path)
    return path


def table(path: Path, columns=COLUMNS, rows=40) -> Path:
    """Rows whose columns have the ranges [i, 2 i + 3]."""
    values = np.random.default_rng(0).uniform(0, 1, (rows, len(columns)))
    values[0], values[1] = 0, 1
    place = np.arange(len(columns))
    values = place + values * (place + 3)
    np.savetxt(path, values, delimiter=",", header=",".join(columns), comments="", fmt="%.17g")
    return path


def recipe(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({"base": "paper/pad_ts_stocks", **sections}))
    return path


def init_args(**values: Any) -> dict[str, Any]:
    return {"init_args": values}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return authors_file(tmp_path / "model_070000.pt")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return table(tmp_path / "own.csv")


@pytest.mark.parametrize("sizes", [{}, {"length": 24, "dims": 5, "encoders": 2, "blocks": 1}, {"dims": 1}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_it_answers_as_theirs(tmp_path: Path, sizes: dict[str, int], prefix: str):
    state = authors_weights(**sizes)
    file = authors_file(tmp_path / "theirs.pt", {f"{prefix}{name}": tensor for name, tensor in state.items()})
    dims = sizes.get("dims", D)
    data = table(tmp_path / "own.csv", [f"c{i}" for i in range(dims)])
    save(import_pad_ts(file, data=str(data)), tmp_path / "ours.ckpt")
    model: Any = load(tmp_path / "ours.ckpt")
    x = torch.randn(3, sizes.get("length", L), dims, dtype=torch.float64)
    t = torch.tensor([0.0, 31.0, 249.0], dtype=torch.float64)
    counts = {name: sizes[name] for name in ("encoders", "blocks") if name in sizes}
    wanted = answer(state, x, t, **counts)
    assert wanted.std() > 1
    with torch.no_grad():
        torch.testing.assert_close(model.network(x.float(), t.float()).double(), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.network.double()(x, t), wanted, rtol=1e-9, atol=1e-9)
        # The estimate that samplers see: the answer itself, told the index.
        labelled = model.denoiser.x0(x, torch.tensor(32 / 250, dtype=torch.float64).expand(3))
        torch.testing.assert_close(labelled, answer(state, x, torch.full_like(t, 31.0), **counts), rtol=1e-9, atol=1e-9)


def test_the_range_is_that_of_all_data(file: Path, data: Path, tmp_path: Path):
    imported = import_pad_ts(file, data=str(data))
    save(imported, tmp_path / "ours.ckpt")
    model: Any = load(tmp_path / "ours.ckpt")
    spec = model.spec
    assert (spec["shape"], spec["length"], spec["columns"]) == ([L, D], L, COLUMNS)
    assert (spec["scaling"]["low"], spec["scaling"]["high"]) == ([0, 1, 2, 3], [3, 5, 7, 9])
    corners = model.scaling.unscale(torch.tensor([-1.0, 1.0])[None, :, None].expand(1, 2, D))
    assert corners.tolist() == [[[0, 1, 2, 3], [3, 5, 7, 9]]]
    held = read_checkpoint(tmp_path / "ours.ckpt")
    stored = held["datamodule_hyper_parameters"]
    assert (stored["path"], stored["val_fraction"], stored["test_fraction"]) == (str(data.absolute()), 0, 0)
    assert "raw_state" not in held
    assert UNUSED not in "".join(held["state_dict"])
    text = "\n".join(imported.about)
    for part in ("step 70,000", "as in paper/pad_ts_stocks", "250 diffusion steps", "4 heads", "open 0 to 3", UNUSED):
        assert part in text


@pytest.mark.parametrize(
    ("width", "dims", "name", "steps"),
    [
        (128, 5, "sines", 250),
        (128, 6, "stocks", 250),
        (64, 5, "stocks", 250),
        (256, 28, "energy", 500),
        (256, 14, "mujoco", 500),
        (256, 50, "fmri", 500),
        (256, 6, "energy", 500),
    ],
)
def test_the_papers_recipe_for_a_width(tmp_path: Path, width: int, dims: int, name: str, steps: int):
    state = authors_weights(4, dims, width, 0, 1)
    data = table(tmp_path / "own.csv", [f"c{i}" for i in range(dims)])
    imported = import_pad_ts(authors_file(tmp_path / "theirs.pt", state), data=str(data))
    assert f"as in paper/pad_ts_{name}," in imported.about[1]
    assert "assumed" in imported.about[3]
    arguments = imported.model["init_args"]
    assert arguments["process"]["init_args"]["steps"] == arguments["sampler"]["init_args"]["steps"] == steps
    assert arguments["network"]["init_args"] == {
        **{"width": width, "encoders": 0, "blocks": 1},
        **{"heads": 4, "dropout": 0.1},
    }


def test_sines_have_a_known_range(tmp_path: Path):
    file = authors_file(tmp_path / "theirs.pt", authors_weights(length=24, dims=3))
    imported = import_pad_ts(file, data="sines")
    spec = imported.model["init_args"]["spec"]
    assert (spec["scaling"]["low"], spec["scaling"]["high"]) == ([-1.0] * 3, [1.0] * 3)


def test_a_recipe_decides_on_heads_steps_and_columns(file: Path, tmp_path: Path):
    table(tmp_path / "wide.csv", ["day", *COLUMNS])
    own = recipe(
        tmp_path / "my.yaml",
        model=init_args(network=init_args(width=H, heads=2), process=init_args(steps=7), sampler=init_args(steps=7)),
        data=init_args(path=str(tmp_path / "wide.csv"), drop=["day"], scaling="standard", val_fraction=0.1, length=9),
    )
    imported = import_pad_ts(file, model=str(own))
    save(imported, tmp_path / "ours.ckpt")
    model: Any = load(tmp_path / "ours.ckpt")
    x, t = torch.randn(2, L, D, dtype=torch.float64), torch.tensor([0.0, 6.0], dtype=torch.float64)
    with torch.no_grad():
        found = model.network.double()(x, t)
    torch.testing.assert_close(found, answer(authors_weights(), x, t, heads=2), rtol=1e-9, atol=1e-9)
    assert (model.process.steps, model.sampler.steps) == (7, 7)
    # Whatever the recipe says, theirs is scaled by the range of all rows.
    assert model.spec["scaling"]["low"] == [1, 2, 3, 4]
    assert model.scaling.kind == "minmax"
    assert not any("assumed" in line for line in imported.about)
    table(tmp_path / "other.csv", ["day", *COLUMNS], rows=11)
    data = import_pad_ts(file, str(own), str(tmp_path / "other.csv")).data
    assert data is not None
    assert data["init_args"]["path"].endswith("other.csv")


def error(file: Path, model: Any = None, data: Any = None) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        import_pad_ts(file, None if model is None else str(model), None if data is None else str(data))
    return str(caught.value)


def test_files_that_are_something_else(tmp_path: Path, data: Path):
    whole = authors_file(tmp_path / "whole.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[:-500])
    assert "cut off" in error(tmp_path / "short.pt", data=data)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.pt"):
        import_pad_ts(tmp_path / "absent.pt", data=str(data))

    class Sneaky:
        def __reduce__(self):
            return (exec, ("raise SystemExit('run')",))

    assert "only tensors and plain values are read" in error(authors_file(tmp_path / "bad.pt", more=Sneaky()))
    torch.save({"epoch": 1, "state_dict": {}}, tmp_path / "other.pt")
    assert "it has no step and no model_state_dict" in error(tmp_path / "other.pt", data=data)
    for state in ([1], {"a": 1}):
        assert "hold tensors by name" in error(authors_file(tmp_path / "odd.pt", state), data=data)
    assert "holds no weights of PaD-TS: it has no time2emb" in error(
        authors_file(tmp_path / "net.pt", {"conv.weight": torch.ones(3)}), data=data
    )


def test_entries_that_do_not_fit(tmp_path: Path, data: Path):
    def changed(change):
        state = authors_weights()
        change(state)
        return error(authors_file(tmp_path / "changed.pt", state), data=data)

    assert "1 missing (fc_time.bias)" in changed(lambda state: state.pop("fc_time.bias"))
    assert "1 unexpected (extra)" in changed(lambda state: state.update(extra=torch.ones(1)))
    assert "fc_time.weight [4, 15] for [4, 16]" in changed(lambda s: s.update({"fc_time.weight": torch.ones(D, 15)}))
    assert "fc_time.bias holds torch.int64" in changed(lambda s: s.update({"fc_time.bias": torch.ones(D).long()}))
    # A channel with fewer blocks than the other.
    name = "feature_blocks.encoder_blocks.2."
    lost = changed(lambda state: [state.pop(key) for key in list(state) if key.startswith(name)])
    assert f"10 missing ({name}" in lost


def test_data_and_recipes_that_do_not_fit(file: Path, data: Path, tmp_path: Path):
    assert "add --data FILE" in error(file)
    assert "or --data sines" in error(file)
    text = error(file, data=table(tmp_path / "wide.csv", [*COLUMNS, "day"]))
    assert "5 columns (open, high, low, volume, day)" in text
    assert "of 4 dimensions" in text
    text = error(file, data=table(tmp_path / "few.csv", rows=5))
    assert "a window takes 6 rows" in text
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.csv"):
        import_pad_ts(file, data=str(tmp_path / "absent.csv"))
    (tmp_path / "text.csv").write_text(data.read_text() + "a,b,c,d\n")
    text = error(file, data=tmp_path / "text.csv")
    assert "row 42" in text
    assert "a recipe, given by --model" in text

    small = init_args(network=init_args(width=32))
    assert "they have width 16, not 32" in error(file, recipe(tmp_path / "a.yaml", model=small), data)
    own = init_args(network={"class_path": "MLP", "init_args": {}})
    assert "the network of" in error(file, recipe(tmp_path / "b.yaml", model=own), data)
    assert "is no recipe of PaDTS" in error(file, "radd", data)
    assert "has a preconditioning" in error(file, "pad_ts_fine", data)
    with pytest.raises(FileNotFoundError, match="absent"):
        import_pad_ts(file, "absent", str(data))


@pytest.mark.usefixtures("file", "data")
def test_import_predict_and_test(cli, tmp_path: Path):
    arguments = ("import", "--source", "pad_ts", "--checkpoint", "model_070000.pt", "--output", "ours.ckpt")
    code, out, err = cli(*arguments)
    assert (code, out, len(err.strip().splitlines())) == (1, "", 1)
    assert "--data FILE" in err
    code, _, err = cli(*[part.replace("pad_ts", "gdss") for part in arguments], "--data", "own.csv")
    assert code == 2
    assert "--data is for pad_ts only" in err
    code, out, err = cli(*arguments, "--data", "own.csv")
    assert (code, err) == (0, "")
    assert "open 0 to 3" in out
    (following,) = [line for line in out.splitlines() if line.startswith("next: ")]
    quick = ("--model.sampler.init_args.steps", "10")
    code, out, err = cli(*shlex.split(following)[4:-1], "4", *quick)
    assert code == 0, err
    assert "4 samples" in out
    (found,) = tmp_path.rglob("predictions/*.npz")
    with np.load(found) as samples:
        values = next(array for array in (samples[name] for name in samples.files) if array.ndim == 3)
    assert values.shape == (4, L, D)
    # The last estimate is kept in [-1, 1], so samples lie in the range of the data.
    low = np.arange(D)
    assert ((values >= low - 1e-5) & (values <= 2 * low + 3 + 1e-5)).all()
    assert values.std() > 0.1
    judged_by = ("--model.metrics=[lightning_sgm.metrics.ValueDistance]", "--model.test_samples=10")
    code, _, err = cli("test", "--ckpt_path", "ours.ckpt", *judged_by, *quick)
    assert code == 0, err
    (numbers,) = tmp_path.rglob("test.json")
    judged = json.loads(numbers.read_text())
    assert judged["test/loss"] > 0
    assert 0 < judged["test/samples/vds/halves"] < judged["test/samples/vds"] < 18
