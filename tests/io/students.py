"""Checkpoints of small distillations for the tests of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_sgm.codecs import VQ_F4, Autoencoder
from lightning_sgm.io.checkpoint import AtomicCheckpointIO
from lightning_sgm.io.released.model import build

RESTORATION = {
    "kind": "image",
    "shape": [3, 16, 16],
    "low_shape": [3, 4, 4],
    "factor": 4,
    "fixed": True,
    "range": [-1.0, 1.0],
    "levels": 256,
    "classes": 0,
}
VQ = {**VQ_F4, "block_out_channels": [8, 8, 8], "layers_per_block": [1, 2, 1], "norm_num_groups": 4}
CODECS = {
    "unshuffle": {"class_path": "PixelUnshuffle", "init_args": {"factor": 4}},
    "stored": {"class_path": "Autoencoder", "init_args": {"config": VQ}},
    "named": {"class_path": "Autoencoder", "init_args": {"name": "vq"}},
}


def random_weights(module: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)


def written(module: Any, path: Path) -> Path:
    """The checkpoint of a run."""
    held: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    held |= {"callbacks": {"EMA": {"updates": 5}}, "pytorch-lightning_version": "2.6.6"}
    module.on_save_checkpoint(held)
    AtomicCheckpointIO().save_checkpoint(held, path)
    return path


def distillation(folder: Path, codec: str) -> Path:
    """Checkpoint of a student whose weights are not the teacher's; with critics."""
    if codec == "named":
        Autoencoder(config=VQ).model.save_pretrained(folder / "vq")
    network = {"class_path": "SRResNet", "init_args": {"channels": 8, "blocks": 3}}
    arguments = {"network": network, "spec": RESTORATION, "codec": CODECS[codec], "perceptual_weight": 3.0}
    teacher: Any = build({"class_path": "ResShift", "init_args": arguments})
    random_weights(teacher.network, 1)
    written(teacher, folder / "teacher.ckpt")
    terms = [{"class_path": "Regression"}, {"class_path": "Adversarial"}]
    section = {"terms": terms, "spec": RESTORATION, "teacher": str(folder / "teacher.ckpt")}
    module: Any = build({"class_path": "Distillation", "init_args": section})
    random_weights(module.student.network, 2)
    return written(module, folder / "student.ckpt")
