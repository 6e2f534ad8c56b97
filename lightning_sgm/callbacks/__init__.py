"""Lightning callbacks that every method gets: averages, seeds, progress, pictures, throughput, checkpoints."""

from lightning_sgm.callbacks.checkpoints import Checkpoints
from lightning_sgm.callbacks.compile import Compile
from lightning_sgm.callbacks.ema import EMA
from lightning_sgm.callbacks.progress import Progress
from lightning_sgm.callbacks.samples import PredictionWriter, SampleLogger
from lightning_sgm.callbacks.seeds import StepSeeds
from lightning_sgm.callbacks.throughput import Throughput

__all__ = ["EMA", "Checkpoints", "Compile", "PredictionWriter", "Progress", "SampleLogger", "StepSeeds", "Throughput"]
