"""Guidance: wrappers of denoisers that are denoisers."""

from lightning_sgm.guidance.classes import ClassifierFree, ClassifierGuidance, NoisyClassifier
from lightning_sgm.guidance.clipping import InRange, ResidualInRange
from lightning_sgm.guidance.inverse import Average, Gray, LinearOperator, Mask, Matrix, PosteriorMatching

__all__ = [
    "Average",
    "ClassifierFree",
    "ClassifierGuidance",
    "Gray",
    "InRange",
    "LinearOperator",
    "Mask",
    "Matrix",
    "NoisyClassifier",
    "PosteriorMatching",
    "ResidualInRange",
]
