"""Checkpoints are whole, safe to read, and enough to rebuild a model."""

from __future__ import annotations

import io
import os
import pickle
import resource
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_sgm.callbacks import EMA
from lightning_sgm.io.checkpoint import AtomicCheckpointIO, foreign_name, hyper_parameters, load, read_checkpoint
from tests.io.models import Data, Model, Net, Plain

ALLOW = ("lightning_sgm", "tests.io.models")
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 3,
}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a model trained from the command line, with EMA."""
    monkeypatch.setattr(sys, "argv", ["lightning_sgm"])
    cli = LightningCLI(
        Model,
        Data,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        run=False,
        trainer_defaults={**QUIET, "callbacks": [EMA(decay=0.5)]},
        args={
            "model": {
                "class_path": "tests.io.models.Model",
                "init_args": {
                    "network": {"class_path": "tests.io.models.Net", "init_args": {"width": 5}},
                    "spec": {"size": 3},
                    "optimizer": {"class_path": "torch.optim.Adam"},
                    "rate": 0.25,
                },
            },
            "data": "tests.io.models.Data",
        },
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.trainer.save_checkpoint(tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def edited(checkpoint: Path, **changes: Any) -> Path:
    """The checkpoint with other arguments of the model."""
    content = read_checkpoint(checkpoint)
    content["hyper_parameters"] |= changes
    path = checkpoint.with_name("edited.ckpt")
    torch.save(content, path)
    return path


# Writing.


def save_too_much(path: Path) -> None:
    """A file system that is full after 64 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.randn(1 << 16)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path):
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.ones(2)}}, path)
    with pytest.raises(OSError, match=r"cannot write .*last.ckpt: File too large") as caught:
        save_too_much(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert read_checkpoint(path)["state_dict"]["x"].tolist() == [1, 1]


def test_file_that_cannot_be_pickled_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "x": lambda: None}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert read_checkpoint(path)["state_dict"] == {}


def test_storage_options_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x", storage_options={})


# Reading.


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


def whole() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"x": torch.randn(10000)}}, buffer)
    return buffer.getvalue()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


