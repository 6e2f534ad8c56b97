"""Training losses: they draw times or masks and return named values per example."""

from lightning_sgm.objectives.adversarial import Adversarial
from lightning_sgm.objectives.denoising import (
    ChainTimes,
    DenoisingObjective,
    LogNormalRatio,
    Times,
    UniformLogSNR,
    UniformTime,
)
from lightning_sgm.objectives.distillation import (
    Data,
    GroundTruth,
    HighFrequencyScore,
    Inverse,
    Phase,
    Regression,
    Term,
)
from lightning_sgm.objectives.joint import JointObjective
from lightning_sgm.objectives.masked import MaskedObjective
from lightning_sgm.objectives.perceptual import Perceptual
from lightning_sgm.objectives.population import Population, PopulationObjective, SharedTime
from lightning_sgm.objectives.weights import (
    DataWeight,
    EDMWeight,
    LikelihoodWeight,
    MinSNR,
    NoiseWeight,
    OutputWeight,
    PosteriorWeight,
    VelocityWeight,
    VWeight,
    Weight,
)

__all__ = [
    "Adversarial",
    "ChainTimes",
    "Data",
    "DataWeight",
    "DenoisingObjective",
    "EDMWeight",
    "GroundTruth",
    "HighFrequencyScore",
    "Inverse",
    "JointObjective",
    "LikelihoodWeight",
    "LogNormalRatio",
    "MaskedObjective",
    "MinSNR",
    "NoiseWeight",
    "OutputWeight",
    "Perceptual",
    "Phase",
    "Population",
    "PopulationObjective",
    "PosteriorWeight",
    "Regression",
    "SharedTime",
    "Term",
    "Times",
    "UniformLogSNR",
    "UniformTime",
    "VWeight",
    "VelocityWeight",
    "Weight",
]
