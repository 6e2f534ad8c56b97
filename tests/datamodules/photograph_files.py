"""Small photographs whose pixels say where they are, and data modules of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from datamodules import SuperResolutionDataModule
from tests.datamodules.image_files import save


def ready(**arguments):
    data = SuperResolutionDataModule(**arguments)
    data.setup()
    return data


def map_of(height, width, number=0):
    """A picture whose pixels say where they are: red the row, green the column, blue the picture."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([rows, columns, np.full_like(rows, number)], -1)


def maps(folder, count=5, height=24, width=32):
    for number in range(count):
        save(folder / f"{number:02d}.png", map_of(height, width, number))
    return str(folder)


def levels(x):
    """[-1, 1] to 0..255, exact."""
    values = (x + 1) * 127.5
    assert (values - values.round()).abs().max() < 1e-4
    return values.round().long()


SMALL: dict[str, Any] = {"factor": 4, "crop": 8, "crops_per_image": 16, "eval_size": 8, "eval_crops": 6}


def pairs(folder, factor=2, count=6):
    for number in range(count):
        save(folder / "gt" / "deep" / f"{number:02d}.png", map_of(12 * factor, 16 * factor, number))
        save(folder / "lq" / "deep" / f"{number:02d}.bmp", map_of(12, 16, 100 + number))
    return folder
