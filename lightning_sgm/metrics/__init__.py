"""Metrics by kind of data: ``torchmetrics.Metric`` subclasses whose states are sums, so they are exact under DDP.

A metric of samples has ``inputs``, the batch entries it reads, and is fed ``metric.update(**{k: batch[k] for k in
metric.inputs}, real=...)`` with real and with generated batches: one sampling pass serves all of them.
"""

from lightning_sgm.metrics.arrays import EnergyDistance
from lightning_sgm.metrics.base import DoubleMetric, ExampleMean
from lightning_sgm.metrics.chemnet import FCD
from lightning_sgm.metrics.generative import GenerativePerplexity
from lightning_sgm.metrics.graphs import GraphMMD
from lightning_sgm.metrics.images import FrechetDistance
from lightning_sgm.metrics.likelihood import BitsPerDim, TokenLikelihood
from lightning_sgm.metrics.molecules import MoleculeQuality, SimilarityToData
from lightning_sgm.metrics.nspdk import NSPDK
from lightning_sgm.metrics.perceptual import LPIPS, STLPIPS, NoReference, PerceptualDistance
from lightning_sgm.metrics.post_hoc import DiscriminativeAccuracy, PredictiveScore
from lightning_sgm.metrics.restoration import Fidelity
from lightning_sgm.metrics.series import AutocorrelationDistance, CorrelationDistance, ValueDistance
from lightning_sgm.metrics.text import NGramJudge, UnigramEntropy
from lightning_sgm.metrics.two_sample import ClassifierTwoSample

__all__ = [
    "FCD",
    "LPIPS",
    "NSPDK",
    "STLPIPS",
    "AutocorrelationDistance",
    "BitsPerDim",
    "ClassifierTwoSample",
    "CorrelationDistance",
    "DiscriminativeAccuracy",
    "DoubleMetric",
    "EnergyDistance",
    "ExampleMean",
    "Fidelity",
    "FrechetDistance",
    "GenerativePerplexity",
    "GraphMMD",
    "MoleculeQuality",
    "NGramJudge",
    "NoReference",
    "PerceptualDistance",
    "PredictiveScore",
    "SimilarityToData",
    "TokenLikelihood",
    "UnigramEntropy",
    "ValueDistance",
]
