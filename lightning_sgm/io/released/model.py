"""What every source of released weights ends in: a recipe's model with weights, written as a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from torch import Tensor

from lightning_sgm import codecs, networks, objectives, processes, samplers  # noqa: F401  (short class names in recipes)
from lightning_sgm.io.checkpoint import AtomicCheckpointIO, read_file
from lightning_sgm.io.folders import INSTANTIATOR
from lightning_sgm.io.tensors import read_safetensors
from lightning_sgm.methods.base import GenerativeModule

State = dict[str, Tensor]


class Imported(NamedTuple):
    """A released model in the terms of this package.

    Attributes:
        model: section of a recipe, with the data's ``spec`` among its ``init_args``.
        data: section of a recipe; None where nobody knows the user's copy of the data.
        weights: those to judge and to sample with, by their names in the method.
        raw: the trained parameters before averaging, to go on training from; empty if they were not released.
        updates: how often the average was moved.
        about: what the user is told, one line each.
    """

    model: dict[str, Any]
    data: dict[str, Any] | None
    weights: State
    raw: State
    updates: int
    about: list[str]


def image_spec(channels: int, side: int, levels: int = 256) -> dict[str, Any]:
    """What a DataModule would tell a model about square images in [-1, 1] without classes."""
    return {
        "kind": "image",
        "shape": [channels, side, side],
        "classes": 0,
        "levels": levels,
        "range": [-1.0, 1.0],
        "sigma_data": None,
        "dequantized": False,
    }


def with_spec(model: Mapping[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """A recipe's model section with the ``spec`` that it otherwise has from the data."""
    return {**model, "init_args": {**model["init_args"], "spec": spec}}


class Differences(NamedTuple):
    """Entries of a state dict that are not as a network wants them."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(map(len, self))

    def __str__(self) -> str:
        """The first few of each kind."""
        kinds = zip(("missing", "unexpected", "of another shape"), self, strict=True)
        return "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in kinds
            if names
        )


def differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Differences:
    """How the entries of ``found`` differ from those ``wanted``."""
    return Differences(
        [name for name in wanted if name not in found],
        [name for name in found if name not in wanted],
        [
            f"{name} {list(found[name].shape)} for {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tensor.shape
        ],
    )


def read_tensors(files: Sequence[Path], kind: str) -> State:
    """The tensors by name in the first of ``files`` that exists: a .safetensors file, or one of ``torch.save``.

    Args:
        files: where they may be.
        kind: what they are, for messages: "weights of a diffusers model".

    Raises:
        FileNotFoundError: none exists.
        ValueError: it is damaged or holds something else.
    """
    file = next((file for file in files if file.is_file()), files[0])
    if file.suffix == ".safetensors":
        return read_safetensors(file, kind)
    found = read_file(file, kind, map_location="cpu", mmap=True)
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{file} is not {kind}: it holds no tensors by name")
    return found


def build(model: dict[str, Any]) -> LightningModule:
    """The method of a recipe's model section, with the hyper-parameters that the command line would store.

    Raises:
        ValueError: a class or an argument does not exist, or does not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GenerativeModule, "model", fail_untyped=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jsonargparse announces names of its version 5
        try:
            parsed = parser.parse_object({"model": model})
        except ArgumentError as error:
            raise ValueError(str(error)) from error
        stored = yaml.safe_load(parser.dump(parsed, skip_none=False))["model"]
        arguments = {"_class_path": stored["class_path"], **stored["init_args"]}
        with _given_hyperparameters_context(arguments, INSTANTIATOR):
            module = parser.instantiate_classes(parsed).model
    assert isinstance(module, LightningModule)
    return module


def save(imported: Imported, path: Path) -> LightningModule:
    """Write a checkpoint that load, test, predict and fit accept, and give the model in it.

    A fit from it is a new run: it starts at update 0, from the raw weights and with a fresh optimiser, and the average
    goes on where it was.

    Raises:
        ValueError: weights do not fit, or the file cannot be written.
    """
    module = build(imported.model)
    if (wrong := differences(module.state_dict(), imported.weights)).number:
        raise ValueError(f"the weights do not fit the model: {wrong}")
    module.load_state_dict(imported.weights)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        "callbacks": {"EMA": {"updates": imported.updates}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": dict(module.hparams),
    }
    if imported.raw:
        checkpoint["raw_state"] = {name: tensor for name, tensor in imported.raw.items() if name in trained}
    if imported.data is not None:
        stored = {"_class_path": imported.data["class_path"], **imported.data.get("init_args", {})}
        checkpoint["datamodule_hyper_parameters"] = {**stored, "_instantiator": INSTANTIATOR}
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return module.eval()
