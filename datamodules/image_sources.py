"""Where images come from: well-known sets, folders of idx files, folders of pictures. All give uint8 tensors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from datamodules.idx import find_idx, idx_shape, read_idx
from datamodules.pictures import decode, find_pictures, picture_shape


class Images(NamedTuple):
    """(N, C, H, W) uint8 pixels, values 0..levels-1, and (N,) int64 labels if there are classes."""

    pixels: Tensor
    labels: Tensor | None


class Source(Protocol):
    """One place with images.

    Attributes:
        shape: [C, H, W].
        classes: names of the classes; empty if the images have no labels.
        levels: number of values of a pixel.
        deviation: standard deviation of the training pixels in units of a level, if it is known beforehand.
    """

    shape: list[int]
    classes: list[str]
    levels: int
    deviation: float | None

    def prepare(self) -> None:
        """Download what is missing."""

    def load(self) -> tuple[Images, Images | None]:
        """Training images, and the test images if the set has such a split of its own."""


class NamedSet:
    """A well-known set with its usual split; scikit-learn ships the digits, torchvision downloads the others.

    digits: 1797 gray 8 x 8 digits with 17 levels (UCI, Alpaydin and Kaynak 1998); the first 1500 of
    ``torch.randperm(1797)`` with seed 0 are for training, the other 297 for testing (score_sde.md section 10).

    Args:
        name: "digits", "mnist", "fashion_mnist" or "cifar10".
        root: folder for downloads.
        download: fetch what is missing there.
    """

    # name: shape, levels, standard deviation of the training pixels in levels (digits, fashion_mnist: measured; mnist,
    # cifar10: from the channel means and deviations that are commonly used to normalise them)
    SETS = {
        "digits": ([1, 8, 8], 17, 6.014),
        "mnist": ([1, 28, 28], 256, 78.6),
        "fashion_mnist": ([1, 28, 28], 256, 90.0),
        "cifar10": ([3, 32, 32], 256, 64.2),
    }

    def __init__(self, name: str, root: str, download: bool) -> None:
        if name not in self.SETS:
            raise ValueError(f"there is no dataset {name!r}: choose one of {', '.join(self.SETS)}, or give a path")
        self.name = name
        self.root = root
        self.download = download
        shape, self.levels, deviation = self.SETS[name]
        self.shape = list(shape)
        self.deviation: float | None = deviation
        self.classes = [str(number) for number in range(10)]

    def prepare(self) -> None:
        """Download what is missing; FileNotFoundError if that fails."""
        if self.name != "digits" and self.download:
            for train in (True, False):
                self._torchvision(train, download=True)

    def load(self) -> tuple[Images, Images | None]:
        """Training and test images; FileNotFoundError if they are not there."""
        if self.name != "digits":
            return self._torchvision(True, download=False), self._torchvision(False, download=False)
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = torch.from_numpy(bunch.images.astype(np.uint8))[:, None]
        labels = torch.from_numpy(bunch.target.astype(np.int64))
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        train, test = order[:1500], order[1500:]
        return Images(pixels[train], labels[train]), Images(pixels[test], labels[test])

    def _torchvision(self, train: bool, download: bool) -> Images:
        from torchvision import datasets  # type: ignore[import-untyped]

        kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[self.name]
        try:
            data = kind(self.root, train=train, download=download)
        except (RuntimeError, OSError) as error:  # not found or damaged; no network
            raise FileNotFoundError(
                f"{self.name} is not in {self.root} and could not be downloaded: set data_dir to the folder where "
                f"torchvision keeps it, connect to the internet with download: true, or use dataset: digits"
            ) from error
        pixels = torch.as_tensor(data.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.as_tensor(data.targets).long())


class IdxFolder:
    """A folder with train-images-idx3-ubyte[.gz] and, where there are labels, train-labels-idx1-ubyte[.gz].

    If it also has t10k-images-idx3-ubyte[.gz] these are the test images.

    Args:
        folder: the folder.
        labels: read the labels too.
    """

    levels = 256
    deviation: float | None = None

    def __init__(self, folder: Path, labels: bool) -> None:
        self.folder = folder
        self.labels = labels
        file = self._file("train-images-idx3-ubyte")
        shape = idx_shape(file)
        if len(shape) != 3:
            raise ValueError(f"{file} does not hold images: its shape is {shape}, not [number, height, width]")
        self.shape = [1, *shape[1:]]
        classes = int(read_idx(self._file("train-labels-idx1-ubyte")).max()) + 1 if labels else 0
        self.classes = [str(number) for number in range(classes)]

    def prepare(self) -> None:
        """Nothing to download."""

    def load(self) -> tuple[Images, Images | None]:
        """Training images, and test images if the folder has them."""
        test = self._images("t10k") if find_idx(self.folder, "t10k-images-idx3-ubyte") else None
        return self._images("train"), test

    def _images(self, split: str) -> Images:
        file = self._file(f"{split}-images-idx3-ubyte")
        pixels = read_idx(file)[:, None]
        if not self.labels:
            return Images(pixels, None)
        labels_file = self._file(f"{split}-labels-idx1-ubyte")
        labels = read_idx(labels_file).long()
        if len(labels) != len(pixels):
            raise ValueError(f"{labels_file} has {len(labels)} labels for the {len(pixels)} images of {file}")
        return Images(pixels, labels)

    def _file(self, name: str) -> Path:
        file = find_idx(self.folder, name)
        if file is None:
            raise FileNotFoundError(f"the folder {self.folder} has no {name} or {name}.gz")
        return file


class PictureFolder:
    """A folder of pictures, searched recursively; its sub-folders are the classes.

    Args:
        folder: the folder.
        labels: the sub-folders directly below are classes.
        size: side of the images, cut and resampled; None takes the size that all pictures have.
        channels: 1 or 3; None takes those of the first picture.
        crop: side of the centred square to keep of every picture; None keeps all.
        like: the folder whose shape and classes this one must share.
    """

    levels = 256
    deviation: float | None = None

    def __init__(
        self,
        folder: Path,
        labels: bool,
        size: int | None,
        channels: int | None,
        crop: int | None,
        like: Source | None = None,
    ) -> None:
        self.crop = crop
        self.pictures = find_pictures(folder)
        self.resize = size is not None
        self.recolour = channels is not None
        if labels and not self.pictures.classes:
            raise ValueError(f"the pictures in {folder} have no classes: put each class into a sub-folder of its own")
        self.classes = (like.classes if like else self.pictures.classes) if labels else []
        strange = sorted(set(self.pictures.classes) - set(self.classes)) if labels else []
        if strange:
            raise ValueError(f"{folder} has the class {strange[0]!r}, which the training folder has not")
        self.shape = like.shape if like else picture_shape(self.pictures.files[0], size, channels, crop)

    def prepare(self) -> None:
        """Nothing to download."""

    def load(self) -> tuple[Images, Images | None]:
        """All pictures; there is no test split."""
        pixels = decode(self.pictures.files, self.shape, self.resize, self.recolour, self.crop)
        if not self.classes:
            return Images(pixels, None), None
        number = {name: place for place, name in enumerate(self.classes)}
        return Images(pixels, torch.tensor([number[name] for name in self.pictures.names])), None


def open_folder(
    path: str,
    labels: bool,
    size: int | None,
    channels: int | None,
    crop: int | None,
    like: Source | None = None,
) -> IdxFolder | PictureFolder:
    """The images in a folder, whichever of the two kinds it is; ``like`` is the training folder, if this is another.

    Raises:
        FileNotFoundError: no such folder, or neither idx files nor pictures in it.
        ValueError: see the classes.
    """
    folder = Path(path)
    if find_idx(folder, "train-images-idx3-ubyte"):
        if crop is not None:
            raise ValueError(f"crop is for pictures, and {folder} holds idx files: leave it out")
        return IdxFolder(folder, labels)
    return PictureFolder(folder, labels, size, channels, crop, like)
