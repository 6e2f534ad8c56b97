"""Networks: modules that know shapes and conditions, but no process."""

from lightning_sgm.networks.base import Network, Spec, TokenNetwork, build
from lightning_sgm.networks.huggingface import HuggingFaceMaskedLM
from lightning_sgm.networks.masked_transformer import MaskedTransformer
from lightning_sgm.networks.mlp import MLP
from lightning_sgm.networks.unet import UNet

__all__ = ["MLP", "HuggingFaceMaskedLM", "MaskedTransformer", "Network", "Spec", "TokenNetwork", "UNet", "build"]
