"""What runs beside training: averaging, seeds, progress, speed, samples, checkpoints."""

from lightning_sgm.callbacks.checkpoints import Checkpoints as Checkpoints
from lightning_sgm.callbacks.compile import Compile as Compile
from lightning_sgm.callbacks.ema import EMA as EMA
from lightning_sgm.callbacks.progress import Progress as Progress
from lightning_sgm.callbacks.seeds import StepSeeds as StepSeeds
from lightning_sgm.callbacks.throughput import Throughput as Throughput
from lightning_sgm.callbacks.throughput import untimed as untimed
