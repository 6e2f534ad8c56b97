"""How data become noise: pure mathematics, nothing learnt."""

from lightning_sgm.processes.absorbing import AbsorbingProcess, CosineSquared, Geometric, Loglinear, Schedule
from lightning_sgm.processes.chains import Chain, DDPMChain, SMLDChain
from lightning_sgm.processes.gaussian import CLEAN, EDM, VE, VP, Cosine, Flow, GaussianProcess, Level, SubVP

__all__ = [
    "CLEAN",
    "EDM",
    "VE",
    "VP",
    "AbsorbingProcess",
    "Chain",
    "Cosine",
    "CosineSquared",
    "DDPMChain",
    "Flow",
    "GaussianProcess",
    "Geometric",
    "Level",
    "Loglinear",
    "SMLDChain",
    "Schedule",
    "SubVP",
]
