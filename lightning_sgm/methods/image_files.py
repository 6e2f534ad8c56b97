"""Pictures from files: exactly as a task needs them or an error that says so, or of any size and kind, converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OVERVIEW, _PANELS = "samples.png", "panels"


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


class Pictures(Sequence[dict[str, Any]]):
    """A picture, or all in a folder and the folders in it, as batches of one that are read when they are asked for.

    A batch has ``low`` (1, 3, h, w) float32 in [-1, 1], level k of 256 being 2 k / 255 - 1, ``index`` (1,) int64, the
    number of the picture, and ``name``, a list of one text: the path in the folder, with / and without the ending. Of
    pictures that differ only in their endings it keeps those. What is not 8-bit colour is converted, which is said
    once: gray repeated, transparency dropped, 16 bits scaled to 8 (Pillow rounds those of colour down). Every picture
    is looked at beforehand, so that a broken one is named before hours pass.

    In a folder hidden files and what ``predict`` adds to pictures, ``samples.png`` and ``panels/``, are left out.

    Args:
        path: the file or folder.

    Raises:
        FileNotFoundError: no such file or folder, or no picture in it.
        ValueError: a picture that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        root = Path(path)
        self.files = _files(root, deep=True)
        paths = [file.name if root.is_file() else file.relative_to(root).as_posix() for file in self.files]
        self.names = _names(paths)
        converted = [(file, notes) for file in self.files if (notes := _look(file))]
        if converted:
            counts = Counter(note for _, notes in converted for note in notes)
            rank_zero_warn(
                f"{len(converted)} of {len(self.files)} pictures are converted to 8-bit colour "
                f"({', '.join(f'{note}: {count}' for note, count in counts.items())}), the first of them "
                f"{converted[0][0]}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: Any) -> Any:
        """The batch of a picture; a list of them for a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        i = range(len(self))[number]
        pixels = _read(self.files[i], reduce=True).expand(3, -1, -1)
        low = pixels[None].float() * (2.0 / 255.0) - 1.0
        return {"low": low, "index": torch.tensor([i]), "name": [self.names[i]]}


def _names(paths: Sequence[str]) -> list[str]:
    """Paths without their endings, or with them where two would be the same or the overview."""
    names = [path.rpartition(".")[0] or path for path in paths]
    while clashes := {name for name, count in Counter([*names, Path(_OVERVIEW).stem]).items() if count > 1}:
        # A path with its ending may be another one without: until nothing changes.
        names = [path if name in clashes else name for path, name in zip(paths, names, strict=True)]
    return names


def _look(file: Path) -> tuple[str, ...]:
    """What has to be converted in a picture, which is read for once."""
    from PIL import Image

    _read(file, reduce=True)
    with Image.open(file) as image:
        notes = {
            "gray": image.mode in ("1", "L", "LA") or image.mode[0] == "I",
            "transparency dropped": image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info,
            "16 bits": image.mode[0] == "I" or _is_deep(image),
            image.mode: image.mode in ("CMYK", "YCbCr", "LAB", "HSV"),
        }
    return tuple(note for note, applies in notes.items() if applies)


def _is_deep(image: Any) -> bool:
    """Whether Pillow is about to leave out the lower half of 16 bits per channel, as it does in colour."""
    return any("16" in str(tile[3]) for tile in getattr(image, "tile", []))


def _files(path: Path, deep: bool = False) -> list[Path]:
    """The file, or the pictures in the folder; ``deep`` for those in the folders in it too."""
    if not path.exists():
        raise FileNotFoundError(f"there is no picture or folder of pictures {path}")
    if path.is_file():
        return [path]
    inside = [file.relative_to(path) for file in (path.rglob("*") if deep else path.iterdir())]
    found = sorted(
        (file for file in inside if file.suffix.lower() in ENDINGS and not any(part[0] == "." for part in file.parts)),
        key=Path.as_posix,
    )
    found = [file for file in found if file != Path(_OVERVIEW) and file.parts[0] != _PANELS and (path / file).is_file()]
    if not found:
        raise FileNotFoundError(f"there are no pictures ({', '.join(ENDINGS)}) in the folder {path}")
    return [path / file for file in found]


def _read(file: Path, reduce: bool = False) -> Tensor:
    """(1 or 3, H, W) uint8, upright; transparency is dropped. ``reduce`` scales 16 bits per channel to 8."""
    from PIL import Image, ImageOps

    if not file.is_file():
        raise FileNotFoundError(f"there is no picture {file}")
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF":
                if not reduce or image.mode == "F":
                    raise ValueError("it has more than 8 bits per channel, convert it to 8")
                pixels = _reduced(np.array(image))
            else:
                pixels = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {file}: {error}") from error
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def _reduced(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit levels to the nearest of 8 bits: 65535 is 255."""
    levels = pixels.astype(np.int64)
    if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
        raise ValueError("it has more than 16 bits per channel, convert it to 8")
    return ((levels + 128) // 257).astype(np.uint8)


def _described(shape: Sequence[int]) -> str:
    """For people: "16 x 8 in gray"."""
    colour = {1: "in gray", 3: "in colour"}.get(shape[0], f"with {shape[0]} channels")
    return f"{shape[2]} x {shape[1]} {colour}" if len(shape) == 3 else f"an array of shape {tuple(shape)}"
