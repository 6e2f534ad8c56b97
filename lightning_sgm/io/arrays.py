"""Samples that are arrays: .npy files in the data's own units, and a picture of what can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lightning_sgm.io.figures import new_figure, pixels_of, save_figure
from lightning_sgm.io.files import atomic_write
from lightning_sgm.io.writers import Batch, Writer, names_of, numbers_of, with_suffix

_LINES = 16


class ArrayWriter(Writer):
    """Arrays of any shape as .npy files.

    The picture shows vectors by their first two coordinates (coloured by ``label`` where there is one) or, with one
    coordinate, as a histogram; sequences (T, D) as curves of the first feature; anything larger as a histogram of all
    values.

    Args:
        mean: that the data module took off, see :class:`~datamodules.ArrayDataModule`.
        std: by which it divided.
    """

    def __init__(self, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        self.mean, self.std = (torch.tensor(list(part), dtype=torch.float64) for part in (mean, std))

    def save(self, batch: Batch, stem: Path) -> list[Path]:
        """All samples in ``stem.npy``, and the picture ``stem.png``."""
        return self._write(self._values(batch["x"]), batch.get("label"), stem)

    def save_each(self, batch: Batch, folder: Path) -> list[Path]:
        """One file ``folder/parts/FIRST.npz`` with the samples, their numbers and labels, for all of the batch."""
        numbers = numbers_of(batch)
        path = with_suffix(folder / "parts" / min(names_of(batch)), ".npz")
        arrays: dict[str, Any] = {"x": self._values(batch["x"]).numpy(), "index": np.array(numbers)}
        if "label" in batch:
            arrays["label"] = batch["label"].cpu().numpy()
        with atomic_write(path) as file:
            np.savez(file, **arrays)
        return [path] * len(numbers)

    def collect(self, files: Sequence[Path], stem: Path) -> list[Path]:
        """All samples in the order of their numbers in ``stem.npy``, and the picture ``stem.png``."""
        parts = [dict(np.load(file, allow_pickle=False)) for file in dict.fromkeys(files)]
        merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = merged.pop("index").argsort()
        found = {name: torch.from_numpy(value[order]) for name, value in merged.items()}
        return self._write(found["x"], found.get("label"), stem)

    def log(self, logger: Logger, tag: str, batch: Batch, step: int) -> None:
        """The picture."""
        if isinstance(logger, TensorBoardLogger):
            figure = self._figure(self._values(batch["x"]), batch.get("label"))
            logger.experiment.add_image(tag, pixels_of(figure), step, dataformats="HWC")

    def _values(self, x: Tensor) -> Tensor:
        """In the data's units, float32 on the CPU."""
        return (x.detach().cpu().double() * self.std + self.mean).float()

    def _write(self, values: Tensor, label: Tensor | None, stem: Path) -> list[Path]:
        array, picture = (stem.with_name(stem.name + suffix) for suffix in (".npy", ".png"))
        with atomic_write(array) as file:
            np.save(file, values.numpy())
        return [array, save_figure(self._figure(values, label), picture)]

    def _figure(self, values: Tensor, label: Tensor | None) -> Any:
        figure, axes = new_figure(width=4.5, height=4.2)
        if values.ndim == 2 and values.shape[1] > 1:
            colour = {} if label is None else {"c": label.cpu().numpy(), "cmap": "tab10"}
            axes.scatter(values[:, 0], values[:, 1], s=4.0, linewidths=0, **colour)
            axes.set_aspect("equal", adjustable="datalim")
        elif values.ndim == 3:
            axes.plot(values[:_LINES, :, 0].T, linewidth=0.8)
        else:
            finite = values[values.isfinite()]
            axes.hist(finite.flatten().numpy(), bins=100, density=True)
        axes.grid(alpha=0.3)
        return figure
