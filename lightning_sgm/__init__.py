"""lightning_sgm: train, sample and judge score-based generative models with PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Resolved on first use, so that ``import lightning_sgm`` and the command line's --help need no torch.
_PUBLIC = {
    "RADD": "lightning_sgm.methods.radd",
    "ScoreSDE": "lightning_sgm.methods.score_sde",
    "GDSS": "lightning_sgm.methods.gdss",
    "GenerativeModule": "lightning_sgm.methods.base",
    "ExactMarkov": "lightning_sgm.networks.exact_markov",
    "MaskedTransformer": "lightning_sgm.networks.masked_transformer",
    "UNet": "lightning_sgm.networks.unet",
    "GraphScore": "lightning_sgm.networks.graph_score",
    "SuperResolutionPipeline": "lightning_sgm.pipelines",
    "Trainer": "lightning_sgm.trainer",
    "load": "lightning_sgm.io.checkpoint",
    "TextDataModule": "datamodules",
    "ImageDataModule": "datamodules",
    "MarkovDataModule": "datamodules",
    "GraphDataModule": "datamodules",
    "MoleculeDataModule": "datamodules",
}

if TYPE_CHECKING:
    from datamodules import GraphDataModule as GraphDataModule
    from datamodules import ImageDataModule as ImageDataModule
    from datamodules import MarkovDataModule as MarkovDataModule
    from datamodules import MoleculeDataModule as MoleculeDataModule
    from datamodules import TextDataModule as TextDataModule
    from lightning_sgm.io.checkpoint import load as load
    from lightning_sgm.methods.base import GenerativeModule as GenerativeModule
    from lightning_sgm.methods.gdss import GDSS as GDSS
    from lightning_sgm.methods.radd import RADD as RADD
    from lightning_sgm.methods.score_sde import ScoreSDE as ScoreSDE
    from lightning_sgm.networks.exact_markov import ExactMarkov as ExactMarkov
    from lightning_sgm.networks.graph_score import GraphScore as GraphScore
    from lightning_sgm.networks.masked_transformer import MaskedTransformer as MaskedTransformer
    from lightning_sgm.networks.unet import UNet as UNet
    from lightning_sgm.pipelines import SuperResolutionPipeline as SuperResolutionPipeline
    from lightning_sgm.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
