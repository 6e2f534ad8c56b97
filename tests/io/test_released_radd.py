"""Weights of RADD and MDLM: the imported network computes what theirs does, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_sgm.io.checkpoint import load, read_checkpoint
from lightning_sgm.io.export import rotary_frequencies
from lightning_sgm.io.released.mdlm import import_mdlm
from lightning_sgm.io.released.model import Imported, save
from lightning_sgm.io.released.radd import import_radd
from lightning_sgm.networks import MaskedTransformer
from tests.io.released_text_files import (
    CONFIG,
    HEADS,
    LENGTH,
    MDLM_CONFIG,
    V,
    hub,
    lightning_checkpoint,
    logits,
    run,
    state,
)

X = torch.randint(0, V + 1, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def saved(imported: Imported, path: Path) -> Any:
    save(imported, path)
    return load(path)


def changed(config: dict[str, Any], section: str, **values: Any) -> dict[str, Any]:
    return {**config, section: {**config[section], **values}}


def assert_same_function(model: Any, weights: dict) -> None:
    wanted = logits(weights, X)[..., :V]
    assert wanted.std() > 0.5
    with torch.no_grad():
        torch.testing.assert_close(model.network(X).double(), wanted, rtol=0, atol=2e-5)
        # In double precision what is left is the rounding of the rotary tables and of folded weights to float32.
        torch.testing.assert_close(model.double().network(X), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hub_folder(tmp_path: Path, dtype: torch.dtype):
    weights = {name: tensor.to(dtype) for name, tensor in state().items()}
    imported = import_radd(hub(tmp_path / "hub", weights))
    model = saved(imported, tmp_path / "ours.ckpt")
    assert (model.network.rotary_emb.head_width * HEADS, model.network.blocks[0].dropout) == (32, 0.05)
    assert type(model.process.schedule).__name__ == "Loglinear"
    assert model.spec == {
        "kind": "text",
        "length": LENGTH,
        "vocabulary": V,
        "tokenizer": "bytes",
        "bytes_per_token": 1.0,
    }
    assert imported.data is not None
    assert imported.data["init_args"]["tokenizer"] == "bytes"
    for name, tensor in weights.items():
        if name != "rotary_emb.inv_freq":
            assert torch.equal(model.state_dict()[f"network.{name}"], tensor.float())
    exact = {name: tensor.float() for name, tensor in weights.items()}
    assert_same_function(model, {**exact, "rotary_emb.inv_freq": state()["rotary_emb.inv_freq"]})


def test_noise_and_gpt2_tokens(tmp_path: Path):
    noise = changed(CONFIG, "noise", type="geometric", sigma_min="1e-4", sigma_max=20)
    folder = hub(tmp_path / "hub", state(vocabulary=50257), {**noise, "tokens": 50257})
    imported = import_radd(folder / "model.safetensors")
    schedule = imported.model["init_args"]["process"]["init_args"]["schedule"]
    assert schedule == {"class_path": "Geometric", "init_args": {"a": 1e-4, "b": 20.0}}
    assert imported.model["init_args"]["spec"]["tokenizer"] == "gpt2"
    assert imported.model["init_args"]["spec"]["bytes_per_token"] is None


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_training_run(tmp_path: Path, prefix: str):
    raw, average = state(0), state(1)
    folder = run(tmp_path / "run", raw, average, prefix=prefix)
    model = saved(import_radd(folder), tmp_path / "ours.ckpt")
    assert_same_function(model, average)
    held = read_checkpoint(tmp_path / "ours.ckpt")
    assert held["callbacks"]["EMA"]["updates"] == 9
    assert set(held["raw_state"]) == {f"network.{name}" for name in raw if "inv_freq" not in name}
    for name, tensor in held["raw_state"].items():
        assert torch.equal(tensor, raw[name.removeprefix("network.")])
    assert import_radd(folder / "checkpoints-meta" / "checkpoint.pth").about == import_radd(folder).about


def test_heads_without_a_configuration(tmp_path: Path):
    # By the frequencies, by the released sizes, by 64 to a head, by the recipe.
    def heads(name: str, width: int, recipe: Path | None = None, frequencies: bool = False) -> int:
        weights = {k: v for k, v in state(width=width).items() if frequencies or "inv_freq" not in k}
        imported = import_radd(
            hub(tmp_path / name, weights, None) / "model.safetensors", str(recipe) if recipe else None
        )
        return imported.model["init_args"]["network"]["init_args"]["heads"]

    recipe = tmp_path / "my.yaml"
    network = {"class_path": "MaskedTransformer", "init_args": {"width": 32, "heads": 2}}
    values: dict[str, Any] = {"base": "radd", "model": {"init_args": {"network": network}}}
    recipe.write_text(yaml.safe_dump(values))
    assert heads("a", 32, frequencies=True) == 4
    assert (heads("b", 768), heads("c", 128)) == (12, 2)
    with pytest.raises(ValueError, match="do not tell the number of attention heads"):
        heads("d", 32)
    with pytest.raises(ValueError, match="blocks 3, not 4"):
        heads("e", 32, recipe)
    network["init_args"]["blocks"] = 3  # type: ignore[index]
    recipe.write_text(yaml.safe_dump(values))
    assert heads("f", 32, recipe) == 2
    with pytest.raises(ValueError, match="fit a MaskedTransformer, but the network of score_sde is UNet"):
        import_radd(tmp_path / "a" / "model.safetensors", "score_sde")


def test_other_vocabularies_are_said_by_a_recipe(tmp_path: Path):
    folder = hub(tmp_path / "hub", state(vocabulary=3), {**CONFIG, "tokens": 3})
    with pytest.raises(ValueError, match="3 tokens, neither GPT-2's 50257 nor 256 bytes"):
        import_radd(folder)
    spec = {"kind": "text", "length": LENGTH, "vocabulary": 3, "tokenizer": {"characters": "abc"}}
    network = {"class_path": "MaskedTransformer", "init_args": {"width": 32, "blocks": 3, "heads": 4}}
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        yaml.safe_dump({"model": {"class_path": "RADD", "init_args": {"network": network, "spec": spec}}})
    )
    model = saved(import_radd(folder, str(recipe)), tmp_path / "ours.ckpt")
    assert model.spec == spec
    assert set(model.generate(2)["x"].flatten().tolist()) <= {0, 1, 2}
    recipe.write_text(recipe.read_text().replace("vocabulary: 3", "vocabulary: 4"))
    with pytest.raises(ValueError, match="3 tokens, but the spec given for it says 4"):
        import_radd(folder, str(recipe))


def without(name: str) -> dict:
    return {k: v for k, v in state().items() if k != name}


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (without("blocks.1.norm2.bias"), CONFIG, "1 missing .blocks.1.norm2.bias"),
        ({**state(), "blocks.0.gate": torch.ones(1)}, CONFIG, "1 unexpected .blocks.0.gate"),
        ({**state(), "blocks.0.mlp.0.bias": torch.ones(3)}, CONFIG, r"another shape .blocks.0.mlp.0.bias \[3\]"),
        ({**state(), "blocks.0.norm1.bias": torch.ones(32, dtype=torch.int32)}, CONFIG, "norm1.bias holds torch.int32"),
        ({**state(), "rotary_emb.inv_freq": 20000.0 ** -(torch.arange(4) / 4)}, CONFIG, r"is not 10000\^\(-2j/8\)"),
        ({**state(), "rotary_emb.inv_freq": 10001.0 ** -(torch.arange(4) / 4)}, CONFIG, r"is not 10000\^\(-2j/8\)"),
        (without("vocab_embed.embedding"), CONFIG, "there is no vocab_embed.embedding"),
        (state(), changed(CONFIG, "model", hidden_size=64), "width 32, not 64"),
        (state(), changed(CONFIG, "model", n_blocks=12), "blocks 3, not 12"),
        (state(), changed(CONFIG, "model", n_heads=2), r"inv_freq .* is not 10000\^\(-2j/16\)"),
        (state(), {**CONFIG, "tokens": 255}, "says 255 tokens"),
        (state(), changed(CONFIG, "noise", type="linear"), "noise of type 'linear'"),
        (state(), {"tokens": V}, "has no model"),
        (state(), {**CONFIG, "model": 3}, "is damaged"),
        (state(timed=True), CONFIG, "--source mdlm; the score of SEDD depends on the time"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, weights: dict, config: Any, message: str):
    with pytest.raises(ValueError, match=message):
        import_radd(hub(tmp_path / "hub", weights, config))


def test_mdlm_without_its_time_is_radd(tmp_path: Path):
    weights = state(timed=True)
    folder = hub(tmp_path / "hub", {f"backbone.{k}": v for k, v in weights.items()}, MDLM_CONFIG)
    model = saved(import_mdlm(folder), tmp_path / "a.ckpt")
    assert model.network.blocks[0].dropout == 0.1
    assert_same_function(model, weights)
    (folder / "model.safetensors").unlink()
    torch.save({f"backbone.{k}": v for k, v in weights.items()}, folder / "pytorch_model.bin")
    assert_same_function(saved(import_mdlm(folder / "pytorch_model.bin"), tmp_path / "b.ckpt"), weights)


def test_a_training_checkpoint_of_mdlm(tmp_path: Path):
    raw, average = state(0, timed=True), state(1, timed=True)
    path = lightning_checkpoint(tmp_path / "last.ckpt", raw, average, noise={"type": "cosinesqr"})
    imported = import_mdlm(path)
    model = saved(imported, tmp_path / "ours.ckpt")
    assert type(model.process.schedule).__name__ == "CosineSquared"
    assert imported.updates == 5
    assert_same_function(model, average)
    model.load_state_dict(imported.raw)
    assert_same_function(model.float(), raw)
    held = lightning_checkpoint(path, raw, None)
    assert_same_function(saved(import_mdlm(held), tmp_path / "raw.ckpt"), raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_conditioning": True}, "trained with time conditioning"),
        ({"parameterization": "sedd"}, "a dit with sedd"),
        ({"backbone": "dimamba"}, "a dimamba with subs"),
        ({"data": {"tokenizer_name_or_path": "bert-base-uncased"}}, "tokens of bert-base-uncased"),
    ],
)
def test_other_models_of_their_code_are_refused(tmp_path: Path, changes: dict, message: str):
    weights = state(timed=True)
    with pytest.raises(ValueError, match=message):
        import_mdlm(lightning_checkpoint(tmp_path / "last.ckpt", weights, weights, **changes))


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (state(timed=True), {**MDLM_CONFIG, "time_conditioning": True}, "trained with time conditioning"),
        (state(timed=True), {**MDLM_CONFIG, "model_type": "sedd"}, "a model of type 'sedd', not 'mdlm'"),
        (state(timed=True), {"model_type": "mdlm"}, "damaged or not of MDLM"),
        (state(), MDLM_CONFIG, "there is no sigma_map.mlp.0.weight"),
        ({**state(timed=True), "sigma_map.mlp.4.bias": torch.ones(1)}, MDLM_CONFIG, "1 unexpected .sigma_map.mlp.4"),
        ({**state(timed=True), "blocks.0.norm1.bias": torch.ones(32)}, MDLM_CONFIG, "blocks.0.norm1 has a bias"),
        ({**state(timed=True), "blocks.0.adaLN_modulation.bias": torch.ones(3)}, MDLM_CONFIG, "not those of MDLM"),
    ],
)
def test_what_is_not_mdlm_is_refused(tmp_path: Path, weights: dict, config: Any, message: str):
    with pytest.raises(ValueError, match=message):
        import_mdlm(hub(tmp_path / "hub", weights, config))


class Evil:
    """Pickles as a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(("source", "name"), [(import_radd, "checkpoint.pth"), (import_mdlm, "last.ckpt")])
