"""How data become noise: pure mathematics, nothing learnt."""

from lightning_sgm.processes.absorbing import AbsorbingProcess, CosineSquared, Geometric, Loglinear, Schedule
from lightning_sgm.processes.chains import Chain, CosineChain, DDPMChain, SMLDChain
from lightning_sgm.processes.gaussian import CLEAN, EDM, VE, VP, Cosine, Flow, GaussianProcess, Level, SubVP
from lightning_sgm.processes.graph import GraphProcess
from lightning_sgm.processes.residual import ResidualShift

__all__ = [
    "CLEAN",
    "EDM",
    "VE",
    "VP",
    "AbsorbingProcess",
    "Chain",
    "Cosine",
    "CosineChain",
    "CosineSquared",
    "DDPMChain",
    "Flow",
    "GaussianProcess",
    "Geometric",
    "GraphProcess",
    "Level",
    "Loglinear",
    "ResidualShift",
    "SMLDChain",
    "Schedule",
    "SubVP",
]
