"""Networks: modules that know shapes and conditions, but no process."""

from lightning_sgm.networks.base import Network, Spec, TokenNetwork, build
from lightning_sgm.networks.ddpm import DDPM
from lightning_sgm.networks.diffusers_unet import DiffusersUNet
from lightning_sgm.networks.discriminator import TimeAwareHeads
from lightning_sgm.networks.dual_channel import DualChannel
from lightning_sgm.networks.exact_markov import ExactMarkov
from lightning_sgm.networks.graph_score import GraphScore
from lightning_sgm.networks.huggingface import HuggingFaceMaskedLM
from lightning_sgm.networks.masked_transformer import MaskedTransformer
from lightning_sgm.networks.mlp import MLP
from lightning_sgm.networks.ncsnpp import NCSNpp
from lightning_sgm.networks.sr_resnet import SRResNet
from lightning_sgm.networks.swin_unet import SwinUNet
from lightning_sgm.networks.unet import UNet
from lightning_sgm.networks.wide_resnet import WideResNet

__all__ = [
    "DDPM",
    "MLP",
    "DiffusersUNet",
    "DualChannel",
    "ExactMarkov",
    "GraphScore",
    "HuggingFaceMaskedLM",
    "MaskedTransformer",
    "NCSNpp",
    "Network",
    "SRResNet",
    "Spec",
    "SwinUNet",
    "TimeAwareHeads",
    "TokenNetwork",
    "UNet",
    "WideResNet",
    "build",
]
