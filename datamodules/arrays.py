"""Arrays of any shape: points of toy laws, and the user's own vectors, sequences, images or volumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.base import DataModule, Split, require_fractions, require_positive
from datamodules.loaders import Batch, permutation

_SPLIT = 6  # purpose of a hash, see loaders.py
_CHUNK = 65536  # examples whose moments are taken at once
Array = NDArray[Any]


class ArrayDataModule(DataModule):
    """Arrays in memory: a batch has ``x`` (B, *) float32, ``index`` and, with ``labels``, ``label``.

    Values are standardised to mean 0 and standard deviation 1: each coordinate of vectors by its own moments, all
    values of larger arrays by common ones. Samples are written in the original units. A file is cut at random, the
    same way for every ``seed``.

    ``spec``: kind "array", shape [*], classes (0 without ``labels``), mean and std (lists of D numbers for vectors, of
    one otherwise), sigma_data 1, dequantized (whether they are floats, which have densities).

    Args:
        dataset: points in the plane: "gaussians" (eight of standard deviation 0.2 on a circle of radius 2, classes by
            mode), "moons" (two half circles, two classes), "checkerboard" (every second of 4 x 4 squares, no classes).
        path: a .npy file of shape (N, *), or an .npz file with such an array "x" and perhaps labels "label" (N,), which
            takes the place of ``dataset``.
        points: number of points of a ``dataset``.
        labels: give class labels, integers from 0.
        val_fraction: part of the examples for validation.
        test_fraction: part of the examples for testing.
        batch_size: examples per batch and process.
        seed: of the order of training.

    Raises:
        ValueError: an argument out of range, a file of another format, values that are not finite, no labels.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        dataset: Literal["gaussians", "moons", "checkerboard"] = "gaussians",
        path: str | None = None,
        points: int = 20000,
        labels: bool = False,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        require_fractions(val_fraction, test_fraction)
        require_positive(points=points)
        if dataset not in _TOYS:
            raise ValueError(f"there is no dataset {dataset!r}: choose one of {', '.join(_TOYS)}, or give a path")
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._values, classes = _read(Path(path)) if path else _TOYS[dataset](np.random.default_rng(0), points)
        self._name = path or dataset
        if len(self._values) < 3:
            raise ValueError(f"{self._name} has {len(self._values)} examples, too few for three splits")
        self._labels = self._checked(classes) if labels else None
        self._rows: dict[str, Tensor] = {}
        mean, std = self._moments()
        self.spec = {
            "kind": "array",
            "shape": list(self._values.shape[1:]),
            "classes": int(self._labels.max()) + 1 if self._labels is not None else 0,
            "mean": mean,
            "std": std,
            "sigma_data": 1.0,
            "dequantized": self._values.dtype.kind == "f",
        }

    def load(self) -> None:
        """Cut the splits."""
        total = len(self._values)
        order = permutation(total, _SPLIT)
        val, test = (max(1, round(total * fraction)) for fraction in (self.val_fraction, self.test_fraction))
        if val + test >= total:
            raise ValueError(f"{self._name} has {total} examples, too few to train on beside {val} and {test} others")
        pieces = order.split([val, test, total - val - test])
        self._rows = {split: rows.sort().values for split, rows in zip(("val", "test", "train"), pieces, strict=True)}

    def count(self, split: Split) -> int:
        """Number of examples of a split."""
        return len(self._rows[split])

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Examples ``index`` (B,) of a split: x (B, *) float32, and label (B,) int64 with ``labels``."""
        rows = self._rows[split][index]
        values = torch.from_numpy(np.asarray(self._values[rows.numpy()], dtype=np.float64))
        mean, std = (torch.tensor(self.spec[name], dtype=torch.float64) for name in ("mean", "std"))
        batch = {"x": ((values - mean) / std).float()}
        return batch if self._labels is None else {**batch, "label": self._labels[rows]}

    def _moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each coordinate of vectors, of all values otherwise."""
        axis = 0 if self._values.ndim == 2 else None
        total = len(self._values) if axis == 0 else self._values.size
        pieces = np.array_split(self._values, -(-len(self._values) // _CHUNK))  # a file may be larger than memory
        mean = np.atleast_1d(sum(piece.sum(axis, dtype=np.float64) for piece in pieces) / total)
        if not np.isfinite(mean).all():
            raise ValueError(f"{self._name} holds values that are not finite: remove or replace them")
        variance = np.atleast_1d(sum(((piece - mean) ** 2).sum(axis) for piece in pieces) / total)
        return mean.tolist(), np.where(variance > 0, np.sqrt(variance), 1.0).tolist()

    def _checked(self, classes: Array | None) -> Tensor:
        """Labels (N,) int64."""
        if classes is None:
            raise ValueError(f'{self._name} has no classes: set labels to false, or give an .npz file with "label"')
        if classes.shape != self._values.shape[:1] or classes.dtype.kind not in "iu" or classes.min() < 0:
            raise ValueError(
                f"the labels in {self._name} must be {len(self._values)} integers from 0, got {classes.dtype} of shape "
                f"{classes.shape}"
            )
        return torch.from_numpy(classes.astype(np.int64))


def _read(path: Path) -> tuple[Array, Array | None]:
    """Values (N, *) and labels of a file; .npy files stay on disk. Nothing is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a .npy or .npz file")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = dict(found) if isinstance(found, np.lib.npyio.NpzFile) else {"x": found}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"cannot read {path} as .npy or .npz of numbers: {error}") from error
    if "x" not in arrays:
        raise ValueError(f'{path} has no array "x", only {", ".join(arrays) or "nothing"}')
    values = arrays["x"]
    if values.ndim < 2 or values.dtype.kind not in "fiub" or not math.prod(values.shape[1:]):
        raise ValueError(f"{path} must hold numbers of shape (N, ...), got {values.dtype} of shape {values.shape}")
    return values, arrays.get("label")


def _gaussians(generator: np.random.Generator, points: int) -> tuple[Array, Array | None]:
    mode = generator.integers(8, size=points)
    angle = 0.25 * np.pi * mode
    centre = 2.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centre + 0.2 * generator.standard_normal((points, 2)), mode


def _moons(generator: np.random.Generator, points: int) -> tuple[Array, Array | None]:
    moon = generator.integers(2, size=points)
    angle = np.pi * generator.random(points)
    sign = 1.0 - 2.0 * moon
    arc = np.stack([moon + sign * np.cos(angle), 0.5 * moon + sign * np.sin(angle)], axis=1)
    return arc + 0.1 * generator.standard_normal((points, 2)), moon


def _checkerboard(generator: np.random.Generator, points: int) -> tuple[Array, Array | None]:
    column, pair = generator.integers(4, size=points), generator.integers(2, size=points)
    corner = np.stack([column, 2 * pair + column % 2], axis=1)
    return corner + generator.random((points, 2)) - 2.0, None


_TOYS: dict[str, Callable[[np.random.Generator, int], tuple[Array, Array | None]]] = {
    "gaussians": _gaussians,
    "moons": _moons,
    "checkerboard": _checkerboard,
}
