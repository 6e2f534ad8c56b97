"""Image files for the tests of the data modules."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import torch
from PIL import Image

from datamodules import ImageDataModule

SPLITS = ("train", "val", "test")


def everything(data, split, key="x"):
    return torch.cat([batch[key] for batch in data.eval_loader(split)])


def ready(**arguments):
    data = ImageDataModule(**arguments)
    data.setup()
    return data


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8), mode).save(path)
    return path


def gray_folder(folder, count, classes=("",)):
    """2 x 2 gray pictures; picture i has the values i, i, i, 255 - i."""
    for number in range(count):
        name = f"{number:03d}.png"
        save(folder / classes[number % len(classes)] / name, [[number, number], [number, 255 - number]])
    return str(folder)


def write_idx(path, array):
    array = np.asarray(array, dtype=np.uint8)
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(header + array.tobytes())


def idx_folder(folder, ending="", size=4, train=20, test=6):
    generator = np.random.default_rng(0)
    sets = {}
    for name, count in (("train", train), ("t10k", test)):
        sets[name] = generator.integers(0, 256, (count, size, size)), np.arange(count) % 3
        write_idx(folder / f"{name}-images-idx3-ubyte{ending}", sets[name][0])
        write_idx(folder / f"{name}-labels-idx1-ubyte{ending}", sets[name][1])
    return sets
