"""Folders of pictures: finding them, their classes, decoding them into one uint8 tensor."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MODES = {1: "L", 3: "RGB"}
_MEMORY = 0.8  # part of the machine's memory that pictures may take


class Pictures(NamedTuple):
    """Picture files in sorted order and the class of each; no classes if a picture lies directly in the folder."""

    files: list[Path]
    names: list[str]
    classes: list[str]


def find_pictures(folder: Path) -> Pictures:
    """All pictures below a folder; the sub-folders directly below it are the classes if they hold all pictures.

    Files and folders whose name begins with a dot are passed over.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a folder of pictures or of idx files")
    inside = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    inside = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    if not inside:
        raise FileNotFoundError(f"no pictures ({', '.join(ENDINGS)}) and no idx files in the folder {folder}")
    names = [file.parts[0] for file in inside] if all(len(file.parts) > 1 for file in inside) else []
    return Pictures([folder / file for file in inside], names, sorted(set(names)))


def picture_shape(file: Path, size: int | None, channels: int | None, crop: int | None) -> list[int]:
    """[C, H, W] that ``decode`` should give a folder whose first picture is ``file``: its own where None is given."""
    image = _cropped(_open(file), file, crop)
    if channels is None:
        channels = 1 if image.mode == "L" else 3
    return [channels, image.height, image.width] if size is None else [channels, size, size]


def decode(files: Sequence[Path], shape: Sequence[int], resize: bool, recolour: bool, crop: int | None) -> Tensor:
    """Decode pictures into one tensor, several at a time.

    Args:
        files: N pictures.
        shape: [C, H, W] of all of them; C is 1 or 3.
        resize: cut the largest centred part of the right proportions and resample it (Lanczos); False: a picture of
            another size is an error.
        recolour: turn colours into gray where C = 1; False: a coloured picture is an error.
        crop: side of the centred square to keep of every picture, before anything else; None keeps all.

    Returns:
        (N, C, H, W) uint8, RGB or gray. Transparent parts lie on white, photographs are turned upright.

    Raises:
        ValueError: a picture that cannot be read, is too small, has another size, or colours where C = 1; too many for
            the memory.
    """
    needed, present = len(files) * int(np.prod(shape)), _physical_memory()
    if needed > _MEMORY * present:
        raise ValueError(
            f"{len(files)} pictures of shape {list(shape)} need {needed / 2**30:.1f} GiB of memory and this machine "
            f"has {present / 2**30:.1f}: give a smaller size or fewer pictures"
        )
    images = np.empty((len(files), *shape), dtype=np.uint8)

    def put(place: int) -> None:
        images[place] = _pixels(files[place], shape, resize, recolour, crop)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(put, range(len(files))):  # consumes the results, so that the first error is raised
            pass
    return torch.from_numpy(images)


def _open(file: Path) -> Image.Image:
    """A picture as gray or RGB, upright, without transparency."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits per channel, convert it to 8")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {file}: {error}") from error


def _cropped(image: Image.Image, file: Path, crop: int | None) -> Image.Image:
    """The centred square of side ``crop``."""
    if crop is None:
        return image
    if min(image.size) < crop:
        raise ValueError(f"{file} is {image.width} x {image.height} pixels, too small for crop: {crop}")
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    return image.crop((left, top, left + crop, top + crop))


def _pixels(file: Path, shape: Sequence[int], resize: bool, recolour: bool, crop: int | None) -> NDArray[np.uint8]:
    """(C, H, W) uint8 of one picture."""
    channels, height, width = shape
    image = _cropped(_open(file), file, crop)
    if channels == 1 and image.mode != "L" and not recolour:
        raise ValueError(f"{file} is in colour and the first picture is gray: set channels to 1 or 3")
    if resize:
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    elif image.size != (width, height):
        raise ValueError(
            f"{file} is {image.width} x {image.height} pixels and the first picture {width} x {height}: set size"
        )
    pixels = np.asarray(image.convert(_MODES[channels]), dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _physical_memory() -> int:
    """Bytes of memory of this machine."""
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
