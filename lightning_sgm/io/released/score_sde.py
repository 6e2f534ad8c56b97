"""Checkpoints of Song et al.'s PyTorch code (2011.13456): ``{"optimizer", "model", "ema", "step"}`` in a .pth file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_sgm.io.checkpoint import read_file
from lightning_sgm.io.released.configurations import CONFIGURATIONS, named, network_class, side
from lightning_sgm.io.released.hub import import_folder
from lightning_sgm.io.released.model import Differences, Imported, State, differences, image_spec, with_spec
from lightning_sgm.networks import DDPM, NCSNpp
from lightning_sgm.networks.base import Network

_KIND = "a checkpoint of the score SDE code"
_FREQUENCIES = "all_modules.0.W"
_NETWORKS: dict[str, type[Network]] = {kind.__name__: kind for kind in (NCSNpp, DDPM)}


class Released(NamedTuple):
    """What is used of a released file.

    Attributes:
        raw: the network's entries by name, fixed Fourier frequencies included.
        averaged: the same with the averaged weights.
        sigmas: noise levels of the discrete chain for images in [0, 1], descending; None if not stored.
        decay: of the average.
        updates: of the average.
        step: updates of the weights.
    """

    raw: State
    averaged: State
    sigmas: Tensor | None
    decay: float
    updates: int
    step: int


def import_score_sde(path: Path, model: str | None = None) -> Imported:
    """The averaged weights of a .pth file, or a diffusers folder, with the model's process and sampler.

    Args:
        path: the file or folder.
        model: a name in ``CONFIGURATIONS`` or a recipe of the model; None to find it from the weights.

    Raises:
        FileNotFoundError: no such file or recipe.
        ValueError: the file is damaged, is something else, is of another model, or could be of several.
    """
    if path.is_dir():
        return import_folder(path, model)
    released = read(path)
    names = [model] if model else identify(released, path)
    name, values = names[0], named(names[0])
    _check(released, name, values, path)
    spec = _spec(values, released.raw, name)
    network = values["model"]["init_args"]["network"]
    return Imported(
        model=with_spec(values["model"], spec),
        data=values.get("data"),
        weights={f"network.{key}": tensor for key, tensor in released.averaged.items()},
        raw={f"network.{key}": tensor for key, tensor in released.raw.items() if key != _FREQUENCIES},
        updates=released.updates,
        about=[
            f"read: {path}, step {released.step:,}, average of decay {released.decay:g}",
            f"model: {' or '.join(names)}, {network['class_path']} for images {' x '.join(map(str, spec['shape']))}, "
            f"{sum(tensor.numel() for tensor in released.raw.values()):,} parameters",
        ],
    )


def read(path: Path) -> Released:
    """The weights of a released file, mapped from it.

    The average is a nameless list in the order of the network's entries; what was never trained is not in it.

    Raises:
        FileNotFoundError, ValueError: as :func:`import_score_sde`.
    """
    # Their learning rate is a number of numpy, stored under the name of numpy 1 or 2.
    scalar = np.float64(0.0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    found = read_file(path, _KIND, [*names, np.dtype, np.dtypes.Float64DType], map_location="cpu", mmap=True)
    if missing := [key for key in ("model", "ema", "step") if not isinstance(found, dict) or key not in found]:
        raise ValueError(f"{path} is not {_KIND}: it has no {' and no '.join(missing)}")
    try:
        model = {key.removeprefix("module."): tensor for key, tensor in found["model"].items()}
        sigmas = model.pop("sigmas", None)
        averaged = _averaged(model, found["ema"]["shadow_params"], path)
        numbers = float(found["ema"]["decay"]), int(found["ema"]["num_updates"] or 0), int(found["step"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not {_KIND}: its model or ema is not as they write them") from error
    return Released(model, averaged, sigmas, *numbers)


def identify(released: Released, path: Path) -> list[str]:
    """The configurations that a file can be of, all of the same settings.

    The shapes tell the network, the noise levels the VE models of one network, the decay of the average VE from VP.

    Raises:
        ValueError: there is none, or several of different settings.
    """
    unlike = _unlike(released.raw)
    same = [name for name in CONFIGURATIONS if not unlike[name].number]
    if not same:
        nearest = min(unlike, key=lambda name: unlike[name].number)
        raise ValueError(
            f"{path} is none of the released models. The nearest is {nearest}, but among the entries are "
            f"{unlike[nearest]}. If it was trained with other settings, write a recipe of it and add --model my.yaml"
        )
    values = {name: named(name) for name in same}
    likely = [
        name
        for name in same
        if values[name]["ema"]["decay"] == released.decay and not _other_noise(released, values[name])
    ]
    settings = {json.dumps({**values[name], "data": None}, sort_keys=True) for name in likely}
    if len(settings) != 1:
        raise ValueError(
            f"the weights in {path} do not tell which model they are of: add --model with one of "
            f"{', '.join(likely or same)}" + ("" if likely else ", or a recipe, as the noise or the average is of none")
        )
    return likely


def _averaged(model: State, shadow: Iterable[Tensor], path: Path) -> State:
    """The average under the names of the weights."""
    names, shadow = [name for name in model if name != _FREQUENCIES], list(shadow)
    if [tensor.shape for tensor in shadow] != [model[name].shape for name in names]:
        raise ValueError(f"{path} is not {_KIND}: the average has other shapes than the {len(names)} trained weights")
    return {**model, **dict(zip(names, shadow, strict=True))}


def _unlike(state: State) -> dict[str, Differences]:
    """For each configuration, how its network differs from these entries."""
    told: dict[str, Differences] = {}
    by_network: dict[str, Differences] = {}
    for name in CONFIGURATIONS:
        values = named(name)
        part = values["model"]["init_args"]["network"]
        key = json.dumps([part, side(name, values)], sort_keys=True)
        if key not in by_network:
            by_network[key] = _difference(values, state, name)
        told[name] = by_network[key]
    return told


def _difference(values: dict[str, Any], state: State, name: str) -> Differences:
    part = values["model"]["init_args"]["network"]
    with torch.device("meta"):
        network = _NETWORKS[network_class(values)](_spec(values, state, name), **part.get("init_args", {}))
    return differences(network.state_dict(), state)


def _check(released: Released, name: str, values: dict[str, Any], path: Path) -> None:
    """Refuse weights of another model than the one named."""
    if (wrong := _difference(values, released.raw, name)).number:
        raise ValueError(f"{path} is not {name}: {wrong} among its entries")
    if other := _other_noise(released, values):
        raise ValueError(f"{path} is not {name}: {other}")


def _other_noise(released: Released, values: dict[str, Any]) -> str:
    """What is wrong about the stored noise levels; VP models store some but use none."""
    process = values["model"]["init_args"].get("process", {})
    wanted = process.get("init_args", {}) if isinstance(process, dict) else {}
    if released.sigmas is None:
        return ""
    found = {"sigma_max": 2 * float(released.sigmas[0]), "sigma_min": 2 * float(released.sigmas[-1])}
    wrong = [
        f"{key} is {found[key]:g}, not {float(wanted[key]):g}"
        for key in found
        if key in wanted and not np.isclose(found[key], float(wanted[key]), rtol=1e-3)
    ]
    return f"for images in [-1, 1] its {' and its '.join(wrong)}" if wrong else ""


def _spec(values: dict[str, Any], state: State, name: str) -> dict[str, Any]:
    """The data's spec: channels from the convolution behind the label's two linear layers, the side from the recipe."""
    first = state.get(f"all_modules.{3 if _FREQUENCIES in state else 2}.weight")
    channels = 3 if first is None or first.ndim != 4 else first.shape[1]
    levels = 17 if values.get("data", {}).get("init_args", {}).get("dataset") == "digits" else 256
    return image_spec(channels, side(name, values), levels)