BROKEN = {
    "cut": (lambda: whole()[:-3000], "cut off"),
    "start": (lambda: whole()[:100], "cut off"),
    "empty": (lambda: b"", "cut off"),
    "text": (lambda: b"seed: 1\n" * 100, "cut off"),
    "pickle": (lambda: pickle.dumps({"state_dict": {}}), "cut off"),
    "no dict": (lambda: saved([1, 2]), "no state_dict"),
    "weights alone": (lambda: saved({"network.weight": torch.ones(2)}), "no state_dict"),
    "numpy": (lambda: saved({"state_dict": {}, "loss": np.float64(1)}), "contains numpy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_foreign_and_damaged_files_are_told_in_one_sentence(tmp_path: Path, name: str):
    make, reason = BROKEN[name]
    path = tmp_path / "x.ckpt"
    path.write_bytes(make())
    for read in (read_checkpoint, hyper_parameters, load, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(
            ValueError, match=f"is not a checkpoint of lightning_sgm or is damaged: .*{reason}"
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path):
    for read in (read_checkpoint, load, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\.ckpt"):
            read(tmp_path / "none.ckpt")


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, weights_only: bool | None):
    target = tmp_path / "attacked"
    torch.save({"state_dict": OrderedDict(), "extra": Attack(target)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"contains posix\.mkdir, but only tensors and plain values"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    with pytest.raises(ValueError, match="contains"):
        load(tmp_path / "x.ckpt")
    assert not target.exists()
    torch.load(tmp_path / "x.ckpt", weights_only=False)  # it would have worked
    assert target.exists()


# Rebuilding.


def test_arguments_of_model_and_data(checkpoint: Path):
    stored = hyper_parameters(checkpoint)
    assert stored.model_class == "tests.io.models.Model"
    assert stored.model["network"] == {"class_path": "tests.io.models.Net", "init_args": {"width": 5}}
    assert stored.model["rate"] == 0.25
    assert stored.model["spec"] == {"size": 3}
    assert (stored.data_class, stored.data) == ("tests.io.models.Data", {"size": 3})
    assert not any(key.startswith("_") for key in (*stored.model, *stored.data))


def test_a_file_without_arguments_says_nothing(tmp_path: Path):
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    assert hyper_parameters(tmp_path / "x.ckpt") == ("", {}, "", {})
    with pytest.raises(ValueError, match="does not name the class"):
        load(tmp_path / "x.ckpt")


def test_model_is_rebuilt_with_its_average(checkpoint: Path):
    model = load(checkpoint, allow=ALLOW)
    assert isinstance(model, Model)
    assert isinstance(model.network, Net)
    assert model.rate == 0.25
    assert not model.training
    assert isinstance(model.configure_optimizers(), torch.optim.Adam)
    content = torch.load(checkpoint, weights_only=True)
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in model.state_dict().items())
    raw = content["raw_state"]
    assert not any(torch.equal(model.state_dict()[name], raw[name]) for name in raw)


def test_rebuilt_model_does_not_depend_on_the_file(checkpoint: Path):
    """Weights are copied out of the mapped file."""
    model = load(checkpoint, allow=ALLOW)
    assert isinstance(model, Model)
    before = model.network.layers.state_dict()["0.weight"].clone()
    checkpoint.write_bytes(bytes(len(checkpoint.read_bytes())))
    assert torch.equal(model.network.layers.state_dict()["0.weight"], before)


def test_overrides_replace_arguments(checkpoint: Path):
    network = Net({"size": 3}, width=5)
    model = load(checkpoint, allow=ALLOW, rate=4.0, network=network)
    assert model.rate == 4.0
    assert model.network is network


def test_weights_that_do_not_fit_are_told_in_one_sentence(checkpoint: Path):
    with pytest.raises(
        ValueError, match=r"weights in .* do not fit .*size mismatch for network.layers.0.weight"
    ) as caught:
        load(edited(checkpoint, network={"class_path": "tests.io.models.Net", "init_args": {"width": 4}}), allow=ALLOW)
    assert "\n" not in str(caught.value)


def test_argument_that_does_not_exist_is_named(checkpoint: Path):
    with pytest.raises(ValueError, match="widht") as caught:
        load(edited(checkpoint, network={"class_path": "tests.io.models.Net", "init_args": {"widht": 4}}), allow=ALLOW)
    assert "\n" not in str(caught.value)


def test_model_built_in_python_needs_its_parts(tmp_path: Path):
    model = Plain(torch.nn.Linear(2, 2), rate=3.0)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"network.*load\(path, network=...\)"):
        load(tmp_path / "x.ckpt", allow=ALLOW)
    again = load(tmp_path / "x.ckpt", allow=ALLOW, network=torch.nn.Linear(2, 2))
    assert isinstance(again, Plain)
    assert again.rate == 3.0
    assert torch.equal(again.network.weight, model.network.weight)  # type: ignore[arg-type]


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``foreign_code`` that leaves a mark when it is imported; returns the mark."""
    folder = tmp_path / "site"
    folder.mkdir()
    mark = folder / "imported"
    (folder / "foreign_code.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nfrom tests.io.models import Model, Net\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "foreign_code", raising=False)
    return mark


def test_classes_are_imported_from_allowed_packages_only(checkpoint: Path, foreign: Path):
    path = edited(checkpoint, _class_path="foreign_code.Model")
    with pytest.raises(ValueError, match=r"may not import.*'foreign_code'"):
        load(path, allow=ALLOW)
    assert not foreign.exists()
    assert isinstance(load(path, allow=(*ALLOW, "foreign_code")), Model)
    assert foreign.exists()


def test_prefix_of_a_name_is_not_its_package(checkpoint: Path, foreign: Path):
    with pytest.raises(ValueError, match="may not import"):
        load(edited(checkpoint, _class_path="foreign_code.Model"), allow=("foreign", *ALLOW))
    assert not foreign.exists()


def test_parts_are_imported_from_allowed_packages_only(checkpoint: Path, foreign: Path):
    path = edited(checkpoint, network={"class_path": "foreign_code.Net", "init_args": {"width": 5}})
    with pytest.raises(ValueError, match=r"asks for foreign_code\.Net"):
        load(path, allow=ALLOW)
    assert not foreign.exists()
    assert isinstance(load(path, allow=(*ALLOW, "foreign_code")), Model)


def test_functions_are_imported_from_allowed_packages_only(checkpoint: Path, foreign: Path):
    """A network may be a function that makes it; naming one must not import its module either."""
    with pytest.raises(ValueError, match=r"asks for foreign_code\.make"):
        load(edited(checkpoint, network="foreign_code.make"), allow=ALLOW)
    assert not foreign.exists()


def test_limits_of_imports_end_with_the_loading(checkpoint: Path):
    from jsonargparse import ArgumentParser

    load(checkpoint, allow=ALLOW)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--kind", type=type[torch.nn.Module])
    assert parser.parse_args(["--kind=tests.callbacks.tiny.Tiny"]).kind.__name__ == "Tiny"


@pytest.mark.parametrize(
    ("class_path", "reason"),
    [("tests.io.models.Gone", "cannot be imported"), ("tests.io.gone.Model", "cannot be imported"),
     ("tests.io.models.Net", "no LightningModule")],
)  # fmt: skip
def test_class_that_is_not_there_is_named(checkpoint: Path, class_path: str, reason: str):
    with pytest.raises(ValueError, match=f"{class_path}, which .*{reason}|{reason}"):
        load(edited(checkpoint, _class_path=class_path), allow=("tests.io",))


def test_files_are_no_imports():
    """A name whose first part is no module cannot be imported; a stored path may look like one."""
    assert foreign_name({"classifier": "classifier.ckpt", "path": "last.ckpt"}) is None
    assert foreign_name({"network": "os.system"}) == "os.system"
