"""Pictures from files as a task needs them: exactly of the model's size and channels, or an error that says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OVERVIEW = "samples.png"


def read_pictures(path: str | Path, shapes: Sequence[Sequence[int]]) -> Tensor:
    """A picture, or those directly in a folder in the order of their names (without the overview of ``predict``).

    Args:
        path: the file or folder.
        shapes: (C, H, W) that the pictures may have, C = 1 for gray and 3 for colour ones.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        FileNotFoundError: no such file or folder, or no picture in it.
        ValueError: a picture that cannot be read or has another shape than the ``shapes``, or than the first one.
    """
    files = _files(Path(path))
    images = [_read(file) for file in files]
    allowed = [tuple(shape) for shape in shapes]
    for file, image in zip(files, images, strict=True):
        if image.shape not in allowed:
            wanted = " or ".join(dict.fromkeys(_described(shape) for shape in allowed))
            raise ValueError(f"{file} is {_described(image.shape)}, but {wanted} is needed: convert it first")
        if image.shape != images[0].shape:
            raise ValueError(
                f"{file} is {_described(image.shape)} and {files[0]} {_described(images[0].shape)}: give pictures of "
                "one kind"
            )
    return torch.stack(images)


def read_mask(path: str | Path, height: int, width: int) -> Tensor:
    """What a picture shows in white (half of the range or more), as (H, W) bool.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read or is not ``height`` x ``width``.
    """
    image = _read(Path(path)).float().mean(0)
    if image.shape != (height, width):
        raise ValueError(
            f"the mask {path} is {image.shape[1]} x {image.shape[0]} pixels, but the model's images are "
            f"{width} x {height}: draw it in that size"
        )
    return image >= 127.5


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"there is no picture or folder of pictures {path}")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.name[0] != ".")
    found = [file for file in found if file.name != _OVERVIEW]
    if not found:
        raise FileNotFoundError(f"there are no pictures ({', '.join(ENDINGS)}) in the folder {path}")
    return found


def _read(file: Path) -> Tensor:
    """(1 or 3, H, W) uint8, upright; transparency is dropped."""
    from PIL import Image, ImageOps

    if not file.is_file():
        raise FileNotFoundError(f"there is no picture {file}")
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits per channel, convert it to 8")
            pixels = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {file}: {error}") from error
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def _described(shape: Sequence[int]) -> str:
    """For people: "16 x 8 in gray"."""
    colour = {1: "in gray", 3: "in colour"}.get(shape[0], f"with {shape[0]} channels")
    return f"{shape[2]} x {shape[1]} {colour}" if len(shape) == 3 else f"an array of shape {tuple(shape)}"
