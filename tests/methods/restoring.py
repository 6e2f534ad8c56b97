"""Small models that restore, and data for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules import SuperResolutionDataModule
from lightning_sgm.codecs import Autoencoder, Codec
from lightning_sgm.methods import ResShift
from lightning_sgm.networks import SRResNet
from lightning_sgm.networks.base import Network
from lightning_sgm.residual_denoiser import ResShiftPreconditioning
from lightning_sgm.samplers import Ancestral, ChainGrid, Sampler
from lightning_sgm.trainer import Trainer

TINY_VQ: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 3,
    "num_vq_embeddings": 16,
    "vq_embed_dim": 3,
    "norm_num_groups": 4,
}


def tiny_vq() -> Any:
    """Latents of half the side."""
    torch.manual_seed(1)
    return Autoencoder("vq", config=TINY_VQ)


def spec(factor: int = 4, crop: int = 16) -> dict[str, Any]:
    side = crop // factor
    return {
        "kind": "image",
        "shape": [3, crop, crop],
        "low_shape": [3, side, side],
        "factor": factor,
        "fixed": False,
        "classes": 0,
        "levels": 256,
        "range": [-1.0, 1.0],
    }


def ancestral(steps: int = 3) -> Sampler:
    return Sampler(rule=Ancestral(), steps=steps, grid=ChainGrid())


def model(about: dict[str, Any] | None = None, codec: Codec | None = None, **arguments: Any) -> Any:
    """By default a ResNet that says y - x_0 = 0 at first: it then answers with the enlarged image, whatever it sees."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "network": lambda spec: SRResNet(spec, channels=8, blocks=1, embedding="positional"),
        "preconditioning": ResShiftPreconditioning("residual"),
        "sampler": ancestral(),
        "warmup": 1,
    }
    return ResShift(spec=about or spec(), codec=codec, **{**given, **arguments})


def awake(module: Any) -> Any:
    """With a last layer that is not zero."""
    torch.nn.init.normal_(module.network.last.weight, std=0.02)
    return module.eval()


def images(count: int = 3, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    """(count, 3, height, width) uniform in [-1, 1]."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Knows(Network):
    """Answers with what it was told, example by example."""

    conditions = ("low",)

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(answer)

    def forward(self, x: Tensor, noise: Tensor, /, low: Tensor) -> Tensor:
        return self.answer


def pictures(folder: Path, count: int = 6, height: int = 48, width: int = 56, seed: int = 0) -> Path:
    """Smooth coloured pictures with edges, 00.png, 01.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        large = small.resize((width, height), Image.Resampling.BICUBIC)
        large.paste(tuple(rng.integers(0, 256, 3).tolist()), (3 * number, 5, 3 * number + 17, 27))
        large.save(folder / f"{number:02d}.png")
    return folder


def ready(**arguments: Any) -> SuperResolutionDataModule:
    small: dict[str, Any] = {"crop": 16, "crops_per_image": 8, "eval_size": 16, "eval_crops": 5, "batch_size": 4}
    data = SuperResolutionDataModule(**{**small, **arguments})
    data.setup()
    return data


def trainer(folder: Path, **arguments: Any) -> Trainer:
    options: dict[str, Any] = {"max_steps": 2, "enable_progress_bar": False, "log_every_n_steps": 1, "logger": False}
    return Trainer(run_dir=str(folder), accelerator="cpu", **{**options, **arguments})
