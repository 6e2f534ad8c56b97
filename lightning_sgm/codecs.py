"""Codecs: from data space to the space of a model and back, where the two differ.

A codec is never trained: its parameters are frozen and it stays in eval mode, whatever module it is part of. Gradients
pass through it to its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

VQ_F4: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [128, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
    "norm_num_groups": 32,
}
"""diffusers' ``VQModel`` with the architecture of VQ-f4 (Rombach et al. 2022): 55,322,782 parameters."""


class Codec(nn.Module):
    """Base of all codecs.

    Attributes:
        factor: pixels of the data along a side of one of model space.
        of_pixels: whether values of model space are pixels, so that their range is known.
        stored: whether checkpoints must hold its weights; otherwise it finds them itself.
    """

    factor: int = 1
    of_pixels: bool = True
    stored: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def shape(self, data: Sequence[int]) -> tuple[int, ...]:
        """Shape in model space of one example of shape ``data``.

        Raises:
            ValueError: data of this shape cannot be encoded.
        """
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Data (B, *) to model space (B, *shape)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Model space to data, not clipped to their range."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)


class Identity(Codec):
    """The model works on the data themselves."""

    def shape(self, data: Sequence[int]) -> tuple[int, ...]:
        """The same."""
        return tuple(data)

    def encode(self, x: Tensor) -> Tensor:
        """The same."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """The same."""
        return z


class PixelUnshuffle(Codec):
    """Squares of pixels become channels, without any loss (Shi et al. 2016, 1609.05158).

    With the factor of super-resolution the model works on the grid of the low-resolution image, at a tenth of the cost.

    Args:
        factor: side of the squares.
    """

    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor of PixelUnshuffle must be at least 1, got {factor}")
        self.factor = factor

    def shape(self, data: Sequence[int]) -> tuple[int, ...]:
        """(C, H, W) to (C factor^2, H / factor, W / factor)."""
        channels, height, width = _divided(data, self.factor, "PixelUnshuffle")
        return channels * self.factor**2, height, width

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, C factor^2, H / factor, W / factor)."""
        self.shape(x.shape[1:])
        return F.pixel_unshuffle(x, self.factor)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse."""
        return F.pixel_shuffle(z, self.factor)


class Autoencoder(Codec):
    """A trained autoencoder of diffusers: the latents of latent diffusion (Rombach et al. 2022, 2112.10752).

    Latents are counted times ``scale``. Those of a "vq" autoencoder are quantised on the way back only, with gradients
    straight through; those of a "kl" one are the means of the encoder's normal law.

    Args:
        kind: "vq" for a ``VQModel``, "kl" for an ``AutoencoderKL``.
        name: a folder written by ``save_pretrained``, or a name on the hub, with safetensors.
        subfolder: of a hub repository or folder where the autoencoder is, such as "vae".
        config: constructor arguments of an autoencoder with random weights, to be loaded from a checkpoint, instead of
            ``name``; :data:`VQ_F4` is the paper's. ``layers_per_block`` may be a list with a number for each level,
            finest first, which diffusers itself does not know.
        scale: factor of the latents; None: 1 for "vq", the ``scaling_factor`` of its configuration for "kl".

    Raises:
        ValueError: unless exactly one of ``name`` and ``config`` is given and the configuration is of this kind.
        FileNotFoundError: no such autoencoder.
    """

    of_pixels = False

    def __init__(
        self,
        kind: Literal["vq", "kl"] = "vq",
        name: str | None = None,
        subfolder: str | None = None,
        config: dict[str, Any] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("vq", "kl"):
            raise ValueError(f"kind of an Autoencoder must be vq or kl, got {kind!r}")
        if (config is None) == (name is None):
            raise ValueError("an Autoencoder needs exactly one of name (a trained one) and config (random weights)")
        self.kind: Literal["vq", "kl"] = kind
        self.stored = name is None
        self.model = _load(kind, name, subfolder) if name is not None else _new(kind, config or {})
        self.model.requires_grad_(False)
        self.eval()
        given = self.model.config
        self.scale = float(scale if scale is not None else 1.0 if kind == "vq" else given.scaling_factor)
        if self.scale <= 0:
            raise ValueError(f"scale of an Autoencoder must be positive, got {self.scale}")
        self.offset = float(given.get("shift_factor") or 0.0)
        self.factor = 2 ** (len(given.block_out_channels) - 1)
        self.channels = int(given.get("vq_embed_dim") or given.latent_channels)

    def shape(self, data: Sequence[int]) -> tuple[int, ...]:
        """(C, H, W) to (channels, H / factor, W / factor)."""
        channels, height, width = _divided(data, self.factor, "this autoencoder")
        if channels != self.model.config.in_channels:
            raise ValueError(
                f"this autoencoder is for {self.model.config.in_channels} channels, the data have {channels}"
            )
        return self.channels, height, width

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to latents (B, channels, H / factor, W / factor), not quantised."""
        self.shape(x.shape[1:])
        answer = self.model.encode(x)
        z = answer.latents if self.kind == "vq" else answer.latent_dist.mode()
        return (z - self.offset) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents to images; those of "vq" are quantised before."""
        return self.model.decode(z / self.scale + self.offset).sample


def _divided(data: Sequence[int], factor: int, user: str) -> tuple[int, int, int]:
    """(C, H / factor, W / factor) of images (C, H, W)."""
    if len(data) != 3:
        raise ValueError(f"{user} is for images (C, H, W), got data of shape {list(data)}: choose Identity")
    channels, height, width = data
    if height % factor or width % factor:
        raise ValueError(f"{user} needs image sides divisible by {factor}, got {height} x {width}: pad or crop them")
    return channels, height // factor, width // factor


def _class(kind: str) -> Any:
    if kind == "vq":
        from diffusers.models.autoencoders.vq_model import VQModel

        return VQModel
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL


def _new(kind: str, config: dict[str, Any]) -> Any:
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    layers = arguments.get("layers_per_block")
    if isinstance(layers, list | tuple):
        levels = len(arguments.get("block_out_channels", ()))
        if len(layers) != levels or min(layers) < 1:
            raise ValueError(f"layers_per_block must be a number, or one of 1 or more for each of {levels} levels")
        arguments["layers_per_block"] = max(layers)
    try:
        model = _class(kind)(**arguments)
    except TypeError as error:
        raise ValueError(f"the configuration is none of this diffusers' {_class(kind).__name__}: {error}") from error
    if isinstance(layers, list | tuple):
        _shorten(model, list(layers))
    return model


def _shorten(model: Any, layers: list[int]) -> None:
    """Leave each level of an autoencoder so many layers, finest level first, and one more on the way up.

    The first layer of a level alone knows another level's channels, so those behind it can go.
    """
    levels = [*zip(model.encoder.down_blocks, layers, strict=True)]
    levels += [(block, count + 1) for block, count in zip(model.decoder.up_blocks, reversed(layers), strict=True)]
    for block, count in levels:
        for name in ("resnets", "attentions"):
            if hasattr(block, name):
                setattr(block, name, getattr(block, name)[:count])
    model.register_to_config(layers_per_block=layers)


def _load(kind: str, name: str, subfolder: str | None) -> Any:
    wanted = _class(kind)
    try:
        # Other names may be those of the hub, which is asked for a while.
        if not Path(name).is_dir() and (name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1):
            raise FileNotFoundError(name)
        config = wanted.load_config(name, subfolder=subfolder)
        found = config.get("_class_name", wanted.__name__)
        if found != wanted.__name__:
            raise ValueError(f"the model at {name!r} is a {found}, but kind {kind} is for a {wanted.__name__}")
        if isinstance(config.get("layers_per_block"), list):
            model = _new(kind, config)
            model.load_state_dict(load_file(Path(name, subfolder or "") / "diffusion_pytorch_model.safetensors"))
            return model
        return wanted.from_pretrained(name, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False)
    except OSError as error:
        raise FileNotFoundError(
            f"no {wanted.__name__} with safetensors at {name!r}: give a folder written by save_pretrained"
        ) from error
