"""Models as folders for others: averaged weights as safetensors, and what the model is as JSON."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_sgm import __version__
from lightning_sgm.io.checkpoint import load, read_checkpoint
from lightning_sgm.io.folders import CONFIG, OWN, WEIGHTS
from lightning_sgm.io.tensors import write_safetensors
from lightning_sgm.methods.base import GenerativeModule

_RADD_NETWORK = "lightning_sgm.networks.masked_transformer.MaskedTransformer"


class Layout(NamedTuple):
    """How the files look to other programs.

    Attributes:
        prefix: of the weights' names in our model, left out in the file.
        added: tensors that only the other program wants.
        config: entries of config.json for it.
    """

    prefix: str = ""
    added: dict[str, Tensor] = {}
    config: dict[str, Any] = {}


def export(
    checkpoint: str | Path, folder: str | Path, allow: tuple[str, ...] = (), **overrides: Any
) -> LightningModule:
    """Write the model of a checkpoint as a folder, whole or not at all.

    ``model.safetensors`` holds the averaged weights, which evaluation uses; ``config.json`` the classes and arguments
    of model and data. ``lightning_sgm.load`` and ``from_pretrained`` read the folder back bit by bit. A model with a
    ``MaskedTransformer`` gets the names and settings of the released models of RADD, whose code reads it too. Of a
    distillation the student is written, as a model of its own class which samples in its few steps: no teacher, no
    critics. Weights that a codec finds itself are left out, as in checkpoints.

    Args:
        checkpoint: file of this package, or another such folder.
        folder: to write; must not exist.
        allow, overrides: as :func:`lightning_sgm.load`; the folder does not hold the overrides.

    Returns:
        The model that was written.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the folder exists or cannot be written; the checkpoint cannot be loaded or holds arguments that are
            no plain values.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it or choose another folder")
    loaded, held = load(checkpoint, allow, **overrides), read_checkpoint(checkpoint)
    module, arguments = loaded, held["hyper_parameters"]
    left_out: tuple[str, ...] = ()
    if isinstance(loaded, GenerativeModule):
        module = loaded.exported()
        left_out = module.unsaved
    if module is not loaded:
        arguments = dict(module.hparams)
    layout = _radd(module) or Layout()
    own = {
        "version": __version__,
        "model": _section(arguments, "model"),
        "data": _section(held["datamodule_hyper_parameters"], "data")
        if "datamodule_hyper_parameters" in held
        else None,
        "updates": int(held.get("callbacks", {}).get("EMA", {}).get("updates", 0)),
        "prefix": layout.prefix,
        "added": sorted(layout.added),
    }
    text = json.dumps({**layout.config, OWN: own}, indent=2, ensure_ascii=False) + "\n"
    kept = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(left_out)}
    weights = {name.removeprefix(layout.prefix): tensor for name, tensor in kept.items()}
    with _whole(folder) as place:
        write_safetensors(place / WEIGHTS, {**weights, **layout.added})
        (place / CONFIG).write_text(text, encoding="utf-8")
    return module.eval()


def _section(stored: dict[str, Any], name: str) -> dict[str, Any]:
    """Class and arguments from a checkpoint as plain values."""
    arguments = {key: _plain(value, f"{name}.{key}") for key, value in stored.items() if not key.startswith("_")}
    return {
        "class_path": str(stored.get("_class_path", "")),
        "init_args": arguments,
        "from_recipe": "_instantiator" in stored,
    }


def _plain(value: Any, name: str) -> Any:
    """``value`` as JSON has it, with lists for tuples."""
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(
        f"{name} is a {type(value).__name__}, which {CONFIG} cannot hold: only plain values can be exported"
    )


def _radd(module: LightningModule) -> Layout | None:
    """The layout of RADD's released models, if that is the network; their buffer of rotary frequencies is added."""
    network: Any = getattr(module, "network", None)
    kind = type(network)
    others = [name for name in module.state_dict() if not name.startswith("network.")]
    if f"{kind.__module__}.{kind.__qualname__}" != _RADD_NETWORK or others:
        return None
    model: Any = module
    width, head_width = network.vocab_embed.embedding.shape[1], network.rotary_emb.head_width
    config = {
        "tokens": network.vocabulary,
        "model": {
            "type": "ddit_wot",
            "hidden_size": width,
            "length": model.spec["length"],
            "n_blocks": len(network.blocks),
            "n_heads": width // head_width,
            "dropout": network.blocks[0].dropout,
            "use_checkpoint": False,
            "dtype": "float16",  # of their sampler's buffer, which must be the network's
        },
        "noise": _noise(getattr(getattr(model, "process", None), "schedule", None)),
    }
    return Layout("network.", {"rotary_emb.inv_freq": rotary_frequencies(head_width)}, config)


def rotary_frequencies(head_width: int) -> Tensor:
    """The buffer ``rotary_emb.inv_freq`` of RADD's code, (head_width / 2,) float32: 10000^(-2j / head_width)."""
    return 1.0 / 10_000 ** (torch.arange(0, head_width, 2).float() / head_width)


def _noise(schedule: Any) -> dict[str, Any]:
    """Their name of a schedule; for one they lack, their default, as the network does not depend on it."""
    if type(schedule).__name__ == "Geometric":
        return {"type": "geometric", "sigma_min": schedule.a, "sigma_max": schedule.b}
    return {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20.0}


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A hidden folder to write files into, which gets its name only when the block ends without an error."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        os.rename(temporary, folder)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
