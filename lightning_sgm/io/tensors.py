"""Files of named tensors and of settings that other programs read and write too: safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_safetensors(file: Path, kind: str) -> dict[str, Tensor]:
    """The tensors by name in a .safetensors file, on the CPU.

    Args:
        file: the file.
        kind: what they are, for messages: "weights of a diffusers model".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not {kind} or is damaged: {error}") from error


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name; those that share memory are stored one by one.

    Raises:
        OSError: no space left or the like.
    """
    stored: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.detach().clone() if place in places else tensor.detach().contiguous()
        places.add(place)
    try:
        save_file(stored, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error


def read_json(file: Path, wanted: str) -> dict[str, Any]:
    """The settings in a JSON file.

    Args:
        file: the file.
        wanted: what to do if there is none: "give the folder of a diffusers model".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: {wanted}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it holds no settings")
    return values
