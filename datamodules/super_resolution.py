"""Pairs of low- and high-resolution photographs for super-resolution and restoration."""

from __future__ import annotations

import math
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from datamodules.base import SPLITS, DataModule, Split, require_positive
from datamodules.degradation import degrade, smallest_side
from datamodules.loaders import Batch, EvalLoader, hashed, uniform
from datamodules.photographs import Files, Photograph, decode, folder_files, named_set, shrink, split_files

_PLACE, _DEGRADE = 13, 14  # purposes of hashes, see loaders.py
_FIXED = -1  # the epoch of examples that do not change
_LOOKED_AT = 256  # training crops whose residuals give sigma_residual


class _Crops(NamedTuple):
    """Where B crops lie: photograph, top and left in pixels of the low resolution, whether mirrored; each (B,)."""

    photograph: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


class SuperResolutionDataModule(DataModule):
    """Photographs in memory: a batch has ``x`` (B, 3, H, W), ``low`` (B, 3, H / factor, W / factor) and ``index``.

    Both are float32 in [-1, 1], level k of 256 being 2 k / 255 - 1. A training example is a random square of a
    photograph, a function of (seed, epoch, index), or of (seed, index) if ``fixed``. Validation and test judge the same
    squares in every epoch and for every ``seed``, or whole photographs, one in a batch. (``examples`` cuts whole
    photographs of different sizes to their common middle.) Photographs, never squares of one, are held out.

    The low resolution is Pillow's bicubic reduction of the photograph ("bicubic"), Real-ESRGAN's random degradation of
    the square ("blind", see ``datamodules.degradation``; some milliseconds of a CPU for each), or comes as files: a
    folder with sub-folders gt and lq, or ``path`` and ``low_path``, whose pictures have equal names. With factor 1
    these pairs may be any restoration.

    ``spec``: kind "image", shape [3, crop, crop], low_shape, factor, fixed, classes 0, levels 256, range [-1, 1],
    dequantized False; sigma_data, the standard deviation of training values, and sigma_residual, that of training crops
    minus their bicubically enlarged low resolution (both None before ``setup``).

    Args:
        dataset: "packages": three photographs that come with scikit-learn and matplotlib (china held out); "skimage":
            nine more of scikit-image, which must be installed (coffee held out too); "budgie": 18 of Debian's
            budgie-backgrounds (CC0).
        path: folder of pictures (png, jpg, jpeg, webp, bmp; recursive), or of pairs, which takes the place of
            ``dataset``.
        low_path: folder of the low-resolution partners of the pictures in ``path``.
        test_path: folder like ``path`` for validation and test, then all of ``path`` is for training; None: see
            ``hold_out``.
        factor: high over low resolution, 1 for pairs of equal size.
        crop: side of training squares, in pixels of the high resolution.
        crops_per_image: squares of each photograph in an epoch.
        degradation: how the low resolution is made, where there are no pairs.
        long_side: shrink larger photographs until their longer side has so many pixels (removes traces of JPEG).
        short_side: the same for the shorter side; as long as ``crop`` this is the papers' training on ImageNet.
        flip: mirror training squares left to right, each with probability 1/2.
        fixed: the same squares (places, mirroring, degradation) in every epoch, so that example ``index`` is one pair
            for good, wherever it is asked for; what a teacher makes of it can then be kept under ``fingerprint``.
        hold_out: of a folder's sorted files the first and every so many after it are for validation and test both.
        val_fraction: part of a folder for validation, at random; with ``test_fraction`` instead of ``hold_out``.
        test_fraction: part of a folder for testing.
        eval_crops: number of squares for validation, and for test; None: whole photographs.
        eval_size: side of these squares.
        eval_seed: of the places of these squares, and of their blind degradation.
        batch_size: examples per batch and process.
        seed: of the order, the training squares and their degradation.

    Raises:
        ValueError: an argument out of range; a picture that is broken, smaller than a square or without partner.
        FileNotFoundError: no such folder, no pictures in it, or a set that is not installed.
    """

    def __init__(
        self,
        dataset: Literal["packages", "skimage", "budgie"] = "packages",
        path: str | None = None,
        low_path: str | None = None,
        test_path: str | None = None,
        factor: int = 4,
        crop: int = 64,
        crops_per_image: int = 64,
        degradation: Literal["bicubic", "blind"] = "bicubic",
        long_side: int | None = None,
        short_side: int | None = None,
        flip: bool = True,
        fixed: bool = False,
        hold_out: int = 5,
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        eval_crops: int | None = 24,
        eval_size: int = 128,
        eval_seed: int = 0,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        require_positive(factor=factor, crop=crop, crops_per_image=crops_per_image, eval_size=eval_size)
        self.factor, self.crop, self.crops_per_image, self.flip = factor, crop, crops_per_image, flip
        self.fixed, self.degradation, self.long_side, self.short_side = fixed, degradation, long_side, short_side
        self.eval_crops, self.eval_size, self.eval_seed = eval_crops, eval_size, eval_seed
        if path is None:
            if low_path is not None or test_path is not None or val_fraction is not None or test_fraction is not None:
                raise ValueError("low_path, test_path, val_fraction and test_fraction belong to a path: give one")
            self._files: dict[Split, list[Files]] = named_set(dataset, hold_out)
        else:
            files = folder_files(Path(path), Path(low_path) if low_path else None)
            self._files = split_files(files, test_path, hold_out, val_fraction, test_fraction)
        self._check()
        self._photographs: dict[Split, list[Photograph]] = {}
        self.spec = {
            "kind": "image",
            "shape": [3, crop, crop],
            "low_shape": [3, crop // factor, crop // factor],
            "factor": factor,
            "fixed": fixed,
            "classes": 0,
            "levels": 256,
            "range": [-1.0, 1.0],
            "dequantized": False,
            "sigma_data": None,
            "sigma_residual": None,
        }

    def _check(self) -> None:
        """Compare the arguments with each other and with the files."""
        if self.degradation not in ("bicubic", "blind"):
            raise ValueError(f"there is no degradation {self.degradation!r}: choose bicubic or blind")
        given = {"eval_crops": self.eval_crops, "long_side": self.long_side, "short_side": self.short_side}
        require_positive(**{name: value for name, value in given.items() if value is not None})
        sides = {"crop": self.crop} | ({} if self.eval_crops is None else {"eval_size": self.eval_size})
        least = smallest_side(self.factor) if self.degradation == "blind" else 1
        paired = [entry for files in self._files.values() for entry in files if entry.low]
        for name, side in sides.items():
            if side % self.factor:
                raise ValueError(f"{name} must be divisible by the factor {self.factor}, got {side}")
            if side < least:
                raise ValueError(f"{name} must be at least {least} for the blind degradation, got {side}")
        if paired and (self.long_side or self.short_side or self.degradation != "bicubic"):
            raise ValueError(
                f"{paired[0].high} has a low-resolution partner to use: leave out long_side, short_side and degradation"
            )

    def load(self) -> None:
        """Decode all photographs, reduce them where that is done once, and look at the training values."""
        known: dict[Path, Photograph] = {}
        remarks: list[str] = []
        for split, files in self._files.items():
            fresh = [entry for entry in files if entry.high not in known]
            decoded, found = decode(fresh, self.factor, self.long_side, self.short_side)
            remarks += found
            for photograph in decoded:
                self._check_size(photograph, split)
                known[photograph.file] = self._with_low(photograph)
        if remarks:
            warnings.warn(f"{len(remarks)} pictures become RGB with 8 bits per colour: {remarks[0]}", stacklevel=2)
        self._photographs = {split: [known[entry.high] for entry in files] for split, files in self._files.items()}
        self.spec = {**self.spec, "sigma_data": self._sigma_data(), "sigma_residual": self._sigma_residual()}

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the training pairs, for caches of what is computed from them.

        Other pixels (not names) or order of the training photographs, or another argument on which their pairs depend,
        give another one; changes of the code do not. Loads the data where that has not happened.
        """
        self.setup()
        told = (self.seed, self.fixed, self.factor, self.crop, self.crops_per_image, self.flip, self.degradation)
        pixels = [part for _, *parts in self._photographs["train"] for part in parts if part is not None]
        found = sha256(repr((told, [tuple(part.shape) for part in pixels])).encode())
        for part in pixels:
            found.update(part.numpy().data)
        return found.hexdigest()[:16]

    def _with_low(self, photograph: Photograph) -> Photograph:
        """With a low resolution, except for the blind degradation, which differs from crop to crop."""
        if photograph.low is not None or self.degradation == "blind":
            return photograph
        return photograph._replace(low=shrink(photograph.high, self.factor))

    def _check_size(self, photograph: Photograph, split: Split) -> None:
        """Raise a ValueError if a photograph is smaller than what is cut out of it."""
        name, least = ("crop", self.crop) if split == "train" else ("eval_size", self.eval_size)
        reason = f"{name}: {least}"
        if split != "train" and self.eval_crops is None:
            least = smallest_side(self.factor) if self.degradation == "blind" else self.factor
            reason = f"the degradation, which needs {least}"
        height, width = photograph.high.shape[-2:]
        if min(height, width) < least:
            raise ValueError(
                f"{photograph.file} has {width} x {height} pixels to use, too few for {reason}: leave it out, or "
                f"give smaller squares"
            )

    def count(self, split: Split) -> int:
        """Number of crops, or of whole photographs."""
        if split == "train":
            return len(self._files["train"]) * self.crops_per_image
        return len(self._files[split]) if self.eval_crops is None else self.eval_crops

    def eval_loader(self, split: Split) -> EvalLoader:
        """All examples of any split once; whole photographs one by one, since they have different sizes."""
        loader = super().eval_loader(split)
        if split != "train" and self.eval_crops is None:
            loader.batch_size = 1
        return loader

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Crops or photographs ``index`` (B,) of a split: x (B, 3, H, W) and low (B, 3, H / f, W / f), float32."""
        if split == "train":
            clock = _FIXED if self.fixed or epoch is None else epoch
            high, low = self._train_pairs(index, self.seed, clock, self.flip and (self.fixed or epoch is not None))
        else:
            seeds = hashed(index, self.eval_seed, SPLITS.index("test"), _DEGRADE)  # equal in validation and test
            high, low = self._pairs(self._photographs[split], *self._eval_places(split, index), seeds)
        return {"x": _values(high), "low": _values(low)}

    def _train_pairs(self, index: Tensor, seed: int, clock: int, flip: bool) -> tuple[Tensor, Tensor]:
        """Training pairs (uint8), functions of (seed, clock, index)."""
        photographs = self._photographs["train"]
        drawn = uniform(hashed(index, seed, clock, _PLACE), 3)
        side = self.crop // self.factor
        crops = self._scattered(photographs, index.numpy() // self.crops_per_image, drawn, side)
        crops = crops._replace(mirrored=flip & (drawn[:, 2] < 0.5))
        return self._pairs(photographs, crops, (side, side), hashed(index, seed, clock, _DEGRADE))

    def _eval_places(self, split: Split, index: Tensor) -> tuple[_Crops, tuple[int, int]]:
        """Crops for evaluation and their sides in low resolution: photographs take turns; or their common middle."""
        photographs = self._photographs[split]
        if self.eval_crops is not None:
            drawn = uniform(hashed(index, self.eval_seed, _PLACE), 2)
            side = self.eval_size // self.factor
            return self._scattered(photographs, index.numpy() % len(photographs), drawn, side), (side, side)
        number = index.numpy()
        sizes = self._low_sizes(photographs)[number]
        least = sizes.min(0)
        top, left = ((sizes - least) // 2).T
        return _Crops(number, top, left, np.zeros(len(number), dtype=bool)), (int(least[0]), int(least[1]))

    def _low_sizes(self, photographs: list[Photograph]) -> NDArray[np.int64]:
        """(N, 2) heights and widths in low resolution."""
        return np.array([photograph.high.shape[-2:] for photograph in photographs]) // self.factor

    def _scattered(
        self, photographs: list[Photograph], number: NDArray[np.int64], drawn: NDArray[np.float32], side: int
    ) -> _Crops:
        """Squares of photographs ``number`` (B,) at uniform places, from ``drawn`` (B, 2 or more) in [0, 1)."""
        free = self._low_sizes(photographs)[number] - side + 1
        top, left = np.minimum((drawn[:, :2] * free).astype(np.int64), free - 1).T
        return _Crops(number, top, left, np.zeros(len(number), dtype=bool))

    def _pairs(
        self, photographs: list[Photograph], crops: _Crops, size: tuple[int, int], seeds: NDArray[np.uint64]
    ) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) and (B, 3, h, w) uint8 of crops with ``size`` (h, w) in low resolution."""
        mirrored = torch.from_numpy(crops.mirrored)[:, None, None, None]

        def cut(images: list[Tensor], scale: int) -> Tensor:
            height, width = (scale * side for side in size)
            places = zip(images, (crops.top * scale).tolist(), (crops.left * scale).tolist(), strict=True)
            cuts = torch.stack([image[:, top : top + height, left : left + width] for image, top, left in places])
            return torch.where(mirrored, cuts.flip(-1), cuts)

        chosen = [photographs[number] for number in crops.photograph]
        high = cut([photograph.high for photograph in chosen], self.factor)
        stored = [photograph.low for photograph in chosen if photograph.low is not None]
        return high, cut(stored, 1) if stored else degrade(high, self.factor, seeds)

    def _sigma_data(self) -> float:
        """Standard deviation of all training pixels in [-1, 1]; exact, from the counts of the levels."""
        counts = torch.zeros(256, dtype=torch.int64)
        for photograph in self._photographs["train"]:
            counts += photograph.high.flatten().bincount(minlength=256)
        share, level = counts / counts.sum(), torch.arange(256, dtype=torch.float64) / 127.5
        mean = (share * level).sum()
        return float((share * (level - mean) ** 2).sum().sqrt())

    def _sigma_residual(self) -> float:
        """Standard deviation of crops minus enlarged low resolution, of some crops that no seed changes."""
        index = torch.arange(0, self.count("train"), math.ceil(self.count("train") / _LOOKED_AT))
        high, low = map(_values, self._train_pairs(index, 0, _FIXED, False))
        enlarged = functional.interpolate(low, high.shape[-2:], mode="bicubic")
        return float((high - enlarged).double().std(correction=0))


def _values(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float().sub_(127.5).div_(127.5)
