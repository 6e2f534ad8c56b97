"""First stages of latent diffusion's code (Rombach et al. 2022, 2112.10752): VQ autoencoders, in diffusers' terms.

What they store is that of diffusers' ``VQModel`` under other names; the sizes are read off the shapes. That the two
compute the same was checked with the authors' own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sgm.codecs import Autoencoder
from lightning_sgm.io.checkpoint import read_file
from lightning_sgm.io.released.model import State, differences
from lightning_sgm.io.tensors import read_safetensors

KIND = "a VQ autoencoder of latent diffusion"
_CODEBOOK = "quantize.embedding.weight"
_GROUPS = 32  # of all their norms
_LAYERS = {"nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


class FirstStage(NamedTuple):
    """An autoencoder: constructor arguments and weights of diffusers' ``VQModel``."""

    config: dict[str, Any]
    weights: State

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return 1 << (len(self.config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.config["vq_embed_dim"])


def read_state(file: Path, kind: str) -> State:
    """The tensors by name in a .safetensors file, or one of ``torch.save`` with them or with a "state_dict" of them.

    What wrappers of data parallel and compiled modules put before the names is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or holds something else.
    """
    if file.suffix == ".safetensors":
        held: Any = read_safetensors(file, kind)
    else:
        held = read_file(file, kind, map_location="cpu", mmap=True)
        held = held["state_dict"] if isinstance(held, dict) and isinstance(held.get("state_dict"), dict) else held
    if not isinstance(held, dict) or not held or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise ValueError(f"{file} is not {kind}: it holds no tensors by name")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): tensor for name, tensor in held.items()}


def is_first_stage(names: Iterable[str]) -> bool:
    """Whether a file with entries of these names holds a VQ autoencoder."""
    return _CODEBOOK in names


def first_stage_of(state: State, file: Path) -> FirstStage:
    """The autoencoder of a file's entries; those of its training's losses are left out.

    Raises:
        ValueError: they are not those of a VQ autoencoder without attention outside of its middle.
    """
    theirs = {name: tensor for name, tensor in state.items() if not name.startswith(("loss.", "model_ema."))}
    try:
        config = _config(theirs)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{file} is not {KIND} or is damaged: it lacks {error}") from error
    levels = len(config["block_out_channels"])
    weights = {_renamed(name, levels): tensor.float() for name, tensor in theirs.items()}
    # Their attention is by convolutions of 1 x 1 pixels, which are linear layers.
    weights = {k: v.flatten(1) if ".attentions." in k and v.ndim == 4 else v for k, v in weights.items()}
    with torch.device("meta"):
        wanted = Autoencoder("vq", config=config).model.state_dict()
    if (wrong := differences(wanted, weights)).number:
        raise ValueError(f"{file} is not {KIND} that is known here: {wrong} among its entries")
    return FirstStage(config, weights)


def _config(state: State) -> dict[str, Any]:
    """Constructor arguments of diffusers' ``VQModel``, by the shapes."""
    places = [match.groups() for name in state if (match := re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", name))]
    count = 1 + max((int(level) for level, _ in places), default=-1)
    if not count:
        raise KeyError("encoder.down")
    layers = [1 + max(int(block) for level, block in places if int(level) == wanted) for wanted in range(count)]
    codes, width = state[_CODEBOOK].shape
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": len(state["decoder.conv_out.weight"]),
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "block_out_channels": [len(state[f"encoder.down.{level}.block.0.conv2.weight"]) for level in range(count)],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "latent_channels": len(state["encoder.conv_out.weight"]),
        "num_vq_embeddings": codes,
        "vq_embed_dim": width,
        "norm_num_groups": _GROUPS,
    }


def _renamed(name: str, levels: int) -> str:
    """A name of theirs as diffusers has it; levels on the way up are counted from the coarsest there."""
    parts = name.split(".")
    if len(parts) < 4 or parts[0] not in ("encoder", "decoder"):
        return ".".join(_LAYERS.get(part, part) for part in parts)
    side, place, *rest = parts
    if place == "mid":
        number = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}.get(rest[0], rest[0])
        names = _ATTENTION if rest[0] == "attn_1" else _LAYERS
        return ".".join([side, "mid_block", number, *(names.get(part, part) for part in rest[1:])])
    level, kind, *rest = rest
    if place == "up" and level.isdigit():
        level = str(levels - 1 - int(level))
    kind = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}.get(kind, kind)
    return ".".join([side, f"{place}_blocks", level, kind, *(_LAYERS.get(part, part) for part in rest)])


def write_folder(file: str | Path, folder: str | Path) -> None:
    """Write a released first stage as a folder of diffusers, which ``Autoencoder(name=folder)`` reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the folder exists; the file is damaged or holds something else.
    """
    if Path(folder).exists():
        raise ValueError(f"{folder} exists already: remove it or choose another folder")
    found = first_stage_of(read_state(Path(file), KIND), Path(file))
    model = Autoencoder("vq", config=found.config).model
    model.load_state_dict(found.weights)
    model.save_pretrained(folder)