def test_code_in_a_file_is_not_run(tmp_path: Path, source: Any, name: str):
    evil = Evil(tmp_path / "made")
    torch.save({"model": {}, "ema": evil, "step": 1, "state_dict": {}, "hyper_parameters": evil}, tmp_path / name)
    with pytest.raises(ValueError, match="posix"):
        source(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match="cut off or was not written by"):
        source(tmp_path / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("source", "config"), [(import_radd, CONFIG), (import_mdlm, MDLM_CONFIG)])
def test_damaged_files(tmp_path: Path, source: Any, config: dict):
    folder = hub(tmp_path / "hub", state(timed=source is import_mdlm), config)
    weights, settings = folder / "model.safetensors", folder / "config.json"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            source(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*model\.safetensors"):
        source(folder)
    weights.write_bytes(content)
    for text in ("{", "[1]", "[" * 100_000):
        settings.write_text(text)
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            source(folder)
    settings.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: give the folder"):
        source(folder)


def test_a_run_with_another_average_or_settings(tmp_path: Path):
    folder = run(tmp_path / "run", state(), {**state(1), "more": torch.ones(1)})
    with pytest.raises(ValueError, match="average has other shapes than its 35 weights"):
        import_radd(folder)
    (folder / ".hydra" / "config.yaml").write_text("a: [")
    held = torch.load(folder / "checkpoints-meta" / "checkpoint.pth", weights_only=True)
    held["ema"]["shadow_params"].pop()
    torch.save(held, folder / "checkpoints-meta" / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged: it is no YAML"):
        import_radd(folder)
    del held["ema"]
    torch.save(held, folder / "checkpoints-meta" / "checkpoint.pth")
    with pytest.raises(ValueError, match="it has no ema"):
        import_radd(folder)


@pytest.mark.parametrize("source", ["radd", "mdlm"])
def test_import_and_predict(cli, tmp_path: Path, source: str):
    config = CONFIG if source == "radd" else MDLM_CONFIG
    hub(tmp_path / "hub", state(timed=source == "mdlm"), config)
    code, out, err = cli("import", "--source", source, "--checkpoint", "hub", "--output", "ours.ckpt")
    assert code == 0, err
    assert "256 tokens and the mask" in out
    code, out, err = cli("predict", "--ckpt_path", "ours.ckpt", "--num_samples", "2", "--model.sampler.steps", "4")
    assert code == 0, err
    assert "2 samples" in out
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "time_conditioning": True, "tokens": 1}))
    code, out, err = cli("import", "--source", source, "--checkpoint", "hub", "--output", "other.ckpt")
    assert (code, out, len(err.strip().splitlines())) == (1, "", 1)
    assert not Path("other.ckpt").exists()


@pytest.mark.slow
def test_in_full_size(tmp_path: Path):
    """The released small model: so many bytes, so many parameters, and no word on what it is."""
    small = {"width": 768, "blocks": 12, "heads": 12}
    with torch.device("meta"):
        shapes = MaskedTransformer({"vocabulary": 50257}, **small).state_dict()
    weights = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    weights["rotary_emb.inv_freq"] = rotary_frequencies(64)
    file = hub(tmp_path / "hub", weights, None) / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == 649_062_856
    imported = import_radd(file)
    assert "paper/radd_small_owt, width 768, 12 blocks, 12 heads, 50,257 tokens" in imported.about[1]
    assert "162,265,682 parameters" in imported.about[1]
    assert imported.data is not None
    assert imported.data["init_args"]["tokenizer"] == "gpt2"
    model = saved(imported, tmp_path / "ours.ckpt")
    assert (model.spec["length"], model.sampler.steps) == (1024, 1024)
