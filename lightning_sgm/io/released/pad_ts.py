"""Weights of PaD-TS's code (Li et al. 2025, 2501.00910): ``OUTPUT/NAME_L/model_STEP.pt`` of a training run.

A file holds {"step", "model_state_dict", "opt_state_dict"} (pad_ts.md section 11). Sizes follow from the shapes of the
weights. It does not say how many heads and diffusion steps the model has, which a recipe does, nor in which range the
data were, which only those data tell.
"""

from __future__ import annotations

import re
import warnings
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.series import SeriesDataModule
from lightning_sgm.io.checkpoint import read_file
from lightning_sgm.io.released.configurations import network_class
from lightning_sgm.io.released.model import Imported, State, differences, with_spec
from lightning_sgm.networks import DualChannel
from lightning_sgm.recipes import content

_KIND = "a checkpoint of PaD-TS's code"
_POSITIONS, _INPUT = "time2emb.pos_emb.pe", "time2emb.processing.0.weight"
_UNUSED = "feature2emb.pos_emb.pe"  # registered, but no line of theirs reads it
# Their data are scaled by the range of the whole series, and nothing is held out.
_THEIRS = {"scaling": "minmax", "log": False, "val_fraction": 0.0, "test_fraction": 0.0}
_RECIPES = {(128, 5): "sines", (256, 14): "mujoco", (256, 50): "fmri"}  # by width and dimensions
_STACKS = ("encoder", "blocks")  # of each channel, before and behind the noise level
_SHOWN = 6  # columns told to the user


class _Sizes(NamedTuple):
    """What the shapes of weights say."""

    length: int
    dims: int
    width: int
    encoders: int
    blocks: int

    @property
    def network(self) -> dict[str, int]:
        """Those that are arguments of ``DualChannel``."""
        return {"width": self.width, "encoders": self.encoders, "blocks": self.blocks}


def import_pad_ts(path: Path, model: str | None = None, data: str | None = None) -> Imported:
    """The weights of a file of a training run, with the range of the data they were trained on.

    Args:
        path: the file.
        model: a recipe for heads, diffusion steps, and what is not about weights; by default that of the paper with
            this width and number of dimensions. Its section ``data`` says what ``data`` leaves open, such as columns.
        data: a .csv, .npy or .npz file with the data of the training, or any with the same columns and their smallest
            and largest values; or "sines" for the generated waves, whose range is known. None: as the recipe says.

    Raises:
        FileNotFoundError: there is no such file or recipe.
        ValueError: the file is damaged or something else, does not fit the recipe or the data, or there are no data.
    """
    step, weights = _read(path)
    sizes = _sizes(weights, path)
    name = model or _usual_recipe(sizes)
    values = content(name)
    arguments = _model_arguments(values, name)
    network = _network(arguments, sizes, path, model)
    section, module = _data(values if model else {}, data, sizes, path)
    arguments["network"] = {"class_path": "DualChannel", "init_args": network}
    state = _checked(weights, sizes, network, path)
    steps = _steps(arguments)
    about = [
        f"read: {path}, step {step:,}, weights as training left them: the authors keep no average",
        f"model: PaD-TS as in {name}, {sizes.length} time steps of {sizes.dims} dimensions, width {sizes.width}, "
        f"{sizes.encoders} encoder and {sizes.blocks} DiT blocks per channel, {network['heads']} heads, {steps} "
        f"diffusion steps, {sum(tensor.numel() for tensor in state.values()):,} parameters",
        f"range: {_range(module)}",
    ]
    if model is None:
        about.append(
            f"assumed, as the file does not say: {network['heads']} heads and {steps} diffusion steps; if they were "
            "others, add --model with a recipe that says so"
        )
    if _UNUSED in weights:
        about.append(f"left out: {_UNUSED}, which their network does not use")
    named = {f"network.{key}": tensor for key, tensor in state.items()}
    return Imported(with_spec(values["model"], module.spec), section, named, {}, 0, about)


def _read(path: Path) -> tuple[int, State]:
    """Number of updates, and weights by their names in one process."""
    held = read_file(path, _KIND, map_location="cpu", mmap=True)
    if missing := [key for key in ("step", "model_state_dict") if not isinstance(held, dict) or key not in held]:
        raise ValueError(f"{path} is not {_KIND}: it has no {' and no '.join(missing)}")
    state, step = held["model_state_dict"], held["step"]
    whole = isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values())
    if not whole or not isinstance(step, int):
        raise ValueError(f"{path} is not {_KIND}: step must be a number, and model_state_dict hold tensors by name")
    return step, {str(key).removeprefix("module."): tensor for key, tensor in state.items()}


def _sizes(weights: State, path: Path) -> _Sizes:
    positions, first = weights.get(_POSITIONS), weights.get(_INPUT)
    if positions is None or first is None or positions.ndim != 3 or first.ndim != 2:
        raise ValueError(f"{path} holds no weights of PaD-TS: it has no {_POSITIONS} (1, L, H) and {_INPUT} (H, D)")
    return _Sizes(positions.shape[1], first.shape[1], len(first), *(_count(weights, part) for part in _STACKS))


