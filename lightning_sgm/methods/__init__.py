"""Methods: LightningModules on the shared parts, one file each."""

from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.methods.radd import RADD
from lightning_sgm.methods.score_sde import ScoreSDE

__all__ = ["RADD", "GenerativeModule", "ScoreSDE"]
