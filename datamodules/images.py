"""Images as float tensors in [-1, 1]: small well-known sets and any folder of pictures."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from datamodules.base import SPLITS, DataModule, Split, require_fractions, require_positive
from datamodules.image_sources import Images, NamedSet, Source, open_folder
from datamodules.loaders import Batch, hashed, permutation, uniform

_FLIP, _DEQUANTISE, _SPLIT = 4, 5, 6  # purposes of hashes, see loaders.py
_CHUNK = 1000  # images that are resized at once


class _Part(NamedTuple):
    """A split: rows (N,) of images that it may share with other splits."""

    images: Images
    rows: Tensor


class ImageDataModule(DataModule):
    """Images in memory: a batch has ``x`` (B, C, H, W) float32 in [-1, 1], ``index`` and, with ``labels``, ``label``.

    All images are held as one uint8 tensor and become floats batch by batch. Level k of n is mapped to 2 k/(n - 1) - 1,
    or with ``dequantize`` to 2 (k + u)/n - 1, u uniform in [0, 1): a function of (seed, split, epoch, index, pixel).

    Splits: a set with a test split of its own (the four named sets, idx folders with t10k files) trains on all its
    training images and, as the papers do, validates on the test images. A folder without one is cut at random, the same
    way for every ``seed``.

    ``spec``: kind "image", shape [C, H, W], classes (0 without ``labels``), levels, range [-1, 1], dequantized,
    sigma_data: the standard deviation of the training values (for EDM's preconditioning, Karras et al. 2022); None
    before ``setup`` for folders and resampled sets.

    Args:
        dataset: "digits" (1797 gray 8 x 8 images with 17 levels, shipped with scikit-learn; 1500 for training, 297 for
            validation and test), or "mnist", "fashion_mnist", "cifar10" by torchvision.
        path: folder of pictures (png, jpg, jpeg, webp, bmp; recursive; sub-folders are classes) or of idx files, which
            takes the place of ``dataset``.
        val_path: folder of validation images; None: see above.
        test_path: folder of test images; None: see above.
        size: side of the images. Pictures lose what does not fit a square and are resampled; named sets and idx files
            are resampled. None keeps the size, which must then be the same for all pictures.
        crop: side of the centred square to keep of every picture, before it is resampled (140 for CelebA); None: all.
        channels: 1 or 3 turns pictures gray or coloured; None does as the first picture.
        labels: give class labels.
        flip: mirror training images left to right, each with probability 1/2. None does so for cifar10 only.
        dequantize: see above; for likelihoods.
        val_fraction: part of a folder for validation.
        test_fraction: part of a folder for testing.
        data_dir: folder for downloads.
        download: fetch a named set that is not in ``data_dir``.
        batch_size: examples per batch and process.
        seed: of the order, the mirroring and the dequantisation.

    Raises:
        ValueError: an argument out of range, a broken picture, pictures of different sizes without ``size``.
        FileNotFoundError: no such folder, no images in it, or a set that cannot be downloaded.
    """

    def __init__(
        self,
        dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits",
        path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        size: int | None = None,
        crop: int | None = None,
        channels: Literal[1, 3] | None = None,
        labels: bool = False,
        flip: bool | None = None,
        dequantize: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        data_dir: str = "data",
        download: bool = True,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        require_fractions(val_fraction, test_fraction)
        if size is not None:
            require_positive(size=size)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if crop is not None:
            require_positive(crop=crop)
        if path is None and (val_path or test_path or channels or crop):
            raise ValueError(
                "val_path, test_path, channels and crop belong to a path: give the folder of training images"
            )
        self.labels, self.size, self.dequantize = labels, size, dequantize
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.flip = (path is None and dataset == "cifar10") if flip is None else flip
        self._source: Source = (
            NamedSet(dataset, data_dir, download) if path is None else open_folder(path, labels, size, channels, crop)
        )
        self._others: dict[str, Source] = {
            split: open_folder(place, labels, size, channels, crop, self._source)
            for split, place in (("val", val_path), ("test", test_path))
            if place is not None
        }
        self._parts: dict[str, _Part] = {}
        shape = self._source.shape if size is None else [self._source.shape[0], size, size]
        deviation = self._source.deviation if shape == self._source.shape else None
        self.spec = {
            "kind": "image",
            "shape": list(shape),
            "classes": len(self._source.classes) if labels else 0,
            "levels": self._source.levels,
            "range": [-1.0, 1.0],
            "dequantized": dequantize,
            "sigma_data": self._sigma(deviation) if deviation else None,
        }

    def prepare_data(self) -> None:
        """Download a named set that is missing; nothing for folders."""
        self._source.prepare()

    def load(self) -> None:
        """Read all images into memory and cut the splits."""
        main, official = (self._fit(images) if images else None for images in self._source.load())
        assert main is not None
        given = {split: self._fit(source.load()[0]) for split, source in self._others.items()}
        rows = torch.arange(len(main.pixels))
        for split, fraction in (("val", self.val_fraction), ("test", self.test_fraction)):
            images = given.get(split, official)
            if images is not None:
                self._parts[split] = _Part(images, torch.arange(len(images.pixels)))
                continue
            shuffled = permutation(len(main.pixels), _SPLIT)
            count = max(1, round(len(main.pixels) * fraction))
            taken = shuffled[:count] if split == "val" else shuffled[len(shuffled) - count :]
            self._parts[split] = _Part(main, taken.sort().values)
            rows = rows[~torch.isin(rows, taken)]
        if not len(rows):
            raise ValueError(f"{len(main.pixels)} images are too few to cut training, validation and test images from")
        self._parts["train"] = _Part(main, rows)
        if self.spec["sigma_data"] is None:
            self.spec = {**self.spec, "sigma_data": self._sigma(_deviation(main.pixels, rows))}

    def count(self, split: Split) -> int:
        """Number of images of a split."""
        return len(self._parts[split].rows)

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Images ``index`` (B,) of a split: x (B, C, H, W) float32, and label (B,) int64 with ``labels``."""
        images, rows = self._parts[split]
        rows = rows[index]
        pixels = images.pixels.index_select(0, rows)  # much faster than pixels[rows]
        if self.flip and split == "train" and epoch is not None:
            mirrored = hashed(index, self.seed, epoch, _FLIP) % np.uint64(2) == 1
            view = pixels.numpy()  # shares memory; numpy turns bytes round faster than torch
            view[mirrored] = view[mirrored][..., ::-1]
        levels = self.spec["levels"]
        if self.dequantize:
            x = (pixels + self._noise(split, index, epoch or 0)).sub_(levels / 2).div_(levels / 2)
        else:
            x = pixels.float().sub_((levels - 1) / 2).div_((levels - 1) / 2)
        if not self.labels:
            return {"x": x}
        assert images.labels is not None
        return {"x": x, "label": images.labels[rows]}

    def _noise(self, split: Split, index: Tensor, epoch: int) -> Tensor:
        """Uniform (B, C, H, W) in [0, 1) for dequantisation."""
        seeds = hashed(index, self.seed, epoch, SPLITS.index(split), _DEQUANTISE)
        return torch.from_numpy(uniform(seeds, math.prod(self.spec["shape"]))).view(-1, *self.spec["shape"])

    def _fit(self, images: Images) -> Images:
        """Images of the spec's size, checked."""
        pixels, shape = images.pixels, self.spec["shape"]
        if not len(pixels):
            raise ValueError("a set of images is empty")
        if self.size is not None and list(pixels.shape[1:]) != shape:
            pieces = [
                functional.interpolate(piece.float(), shape[1:], mode="bilinear", antialias=True).round_().byte()
                for piece in pixels.split(_CHUNK)
            ]
            pixels = torch.cat(pieces)
        if list(pixels.shape[1:]) != shape:
            raise ValueError(f"validation or test images have shape {list(pixels.shape[1:])}, training images {shape}")
        return Images(pixels, images.labels)

    def _sigma(self, deviation: float) -> float:
        """Standard deviation in [-1, 1] from that in levels; dequantisation adds the 1/12 of a uniform."""
        levels = self._source.levels
        if self.dequantize:
            return 2 * math.sqrt(deviation**2 + 1 / 12) / levels
        return 2 * deviation / (levels - 1)


def _deviation(pixels: Tensor, rows: Tensor) -> float:
    """Standard deviation of the pixels of the images ``rows``, in levels; exact, from the counts of the levels."""
    counts = torch.zeros(256, dtype=torch.int64)
    for part in rows.split(_CHUNK):
        counts += pixels[part].flatten().bincount(minlength=256)
    level = torch.arange(256, dtype=torch.float64)
    share = counts / counts.sum()
    mean = (share * level).sum()
    return float((share * (level - mean) ** 2).sum().sqrt())
