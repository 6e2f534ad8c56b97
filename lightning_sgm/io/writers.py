"""Samples as files that people open, and in TensorBoard: one writer per kind of data."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from lightning_sgm.io.files import atomic_write

Batch = dict[str, Any]  # tensors, and names
_LINE, _WHITE = 2, 255  # width and gray level of the lines around the images of a panel
_GROUND = 128  # gray level between and behind the tiles of an overview
_SMALL, _WIDEST = 256, 16  # height and most width / height of tiles in an overview of different or large pictures
# What panels show of a batch, in this order, and what it is called.
_PANEL = {
    "before": "what was given",
    "bicubic": "enlarged bicubically",
    "teacher": "by the teacher",
    "x": "by the model",
    "truth": "the truth",
}


class Writer(ABC):
    """Turns batches of samples into files and TensorBoard entries. Files are written atomically.

    Every method takes a batch whose ``x`` holds the samples and whose ``index``, if there, numbers them (otherwise
    they are numbered from 0). Files of samples have the names in ``name``, a list of texts that may contain folders
    ("a/b"), or their numbers. A writer knows how data look, not where they come from; ``writer_for`` builds the one
    that a data specification asks for. What else is in the batch is shown or not, as suits the kind of data.
    """

    @abstractmethod
    def save(self, batch: Batch, stem: Path) -> list[Path]:
        """Write one overview of all samples to ``stem`` plus a suffix; returns the files written."""

    @abstractmethod
    def save_each(self, batch: Batch, folder: Path) -> list[Path]:
        """Write one file per sample, with its name or number (``000012.png``), into ``folder``.

        Returns:
            For every sample, in order, the file that :meth:`collect` is to show: its own, or one that holds it too.
        """

    @abstractmethod
    def collect(self, files: Sequence[Path], stem: Path) -> list[Path]:
        """Write the overview of the files that ``save_each`` returned, perhaps in other processes, in that order."""

    @abstractmethod
    def log(self, logger: Logger, tag: str, batch: Batch, step: int) -> None:
        """Show the samples under ``tag`` in TensorBoard; other loggers have no common way and are passed over."""


class ImageWriter(Writer):
    """Images as PNG: single files pixel by pixel, overviews as a square grid of tiles enlarged to be visible.

    One channel is written as gray, three as colour; any other number as gray channels side by side. A batch that has
    ``before`` (what was known of each sample) is shown in panels: before, then ``bicubic``, ``teacher``, the sample and
    ``truth``, of which any but the sample may be missing. All are shown in the size of the sample, by repeating pixels.

    Args:
        low: value shown as black; lower ones and NaN too.
        high: value shown as white; higher ones too. 8-bit images scaled to [low, high] come back exactly.
        tile: small images are enlarged in overviews by a whole number until their longer side has this many pixels.
        most: an overview shows at most so many images, the first.
        window: of larger images panels show the middle, so many pixels high and wide, in which they can be compared
            pixel by pixel.
    """

    def __init__(
        self, low: float = -1.0, high: float = 1.0, tile: int = 64, most: int = 256, window: int = 2048
    ) -> None:
        if not low < high:
            raise ValueError(f"the value range [{low}, {high}] of the images is empty: low must be below high")
        self.low = low
        self.high = high
        self.tile = tile
        self.most = most
        self.window = window

    def save(self, batch: Batch, stem: Path) -> list[Path]:
        """One grid, row by row, as ``stem.png``."""
        return [self._write(self._grid(self._tiles(batch)), with_suffix(stem, ".png"))]

    def save_each(self, batch: Batch, folder: Path) -> list[Path]:
        """``folder/NAME.png`` in the images' own size; their panels, if any, are ``folder/panels/NAME.png``.

        What panels show is said in ``folder/panels/README.txt``.
        """
        names, pixels = names_of(batch), self._pixels(batch["x"])
        files = [
            self._write(image, with_suffix(folder / name, ".png")) for name, image in zip(names, pixels, strict=True)
        ]
        if "before" not in batch:
            return files
        with atomic_write(folder / "panels" / "README.txt") as text:
            text.write(f"From left to right: {', '.join(_PANEL[name] for name in _PANEL if name in batch)}.\n".encode())
        panels = zip(names, self._tiles(batch), strict=True)
        return [self._write(panel, with_suffix(folder / "panels" / name, ".png")) for name, panel in panels]

    def collect(self, files: Sequence[Path], stem: Path) -> list[Path]:
        """The grid of the first images as ``stem.png``; those of different or large sizes are shown small."""
        box = _box(files[: self.most])
        pixels = torch.stack([_opened(file, box) for file in files[: self.most]])
        return [self._write(self._grid(pixels), with_suffix(stem, ".png"))]

    def log(self, logger: Logger, tag: str, batch: Batch, step: int) -> None:
        """One image: the grid."""
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, self._grid(self._tiles(batch)), step)

    def _tiles(self, batch: Batch) -> Tensor:
        """(B, C, H, W) uint8: the samples, or panels of them, enlarged, with what is known and the truth."""
        if "before" not in batch:
            return self._pixels(batch["x"])
        size = tuple(batch["x"].shape[2:])
        shown = [_middle(batch[name], size, self.window) for name in _PANEL if name in batch]
        images = [self._enlarge(self._pixels(image)) for image in shown]
        joined = torch.cat([F.pad(image, (_LINE, 0), value=_WHITE) for image in images], dim=3)
        return F.pad(joined, (0, _LINE, _LINE, _LINE), value=_WHITE)

    def _pixels(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, 1 or 3, H, W) uint8 on the CPU."""
        if x.dim() != 4:
            raise ValueError(f"an image batch has the shape (B, C, H, W), got {tuple(x.shape)}")
        unit = (x.detach().float().cpu() - self.low) / (self.high - self.low)
        pixels = unit.nan_to_num(nan=0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
        if pixels.shape[1] in (1, 3):
            return pixels
        return torch.cat(pixels.split(1, dim=1), dim=3)

    def _grid(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> one (C, height, width) uint8: enlarged tiles on a gray ground."""
        pixels = self._enlarge(pixels[: self.most])
        # Of wide tiles there are fewer in a row.
        columns = math.ceil(math.sqrt(len(pixels) / max(1, pixels.shape[3] // pixels.shape[2])))
        rows = math.ceil(len(pixels) / columns)
        gap = max(2, max(pixels.shape[2:]) // 32)
        empty = rows * columns - len(pixels)
        tiles = F.pad(F.pad(pixels, (0, gap, 0, gap), value=_GROUND), (0,) * 7 + (empty,), value=_GROUND)
        _, channels, height, width = tiles.shape
        grid = tiles.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
        return F.pad(grid.reshape(channels, rows * height, columns * width), (gap, 0, gap, 0), value=_GROUND)

    def _enlarge(self, pixels: Tensor) -> Tensor:
        """Every pixel repeated until the longer side has ``tile`` pixels."""
        scale = max(1, math.ceil(self.tile / max(pixels.shape[2:])))
        return pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)

    def _write(self, image: Tensor, path: Path) -> Path:
        from PIL import Image

        array = image[0] if len(image) == 1 else image.movedim(0, 2)
        with atomic_write(path) as file:
            Image.fromarray(array.numpy()).save(file, format="PNG")
        return path


def _middle(images: Tensor, size: Sequence[int], window: int) -> Tensor:
    """(B, C, h, w) with every pixel repeated to the whole ``size``, at most ``window`` x ``window`` of the middle."""
    for dim, whole in zip((2, 3), size, strict=True):
        kept = min(whole, window)
        places = (whole - kept) // 2 + torch.arange(kept, device=images.device)
        images = images.index_select(dim, places * images.shape[dim] // whole)
    return images


def _box(files: Sequence[Path]) -> tuple[int, int] | None:
    """Width and height in which all pictures are to be shown; None if they are of one kind and not large."""
    from PIL import Image

    kinds, shapes = set(), []
    for file in files:
        with Image.open(file) as image:  # reads no pixels yet
            kinds.add((image.mode, image.size))
            shapes.append(image.width / image.height)
    tallest = max(size[1] for _, size in kinds)
    if len(kinds) == 1 and tallest <= 2 * _SMALL:
        return None
    height = min(_SMALL, tallest)
    return max(1, round(height * min(_WIDEST, statistics.median(shapes)))), height


def _opened(file: Path, box: tuple[int, int] | None) -> Tensor:
    """(1 or 3, H, W) uint8; in a ``box`` always (3, height, width), with gray around."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        if box is None:
            pixels = torch.from_numpy(np.array(opened))
        else:
            color, method = (_GROUND,) * 3, Image.Resampling.LANCZOS
            pixels = torch.from_numpy(np.array(ImageOps.pad(opened.convert("RGB"), box, method=method, color=color)))
    return pixels[None] if pixels.dim() == 2 else pixels.movedim(2, 0)


def writer_for(spec: dict[str, Any]) -> Writer:
    """The writer for the kind of data that ``spec`` (see a DataModule's ``spec``) describes."""
    kind = spec["kind"]
    if kind == "image":
        low, high = spec["range"]
        return ImageWriter(low, high)
    if kind == "text":
        from lightning_sgm.io.texts import TextWriter

        return TextWriter(spec["tokenizer"])
    if kind == "array":
        from lightning_sgm.io.arrays import ArrayWriter

        return ArrayWriter(spec["mean"], spec["std"])
    if kind == "graph":
        from lightning_sgm.io.graphs import GraphWriter

        return GraphWriter()
    if kind == "molecule":
        from lightning_sgm.io.molecules import MoleculeWriter

        return MoleculeWriter(spec["atoms"])
    if kind == "series":
        from lightning_sgm.io.series import SeriesWriter

        return SeriesWriter(spec["columns"], spec["scaling"], spec["length"])
    raise ValueError(f"there is no writer for data of kind {kind!r}: give your own Writer as writer=")


def numbers_of(batch: Batch) -> list[int]:
    """The numbers of the samples in a batch."""
    numbers: list[int] = (batch["index"] if "index" in batch else torch.arange(len(batch["x"]))).tolist()
    return numbers


def names_of(batch: Batch) -> list[str]:
    """The names of the samples in a batch: their own or, in six digits, their numbers."""
    own: Any = batch.get("name")
    return [f"{number:06d}" for number in numbers_of(batch)] if own is None else list(own)


def shown_name(file: Path) -> str:
    """What a sample is called that ``save_each`` wrote to ``file``: its number without zeros in front, or its name."""
    return str(int(file.stem)) if file.stem.isdecimal() else file.stem


def with_suffix(stem: Path, suffix: str) -> Path:
    """``stem`` with ``suffix`` behind its name, whatever dots are in it."""
    # Path.with_suffix would cut "samples_0.5" at the dot.
    return stem.with_name(stem.name + suffix)
