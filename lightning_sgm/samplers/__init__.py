"""Samplers: how time is run backwards."""

from lightning_sgm.samplers.diffusers import DiffusersRule
from lightning_sgm.samplers.evaluation import Evaluation
from lightning_sgm.samplers.grids import ChainGrid, Grid, Karras, LogUniform, StridedChain, UniformTime
from lightning_sgm.samplers.hooks import AnnealedLangevin, Clamp, Hook, Langevin
from lightning_sgm.samplers.known import Replacement
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.ode import ODESampler, slerp
from lightning_sgm.samplers.residual import TrailingChain, invert
from lightning_sgm.samplers.rules import (
    Ancestral,
    DPMpp2M,
    Euler,
    EulerMaruyama,
    Heun,
    ReverseDiffusion,
    Rule,
    Stay,
)
from lightning_sgm.samplers.splitting import S4
from lightning_sgm.samplers.unmasking import UnmaskingSampler

__all__ = [
    "S4",
    "Ancestral",
    "AnnealedLangevin",
    "ChainGrid",
    "Clamp",
    "DPMpp2M",
    "DiffusersRule",
    "Euler",
    "EulerMaruyama",
    "Evaluation",
    "Grid",
    "Heun",
    "Hook",
    "Karras",
    "Langevin",
    "LogUniform",
    "ODESampler",
    "Replacement",
    "ReverseDiffusion",
    "Rule",
    "Sampler",
    "Stay",
    "StridedChain",
    "TrailingChain",
    "UniformTime",
    "UnmaskingSampler",
    "invert",
    "slerp",
]
