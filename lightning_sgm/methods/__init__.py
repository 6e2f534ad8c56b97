"""Methods: LightningModules on the shared parts, one file each."""

from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.methods.classifier import Classifier
from lightning_sgm.methods.completion import Complete
from lightning_sgm.methods.distillation import Distillation
from lightning_sgm.methods.gdss import GDSS
from lightning_sgm.methods.pad_ts import PaDTS
from lightning_sgm.methods.radd import RADD
from lightning_sgm.methods.resshift import ResShift
from lightning_sgm.methods.score_sde import ScoreSDE
from lightning_sgm.methods.series_tasks import Forecast, Impute, SeriesTask
from lightning_sgm.methods.tasks import Colourise, Inpaint, Restore, Task

__all__ = [
    "GDSS",
    "RADD",
    "Classifier",
    "Colourise",
    "Complete",
    "Distillation",
    "Forecast",
    "GenerativeModule",
    "Impute",
    "Inpaint",
    "PaDTS",
    "ResShift",
    "Restore",
    "ScoreSDE",
    "SeriesTask",
    "Task",
]
