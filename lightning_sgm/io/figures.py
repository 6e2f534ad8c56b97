"""Curves as pictures, in TensorBoard and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from numpy.typing import NDArray

from lightning_sgm.io.files import atomic_write

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Curve


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """An empty matplotlib figure of so many inches, 120 pixels each, and its axes."""
    # Not pyplot: it keeps figures and chooses a window system for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Any, path: Path) -> Path:
    """Write it as a PNG, atomically; returns the path."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    return path


def pixels_of(figure: Any) -> NDArray[np.uint8]:
    """(height, width, 3)."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


class CurveWriter:
    """Draws a :class:`~lightning_sgm.methods.base.Curve` with matplotlib."""

    def save(self, curve: Curve, stem: Path) -> list[Path]:
        """The curve as ``stem.png``; returns the file."""
        return [save_figure(self._figure(curve), stem.with_name(stem.name + ".png"))]

    def log(self, logger: Logger, tag: str, curve: Curve, step: int) -> None:
        """The curve as an image in TensorBoard; other loggers are passed over."""
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, pixels_of(self._figure(curve)), step, dataformats="HWC")

    def _figure(self, curve: Curve) -> Any:
        figure, axes = new_figure(width=5.0, height=3.2)
        axes.plot(curve.x.tolist(), curve.y.tolist(), marker=".")
        axes.set(xlabel=curve.x_name, ylabel=curve.y_name, ylim=(0.0, None))
        if curve.log_x:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        return figure
