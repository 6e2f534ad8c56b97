"""Exported folders: what is in them, and that they are read back bit by bit or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_sgm
from lightning_sgm.io import export as exporting
from lightning_sgm.io.checkpoint import AtomicCheckpointIO, hyper_parameters, load, read_checkpoint
from lightning_sgm.io.export import export
from lightning_sgm.io.folders import read_folder
from lightning_sgm.io.released.model import Imported, build, save
from lightning_sgm.io.released.radd import import_radd
from tests.io.models import Plain
from tests.io.released_text_files import LENGTH, V, state
from tests.io.students import CODECS, distillation

SPEC = {"kind": "text", "length": LENGTH, "vocabulary": V, "tokenizer": "bytes", "bytes_per_token": 1.0}
NETWORK = {"class_path": "MaskedTransformer", "init_args": {"width": 32, "blocks": 3, "heads": 4, "dropout": 0.05}}
GEOMETRIC = {"class_path": "Geometric", "init_args": {"a": 1e-4, "b": 20.0}}
DATA = {"class_path": "TextDataModule", "init_args": {"length": LENGTH, "path": "my.txt"}}


def checkpoint(path: Path, **arguments: Any) -> Path:
    """Of a text model; the raw weights in it are others than the averaged ones."""
    averaged, raw = (
        {f"network.{name}": tensor for name, tensor in state(seed).items() if "inv_freq" not in name} for seed in (0, 1)
    )
    section = {"class_path": "RADD", "init_args": {"network": NETWORK, "spec": SPEC, **arguments}}
    save(Imported(section, DATA, averaged, raw, 9, []), path)
    return path


def assert_same(found: Any, wanted: Any) -> None:
    held = found.state_dict()
    assert list(held) == list(wanted.state_dict())
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(held[name], tensor)
        assert held[name].dtype == tensor.dtype
    assert not found.training


def test_the_files_are_those_of_released_models_of_radd(tmp_path: Path):
    process = {"class_path": "AbsorbingProcess", "init_args": {"schedule": GEOMETRIC}}
    export(checkpoint(tmp_path / "a.ckpt", process=process), tmp_path / "folder")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "folder"]
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]
    weights, wanted = load_file(tmp_path / "folder" / "model.safetensors"), state(0)
    assert set(weights) == set(wanted)
    for name, tensor in wanted.items():
        if name != "rotary_emb.inv_freq":
            assert torch.equal(weights[name], tensor)
    torch.testing.assert_close(weights["rotary_emb.inv_freq"], wanted["rotary_emb.inv_freq"])
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["tokens"] == V
    assert config["noise"] == {"type": "geometric", "sigma_min": 1e-4, "sigma_max": 20.0}
    model = {"hidden_size": 32, "n_blocks": 3, "n_heads": 4, "dropout": 0.05, "length": LENGTH}
    assert {key: config["model"][key] for key in model} == model


def test_a_folder_is_read_back_bit_by_bit(tmp_path: Path):
    path = checkpoint(tmp_path / "a.ckpt", passes=7)
    model = load(path)
    assert_same(export(path, tmp_path / "folder"), model)
    found: Any = lightning_sgm.load(tmp_path / "folder")
    assert_same(found, model)
    assert dict(found.hparams) == dict(model.hparams)
    assert (found.bound.passes, found.spec) == (7, SPEC)
    assert hyper_parameters(tmp_path / "folder") == hyper_parameters(path)
    ours, theirs = read_folder(tmp_path / "folder"), read_checkpoint(path)
    assert ours["callbacks"] == theirs["callbacks"]
    assert set(ours["state_dict"]) == set(theirs["state_dict"])
    # A folder of a folder, and our own import of RADD's models.
    export(tmp_path / "folder", tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)
    save(import_radd(tmp_path / "folder"), tmp_path / "b.ckpt")
    imported: Any = load(tmp_path / "b.ckpt")
    assert_same(imported, model)
    x = torch.randint(0, V + 1, (2, LENGTH))
    with torch.no_grad():
        assert torch.equal(imported.network(x), found.network(x))


def test_the_meaning_of_tokens_survives_the_import(tmp_path: Path):
    spec = {**SPEC, "tokenizer": {"characters": "".join(map(chr, range(1000, 1000 + V)))}}
    export(checkpoint(tmp_path / "a.ckpt", spec=spec), tmp_path / "folder")
    assert import_radd(tmp_path / "folder").model["init_args"]["spec"] == spec


def test_other_methods_have_their_own_names(tmp_path: Path):
    spec = {"kind": "array", "shape": [2], "classes": 0, "mean": [0.0, 0.0], "std": [1.0, 1.0], "sigma_data": 1.0}
    network = {"class_path": "MLP", "init_args": {"width": 8}}
    section = {"class_path": "ScoreSDE", "init_args": {"network": network, "spec": spec}}
    torch.manual_seed(0)
    weights = build(section).state_dict()
    save(Imported(section, None, weights, {}, 0, []), tmp_path / "a.ckpt")
    export(tmp_path / "a.ckpt", tmp_path / "folder")
    assert set(load_file(tmp_path / "folder" / "model.safetensors")) == set(weights)
    assert set(json.loads((tmp_path / "folder" / "config.json").read_text())) == {"lightning_sgm"}
    assert_same(load(tmp_path / "folder"), load(tmp_path / "a.ckpt"))
    with pytest.raises(ValueError, match="does not say what the model is: it has no model"):
        import_radd(tmp_path / "folder")


def plain(path: Path, rate: Any = 0.5) -> nn.Module:
    """A checkpoint of a model built in Python, whose weights share memory."""
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    module = Plain(network, rate)
    held = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    AtomicCheckpointIO().save_checkpoint({"pytorch-lightning_version": "2.6.6", **held}, path)
    return network


def test_users_classes_and_parts_built_in_python(tmp_path: Path):
    network = plain(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="add its package: allow="):
        export(tmp_path / "a.ckpt", tmp_path / "folder")
    with pytest.raises(ValueError, match="parts built in Python are not in the file"):
        export(tmp_path / "a.ckpt", tmp_path / "folder", ("tests",))
    assert not (tmp_path / "folder").exists()
    export(tmp_path / "a.ckpt", tmp_path / "folder", ("tests",), network=network)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    found: Any = load(tmp_path / "folder", ("tests",), network=other)
    assert_same(found, load(tmp_path / "a.ckpt", ("tests",), network=network))
    assert found.rate == 0.5
    with pytest.raises(ValueError, match="add its package: allow="):
        load(tmp_path / "folder", network=other)


def test_what_json_cannot_hold_is_refused(tmp_path: Path):
    network = plain(tmp_path / "a.ckpt", rate={"values": [torch.ones(2)]})
    with pytest.raises(ValueError, match=r"model.rate.values\[0\] is a Tensor"):
        export(tmp_path / "a.ckpt", tmp_path / "folder", ("tests",), network=network)
    network = plain(tmp_path / "b.ckpt", rate={1.5: 2})
    with pytest.raises(ValueError, match=r"model.rate is a dict"):
        export(tmp_path / "b.ckpt", tmp_path / "folder", ("tests",), network=network)
    assert not (tmp_path / "folder").exists()


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        export(path, tmp_path / "there")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="cannot write"):
        export(path, tmp_path / "file" / "folder")
    before = sorted(tmp_path.iterdir())

    def refuse(*paths: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("os.rename", refuse)
        with pytest.raises(ValueError, match=r"cannot write .*folder: Input/output"):
            export(path, tmp_path / "folder")
    assert sorted(tmp_path.iterdir()) == before

    def full(file: Path, tensors: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_safetensors", full)
    with pytest.raises(ValueError, match=r"cannot write .*folder: No space left on device"):
        export(path, tmp_path / "folder")
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_and_foreign_folders(tmp_path: Path):
    export(checkpoint(tmp_path / "a.ckpt"), tmp_path / "folder")
    weights, config = (tmp_path / "folder" / name for name in ("model.safetensors", "config.json"))
    bits, text = weights.read_bytes(), config.read_text()
    values = json.loads(text)

    def refused(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            load(tmp_path / "folder")

    weights.write_bytes(bits[:-10])
    refused("model.safetensors is not weights that `export` wrote or is damaged")
    weights.unlink()
    refused(r"there is no .*model\.safetensors", FileNotFoundError)
    save_file({"other": torch.ones(1)}, weights)
    refused("weights in .* do not fit lightning_sgm.RADD")
    weights.write_bytes(bits)
    config.write_text(text[:-20])
    refused(r"config\.json is damaged")
    own = values.pop("lightning_sgm")
    config.write_text(json.dumps(values))
    refused("was not written by `export`")
    for broken in ({**own, "model": 3}, {**own, "updates": None}, {k: v for k, v in own.items() if k != "prefix"}):
        config.write_text(json.dumps({"lightning_sgm": broken}))
        refused("its entry lightning_sgm is not as `export` writes it")
    config.unlink()
    refused("give a checkpoint, or a folder that `export` wrote", FileNotFoundError)


def test_a_folder_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'made')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    export(checkpoint(tmp_path / "a.ckpt"), tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    text = config.read_text()
    for name in ("lightning_sgm.RADD", "lightning_sgm.MaskedTransformer"):
        assert name in text
        config.write_text(text.replace(name, "evil.Thing"))
        with pytest.raises(ValueError, match=r"evil.Thing, which load\(\) may not import"):
            load(tmp_path / "folder")
    assert not (tmp_path / "made").exists()


def test_from_pretrained(tmp_path: Path):
    export(checkpoint(tmp_path / "a.ckpt"), tmp_path / "folder")
    found = lightning_sgm.RADD.from_pretrained(tmp_path / "folder")
    assert_same(found, load(tmp_path / "a.ckpt"))
    x = torch.randint(0, V + 1, (2, LENGTH))
    assert torch.equal(found.network(x), load(tmp_path / "a.ckpt").network(x))  # type: ignore[operator]
    with pytest.raises(ValueError, match="folder holds a RADD, not a ScoreSDE"):
        lightning_sgm.ScoreSDE.from_pretrained(tmp_path / "folder")


# Distillations.


@pytest.mark.parametrize("codec", CODECS)
def test_of_a_distillation_the_student_is_written(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = distillation(tmp_path, codec)
    whole: Any = load(path)
    assert "teacher." in str(list(whole.state_dict()))
    export(path, tmp_path / "folder")
    names = set(load_file(tmp_path / "folder" / "model.safetensors"))
    assert names == {name for name in whole.student.state_dict() if codec != "named" or not name.startswith("codec.")}
    assert any(name.startswith("codec.") for name in names) == (codec == "stored")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())["lightning_sgm"]
    assert config["model"]["class_path"] == "lightning_sgm.methods.resshift.ResShift"
    assert not {"teacher", "terms", "student", "solutions"} & set(config["model"]["init_args"])
    assert config["updates"] == 5
    found: Any = load(tmp_path / "folder")
    assert_same(found, whole.student)
    assert (type(found).__name__, found.sampler.steps, found.perceptual_weight) == ("ResShift", 1, 3.0)
    low, numbers = torch.rand(2, 3, 9, 6) * 2 - 1, torch.tensor([4, 7])
    restored = whole.student.restore(low, numbers)
    assert torch.equal(found.restore(low, numbers), restored)
    assert not torch.allclose(whole.teacher.restore(low, numbers), restored, atol=1e-3)

    # Without the teacher, and a folder of the folder.
    (tmp_path / "teacher.ckpt").unlink()
    export(path, tmp_path / "again")
    export(tmp_path / "folder", tmp_path / "thrice")
    for name in ("again", "thrice"):
        assert torch.equal(load(tmp_path / name).restore(low, numbers), restored)  # type: ignore[operator]