def _count(weights: State, part: str) -> int:
    """Blocks of the stacks called ``part``, of the channel that has more; the other then lacks some."""
    pattern = re.compile(rf"(?:time|feature)_{part}\.encoder_blocks\.(\d+)\.")
    return 1 + max((int(match.group(1)) for key in weights if (match := pattern.match(key))), default=-1)


def _usual_recipe(sizes: _Sizes) -> str:
    """The paper's recipe with this width and number of dimensions, else one with this width."""
    usual = "energy" if sizes.width == 256 else "stocks"
    return f"paper/pad_ts_{_RECIPES.get((sizes.width, sizes.dims), usual)}"


def _model_arguments(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a recipe's model, which must be theirs: x_0 of the windows themselves from the index of a chain.

    Raises:
        ValueError: another method, network or preconditioning.
    """
    if str(values.get("model", {}).get("class_path")).rpartition(".")[2] != "PaDTS":
        raise ValueError(f"{name} is no recipe of PaDTS: give one such as paper/pad_ts_stocks")
    arguments: dict[str, Any] = values["model"].setdefault("init_args", {})
    if network_class(values) not in ("", "DualChannel"):
        raise ValueError(f"weights of PaD-TS fit a DualChannel, but the network of {name} is {network_class(values)}")
    if arguments.get("preconditioning") is not None:
        raise ValueError(
            f"weights of PaD-TS tell x_0 from the index of a chain, but {name} has a preconditioning: give a recipe "
            "without"
        )
    return arguments


def _network(arguments: dict[str, Any], sizes: _Sizes, path: Path, model: str | None) -> dict[str, Any]:
    """Arguments of the network: sizes of the weights, which a recipe of the user's must not contradict, and its others.

    Raises:
        ValueError: the recipe is of another size.
    """
    network, own = arguments.get("network"), sizes.network
    given = dict(network.get("init_args") or {}) if isinstance(network, dict) else {}
    wrong = [f"{key} {own[key]}, not {given[key]}" for key in own if key in given and given[key] != own[key]]
    if model and wrong:
        raise ValueError(f"the weights of {path} are not those of {model}: they have {', '.join(wrong)}")
    return {"heads": signature(DualChannel).parameters["heads"].default, **given, **own}


def _steps(arguments: dict[str, Any]) -> int:
    """Diffusion steps of the recipe's chain."""
    process = arguments.get("process")
    return int((process.get("init_args") or {}).get("steps", 250)) if isinstance(process, dict) else 250


def _checked(weights: State, sizes: _Sizes, network: dict[str, Any], path: Path) -> State:
    """The network's entries in float32.

    Raises:
        ValueError: entries are missing, unexpected, of another shape, or no numbers with a fraction.
    """
    found = {key: tensor for key, tensor in weights.items() if key != _UNUSED}
    with torch.device("meta"):
        wanted = DualChannel({"shape": [sizes.length, sizes.dims]}, **network).state_dict()
    if (wrong := differences(wanted, found)).number:
        raise ValueError(f"{path} holds no weights of PaD-TS: {wrong} among the entries")
    if whole := [key for key, tensor in found.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{path} holds no weights of PaD-TS: {whole[0]} holds {found[whole[0]].dtype}")
    return {key: tensor.float() for key, tensor in found.items()}


def _data(
    values: dict[str, Any], data: str | None, sizes: _Sizes, path: Path
) -> tuple[dict[str, Any], SeriesDataModule]:
    """A recipe's data section for the data of the training, and these data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing says what the data are, they cannot be read, or have another number of columns.
    """
    given = dict(values.get("data", {}).get("init_args") or {})
    if data is None and not given:
        raise ValueError(
            f"{path} does not say in which range its data were: add --data FILE, the .csv, .npy or .npz file of the "
            "training, or --data sines for the generated waves"
        )
    chosen: dict[str, Any] = {}
    if data == "sines":
        chosen = {"path": None, "dataset": "sines", "dims": sizes.dims}
    elif data is not None:
        chosen = {"path": str(Path(data).absolute())}
    arguments = {**given, **chosen, **_THEIRS, "length": sizes.length}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "val_fraction and test_fraction are 0")  # as in the training
            module = SeriesDataModule(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} (options of the data belong into a recipe, given by --model)") from error
    if len(module.columns) != sizes.dims:
        raise ValueError(
            f"{data or 'the data'} has {len(module.columns)} columns ({', '.join(module.columns[:_SHOWN])}"
            f"{', ...' if len(module.columns) > _SHOWN else ''}), but the weights of {path} are of {sizes.dims} "
            "dimensions: give the file of the training, or name its columns in a recipe, given by --model"
        )
    return {"class_path": "SeriesDataModule", "init_args": arguments}, module


def _range(module: SeriesDataModule) -> str:
    """The first few columns with their smallest and largest values."""
    low, high = module.scaling.spec["low"], module.scaling.spec["high"]
    parts = [f"{name} {a:g} to {b:g}" for name, a, b in zip(module.columns, low, high, strict=True)]
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return f"{', '.join(parts[:_SHOWN])}{more}; the order of the columns must be that of the training"
