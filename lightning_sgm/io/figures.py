"""Curves as pictures, in TensorBoard and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_sgm.io.files import atomic_write

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Curve


class CurveWriter:
    """Draws a :class:`~lightning_sgm.methods.base.Curve` with matplotlib."""

    def save(self, curve: Curve, stem: Path) -> list[Path]:
        """The curve as ``stem.png``; returns the file."""
        path = stem.with_name(stem.name + ".png")
        with atomic_write(path) as file:
            self._figure(curve).savefig(file, format="png")
        return [path]

    def log(self, logger: Logger, tag: str, curve: Curve, step: int) -> None:
        """The curve as an image in TensorBoard; other loggers are passed over."""
        if isinstance(logger, TensorBoardLogger):
            canvas = self._figure(curve).canvas
            canvas.draw()
            logger.experiment.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")

    def _figure(self, curve: Curve) -> Any:
        # Not pyplot: it keeps figures and chooses a window system for the whole process.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.0, 3.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(curve.x.tolist(), curve.y.tolist(), marker=".")
        axes.set(xlabel=curve.x_name, ylabel=curve.y_name, ylim=(0.0, None))
        if curve.log_x:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        return figure
