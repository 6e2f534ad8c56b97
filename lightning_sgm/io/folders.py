"""Folders that ``export`` wrote, read as the checkpoints they were made of: model.safetensors and config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning

from lightning_sgm.io.tensors import read_json, read_safetensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"
OWN = "lightning_sgm"
"""Entry of config.json that is ours; others may stand beside it, for other programs."""
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What Lightning's command line leaves in the arguments of a model made of class paths and plain values."""


def read_folder(folder: Path) -> dict[str, Any]:
    """The checkpoint that a folder was exported from, without what only its training needs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the folder was written by another program.
    """
    own = read_json(folder / CONFIG, "give a checkpoint, or a folder that `export` wrote").get(OWN)
    if own is None:
        raise ValueError(
            f"{folder} was not written by `export`: its {CONFIG} has no entry {OWN}. Weights of other programs become "
            "a checkpoint by `python -m lightning_sgm import`"
        )
    weights = read_safetensors(folder / WEIGHTS, "weights that `export` wrote")
    try:
        prefix, added = str(own["prefix"]), set(own["added"])
        arguments = _arguments(own["model"])
        checkpoint: dict[str, Any] = {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": lightning.__version__,
            "state_dict": {f"{prefix}{name}": tensor for name, tensor in weights.items() if name not in added},
            "callbacks": {"EMA": {"updates": int(own["updates"])}},
            "optimizer_states": [],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": arguments,
        }
        if own["data"] is not None:
            checkpoint["datamodule_hyper_parameters"] = _arguments(own["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: its entry {OWN} is not as `export` writes it") from error
    return checkpoint


def _arguments(section: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments as Lightning stores them in a checkpoint."""
    arguments = {**section["init_args"], "_class_path": section["class_path"]}
    return {**arguments, "_instantiator": INSTANTIATOR} if section["from_recipe"] else arguments
