"""Weights of MDLM (Sahoo et al. 2024, 2406.07524): hub folders such as kuleshov-group/mdlm-owt, and its checkpoints.

Its network takes the noise level sigma, but without time conditioning it is always given 0. Then everything that
depends on sigma is a constant, which goes into the other weights, and what remains is the network of RADD: the
modulation of a LayerNorm into its weight and bias, the gate behind a layer into the rows of that layer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sgm.io.checkpoint import read_file
from lightning_sgm.io.released.model import Imported, State, read_tensors
from lightning_sgm.io.released.radd import with_average
from lightning_sgm.io.released.text_models import FREQUENCIES, Found, Settings, nested_settings, text_model
from lightning_sgm.io.tensors import read_json

_KIND = "weights of MDLM"
# Where the classes of the settings and the tokenizer in a training checkpoint come from: read as inert stand-ins.
_SETTINGS_OF = ("omegaconf", "transformers", "tokenizers", "typing", "collections", "pathlib", "lightning")
_PLAIN = {f"builtins.{name}" for name in ("dict", "list", "tuple", "set", "str", "int", "float", "bool", "object")}


def import_mdlm(path: Path, model: str | None = None) -> Imported:
    """The weights of a hub folder, or of a checkpoint of the training code, folded into the network of RADD.

    Args:
        path: a folder with config.json and model.safetensors or pytorch_model.bin, such a file, or a .ckpt file.
        model: a recipe for what the files do not tell.

    Raises:
        FileNotFoundError: a file is missing, or there is no such recipe.
        ValueError: the files are damaged or something else, or the network depends on the time.
    """
    if path.suffix in (".safetensors", ".bin"):
        path = path.parent  # where the settings are
    found = _hub(path) if path.is_dir() else _checkpoint(path)
    weights, raw = (_fold(state, path) if state else {} for state in (found.weights, found.raw))
    return text_model(found._replace(weights=weights, raw=raw), model)


def _hub(folder: Path) -> Found:
    file = folder / "config.json"
    config = read_json(file, "give the folder of a model of MDLM")
    if config.get("model_type") != "mdlm":
        raise ValueError(f"{file} is of a model of type {config.get('model_type')!r}, not 'mdlm'")
    _refuse_time(config.get("time_conditioning", False), folder)
    try:
        settings = Settings(
            vocabulary=int(config["vocab_size"]) - 1,
            length=int(config["model_length"]),
            network={
                "width": int(config["hidden_dim"]),
                "blocks": int(config["n_blocks"]),
                "heads": int(config["n_heads"]),
                "dropout": float(config["dropout"]),
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged or not of MDLM: {error}") from error
    weights = read_tensors([folder / "model.safetensors", folder / "pytorch_model.bin"], _KIND)
    about = f"read: {folder}, the only weights in it are taken for averaged ones; folded at sigma 0"
    return Found(folder, _backbone(weights), {}, 0, settings, about)


def _checkpoint(path: Path) -> Found:
    """A checkpoint of the training: Lightning's, with the average and the whole configuration in it."""
    kind = "a checkpoint of MDLM's code"
    held = read_file(path, kind, _stand_ins(path), map_location="cpu", mmap=True)
    try:
        raw = _backbone(held["state_dict"])
        config = _plain(held["hyper_parameters"]["config"])
        network, parameterization = config["backbone"], config["parameterization"]
        conditioning, step = config["time_conditioning"], int(held["global_step"])
        ema = held.get("ema") or {"shadow_params": None, "num_updates": 0, "decay": 0.0}  # it can be switched off
        shadow, updates, decay = ema["shadow_params"], int(ema["num_updates"] or 0), float(ema["decay"])
        tokenizer = str(config["data"]["tokenizer_name_or_path"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not {kind}: it has no weights or no configuration as they write them") from error
    if (parameterization, network) != ("subs", "dit"):
        raise ValueError(
            f"{path} is of a {network} with {parameterization} parameterization; only a dit with subs, whose answer "
            "does not depend on the time t, can be imported"
        )
    _refuse_time(conditioning, path)
    if not tokenizer.startswith("gpt2"):
        raise ValueError(
            f"{path} has the tokens of {tokenizer}, whose mask is not the last one; only those of gpt2 can be imported"
        )
    settings = nested_settings(config, path)
    if shadow is None:
        return Found(path, raw, {}, 0, settings, f"read: {path}, step {step:,}, without an average; folded at sigma 0")
    about = f"read: {path}, step {step:,}, average of decay {decay:g}; folded at sigma 0"
    return Found(path, with_average(raw, shadow, path), raw, updates, settings, about)


def _refuse_time(conditioning: Any, path: Path) -> None:
    if conditioning:
        raise ValueError(
            f"{path} was trained with time conditioning, so its network depends on the time t and cannot become the "
            "time-free network of RADD; MDLM's default, time_conditioning: False, can be imported"
        )


def _backbone(weights: State) -> State:
    return {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}


# Configuration and tokenizer stand in a checkpoint as pickled objects. Nothing of them is run or even imported: every
# such class is read as one that only keeps what it is given.


class _StandIn:
    """Takes the place of an object in a file and keeps its state."""

    state: Any = None

    def __new__(cls, *arguments: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty(*arguments: Any) -> dict[Any, Any]:
    """In place of ``collections.defaultdict``, whose entries are then set."""
    return {}


def _stand_ins(path: Path) -> list[tuple[Any, str]]:
    """A stand-in for each class in the file that a configuration or a tokenizer can be made of."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever is wrong with the file is said when it is read
        return []
    known = [name for name in names if name in _PLAIN or name.partition(".")[0] in _SETTINGS_OF]
    return [(_empty if name == "collections.defaultdict" else _StandIn, name) for name in known]


def _plain(held: Any) -> Any:
    """The plain values in a pickled configuration of omegaconf: nodes hold theirs as ``_content`` or ``_val``."""
    state = held.state if isinstance(held, _StandIn) else held
    if isinstance(held, _StandIn) and isinstance(state, dict):
        return _plain(state.get("_content", state.get("_val")))
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return [_plain(value) for value in state] if isinstance(state, list) else state


def _fold(state: State, path: Path) -> State:
    """The same function without sigma, which is 0; computed in float64.

    Raises:
        ValueError: an entry that belongs to the time is missing or of another shape.
    """
    rest = {name: tensor.double() for name, tensor in state.items() if name != FREQUENCIES}
    try:
        constant = _condition(rest)
        for block in sorted({match.group() for name in rest if (match := re.match(r"blocks\.\d+\.", name))}):
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(rest, block, constant).chunk(6)
            _modulate(rest, f"{block}norm1", shift, scale)
            _modulate(rest, f"{block}norm2", shift_mlp, scale_mlp)
            rest[f"{block}attn_out.weight"] = rest[f"{block}attn_out.weight"] * gate[:, None]
            rest[f"{block}mlp.2.weight"] = rest[f"{block}mlp.2.weight"] * gate_mlp[:, None]
            rest[f"{block}mlp.2.bias"] = rest[f"{block}mlp.2.bias"] * gate_mlp
        shift, scale = _modulation(rest, "output_layer.", constant).chunk(2)
        _modulate(rest, "output_layer.norm_final", shift, scale)
    except (KeyError, RuntimeError, ValueError) as error:
        what = f"there is no {error.args[0]}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ValueError(f"the weights of {path} are not those of MDLM's transformer: {what}") from error
    kept = {FREQUENCIES: state[FREQUENCIES]} if FREQUENCIES in state else {}
    return {**{name: tensor.float() for name, tensor in rest.items()}, **kept}


def _condition(rest: State) -> Tensor:
    """SiLU(sigma_map(0)), (width of the condition,): the embedding of 0 is a cosine half of ones, a sine half of 0.

    Its layers are taken out of ``rest``, as are those of :func:`_modulation`.
    """
    first = rest.pop("sigma_map.mlp.0.weight")
    embedding = torch.zeros(first.shape[1], dtype=torch.float64)
    embedding[: first.shape[1] // 2] = 1.0
    hidden = F.silu(F.linear(embedding, first, rest.pop("sigma_map.mlp.0.bias")))
    return F.silu(F.linear(hidden, rest.pop("sigma_map.mlp.2.weight"), rest.pop("sigma_map.mlp.2.bias")))


def _modulation(rest: State, part: str, constant: Tensor) -> Tensor:
    name = f"{part}adaLN_modulation"
    return F.linear(constant, rest.pop(f"{name}.weight"), rest.pop(f"{name}.bias"))


def _modulate(rest: State, norm: str, shift: Tensor, scale: Tensor) -> None:
    """The LayerNorm, which has no bias, followed by x (1 + scale) + shift."""
    if f"{norm}.bias" in rest:
        raise ValueError(f"{norm} has a bias")
    rest[f"{norm}.weight"] = rest[f"{norm}.weight"] * (1.0 + scale)
    rest[f"{norm}.bias"] = shift
