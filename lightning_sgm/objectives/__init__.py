"""Training losses: they draw times or masks and return named values per example."""

from lightning_sgm.objectives.denoising import (
    ChainTimes,
    DenoisingObjective,
    EDMWeight,
    LikelihoodWeight,
    LogNormalRatio,
    MinSNR,
    NoiseWeight,
    Times,
    UniformLogSNR,
    UniformTime,
    VelocityWeight,
    VWeight,
    Weight,
)
from lightning_sgm.objectives.joint import JointObjective
from lightning_sgm.objectives.masked import MaskedObjective

__all__ = [
    "ChainTimes",
    "DenoisingObjective",
    "EDMWeight",
    "JointObjective",
    "LikelihoodWeight",
    "LogNormalRatio",
    "MaskedObjective",
    "MinSNR",
    "NoiseWeight",
    "Times",
    "UniformLogSNR",
    "UniformTime",
    "VWeight",
    "VelocityWeight",
    "Weight",
]
