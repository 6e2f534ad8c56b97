"""Weights of RADD's code (2406.03736): hub folders such as JingyangOu/radd-*, and checkpoints of its training runs.

A hub folder has model.safetensors and config.json, the nested configuration of the training. A run has
``checkpoints-meta/checkpoint.pth`` = {"optimizer", "model", "ema", "step"} and ``.hydra/config.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lightning_sgm.io.checkpoint import read_file
from lightning_sgm.io.released.model import Imported, State, read_tensors
from lightning_sgm.io.released.text_models import FREQUENCIES, Found, Settings, nested_settings, text_model
from lightning_sgm.io.tensors import read_json

_KIND = "weights of RADD"


def import_radd(path: Path, model: str | None = None) -> Imported:
    """The weights of a hub folder, of a run's folder, or of the file in one of them.

    Args:
        path: the folder or file; a configuration beside a file is read if it is there.
        model: a recipe for what the files do not tell.

    Raises:
        FileNotFoundError: there are no weights, or no such recipe.
        ValueError: the files are damaged, are something else, or do not tell enough about the model.
    """
    local = path / "checkpoints-meta" / "checkpoint.pth"
    if path.is_file() and path.suffix not in (".safetensors", ".bin"):
        local = path
    found = _run(local) if local.is_file() else _hub(path)
    if any(name.startswith("sigma_map.") for name in found.weights):
        raise ValueError(
            f"{path} holds a network with a time input (sigma_map), not RADD's: import MDLM with --source mdlm; the "
            "score of SEDD depends on the time t, so it cannot become this network"
        )
    return text_model(found, model)


def _hub(path: Path) -> Found:
    """Weights with no average beside them."""
    files = [path / "model.safetensors", path / "pytorch_model.bin"] if path.is_dir() else [path]
    weights = read_tensors(files, _KIND)
    config = (path if path.is_dir() else path.parent) / "config.json"
    settings = Settings()
    if path.is_dir() or config.is_file():
        values = read_json(config, "give the folder of a model of RADD")
        settings = nested_settings(values, config)._replace(spec=_own_spec(values))
    about = f"read: {path}, the only weights in it are taken for averaged ones"
    return Found(path, weights, {}, 0, settings, about)


def _own_spec(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the tokens are, where this package exported the folder."""
    own: Any = config
    for key in ("lightning_sgm", "model", "init_args", "spec"):
        own = own.get(key) if isinstance(own, dict) else None
    return own if isinstance(own, dict) else None


def _run(path: Path) -> Found:
    """A checkpoint of a training run: averaged weights to use, raw ones to go on from."""
    kind = "a checkpoint of RADD's code"
    held = read_file(path, kind, map_location="cpu", mmap=True)
    if missing := [key for key in ("model", "ema", "step") if not isinstance(held, dict) or key not in held]:
        raise ValueError(f"{path} is not {kind}: it has no {' and no '.join(missing)}")
    try:
        raw = {name.removeprefix("module."): tensor for name, tensor in held["model"].items()}
        averaged = with_average(raw, held["ema"]["shadow_params"], path)
        updates, step = int(held["ema"]["num_updates"] or 0), int(held["step"])
        decay = float(held["ema"]["decay"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not {kind}: its model or ema is not as they write them") from error
    about = f"read: {path}, step {step:,}, average of decay {decay:g}"
    return Found(path, averaged, raw, updates, _run_settings(path), about)


def _run_settings(path: Path) -> Settings:
    file = path.absolute().parent.parent / ".hydra" / "config.yaml"
    if not file.is_file():
        return Settings()
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: it is no YAML") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged: it holds no settings")
    return nested_settings(config, file)


def with_average(state: State, shadow: Iterable[Tensor], path: Path) -> State:
    """``state`` with the averages in place of its parameters.

    Averages are a nameless list in the order in which the parameters were registered, which is that of the state dict;
    buffers are not among them.

    Raises:
        ValueError: other shapes than those of the parameters.
    """
    names, shadow = [name for name in state if name != FREQUENCIES], list(shadow)
    if [tensor.shape for tensor in shadow] != [state[name].shape for name in names]:
        raise ValueError(f"{path} is damaged: its average has other shapes than its {len(names)} weights")
    return {**state, **dict(zip(names, shadow, strict=True))}
