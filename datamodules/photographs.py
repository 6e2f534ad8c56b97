"""Photographs of any size: sets that come with installed packages, folders, folders of pairs; decoded to uint8."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from datamodules.base import SPLITS, Split, require_fractions
from datamodules.loaders import permutation
from datamodules.pictures import find_pictures

BACKGROUNDS = Path("/usr/share/backgrounds/budgie")  # where Debian's package budgie-backgrounds puts them
# Places of photographs in packages and their names.
_INSTALLED = {
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "matplotlib/mpl-data/sample_data": ("grace_hopper.jpg",),
}
_SKIMAGE = {
    "skimage/data": (
        *("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png"),
        *("motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg"),
    )
}
_SETS = {"packages": _INSTALLED, "skimage": _INSTALLED | _SKIMAGE}
_SPLIT = 6  # purpose of a hash, see loaders.py
_HELD_OUT = ("china.jpg", "coffee.png")


class Files(NamedTuple):
    """A photograph's files: the high-resolution picture and, for pairs, the low-resolution one."""

    high: Path
    low: Path | None = None


class Photograph(NamedTuple):
    """A decoded photograph: its file, and (3, H, W) uint8 pixels in high and perhaps in low resolution."""

    file: Path
    high: Tensor
    low: Tensor | None


def named_set(name: str, every: int) -> dict[Split, list[Files]]:
    """Files of a well-known set by split; those held out are for validation and test both.

    "packages": china and flower of scikit-learn, grace_hopper of matplotlib; china is held out. "skimage": also nine
    photographs of scikit-image; coffee is held out too. "budgie": Debian's budgie-backgrounds (18, CC0).

    Args:
        name: of the set.
        every: "budgie" holds out its first picture and every so many after it.

    Raises:
        ValueError: there is no such set.
        FileNotFoundError: the package is not installed.
    """
    if name == "budgie":
        if not BACKGROUNDS.is_dir():
            raise FileNotFoundError(
                f"no folder {BACKGROUNDS}: `apt-get install budgie-backgrounds` as root, or unpack that package "
                f"anywhere (apt-get download, dpkg-deb -x) and give its folder as path"
            )
        return split_files(folder_files(BACKGROUNDS, None), None, every, None, None)
    if name not in _SETS:
        raise ValueError(f"there is no dataset {name!r}: choose one of {', '.join(_SETS)}, budgie, or give a path")
    files = [_inside(place, file) for place, names in _SETS[name].items() for file in names]
    held = [Files(file) for file in files if file.name in _HELD_OUT]
    return {"train": [Files(file) for file in files if file.name not in _HELD_OUT], "val": held, "test": held}


def _inside(place: str, name: str) -> Path:
    """A file of an installed package, which is not imported."""
    package, _, folder = place.partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the photograph {name} comes with {package}, which is not installed: `pip install scikit-image`, "
            f"choose dataset: packages, or give a path"
        )
    file = Path(spec.submodule_search_locations[0]) / folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{package} is installed without its photograph {file}: give a path")
    return file


def folder_files(folder: Path, low: Path | None) -> list[Files]:
    """Sorted pictures of a folder, or pairs: of ``folder`` and ``low``, or of the sub-folders gt and lq of ``folder``.

    The two of a pair have the same name, endings apart, in the same sub-folder.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
        ValueError: a picture of one side that the other has not.
    """
    if low is None and (folder / "gt").is_dir() and (folder / "lq").is_dir():
        folder, low = folder / "gt", folder / "lq"
    if low is None:
        return [Files(file) for file in find_pictures(folder).files]
    high, small = _by_name(folder), _by_name(low)
    for side, other, place in ((high, small, low), (small, high, folder)):
        if alone := sorted(side.keys() - other.keys()):
            raise ValueError(f"{side[alone[0]]} has no partner of the same name in {place} ({len(alone)} have none)")
    return [Files(file, small[name]) for name, file in sorted(high.items())]


def _by_name(folder: Path) -> dict[Path, Path]:
    """Pictures of a folder by their names in it, without endings."""
    found: dict[Path, Path] = {}
    for file in find_pictures(folder).files:
        name = file.relative_to(folder).with_suffix("")
        if name in found:
            raise ValueError(f"{found[name]} and {file} have the same name: which of them is one of the pair?")
        found[name] = file
    return found


def split_files(
    files: list[Files], test_path: str | None, every: int, val_fraction: float | None, test_fraction: float | None
) -> dict[Split, list[Files]]:
    """Files by split; a file is in one split, or is both for validation and test.

    Args:
        files: sorted.
        test_path: folder of the files for validation and test; all of ``files`` are for training then.
        every: else the first file and every so many after it are held out for validation and test,
        val_fraction: or a part is drawn at random for validation
        test_fraction: and another for testing.

    Raises:
        ValueError: arguments that exclude each other or are out of range, too few files.
        FileNotFoundError: no such folder, or no picture in it.
    """
    if (val_fraction is None) != (test_fraction is None) or (test_path is not None and val_fraction is not None):
        raise ValueError("give val_fraction and test_fraction together, and no test_path then")
    if test_path is not None:
        held = folder_files(Path(test_path), None)
        return {"train": files, "val": held, "test": held}
    if val_fraction is not None and test_fraction is not None:
        require_fractions(val_fraction, test_fraction)
        order = permutation(len(files), _SPLIT).tolist()
        val, test = (max(1, round(len(files) * fraction)) for fraction in (val_fraction, test_fraction))
        pieces = {"train": order[val:-test], "val": order[:val], "test": order[-test:]}
        splits: dict[Split, list[Files]] = {
            split: [files[place] for place in sorted(pieces[split])] for split in SPLITS
        }
    else:
        if every < 2:
            raise ValueError(f"hold_out must be at least 2, got {every}: with 1 nothing is left to train on")
        held = files[::every]
        splits = {"train": [file for place, file in enumerate(files) if place % every], "val": held, "test": held}
    if not splits["train"]:
        raise ValueError(f"{len(files)} pictures are too few to cut training, validation and test pictures from")
    return splits


def decode(
    files: Sequence[Files], factor: int, long_side: int | None, short_side: int | None
) -> tuple[list[Photograph], list[str]]:
    """Decode photographs, several at a time.

    Args:
        files: N photographs.
        factor: sides of high-resolution pictures lose, right and below, what does not divide by it.
        long_side: larger pictures are shrunk (Lanczos) until their longer side has so many pixels; not for pairs.
        short_side: the same for the shorter side.

    Returns:
        N photographs and remarks such as "a.png is gray" on those that were converted.

    Raises:
        ValueError: a picture that cannot be read, or pairs whose sizes do not differ by ``factor``.
    """

    def one(entry: Files) -> tuple[Photograph, list[str]]:
        high, remark = _open(entry.high)
        if entry.low is None:
            return Photograph(entry.high, _pixels(_cut(_shrunk(high, long_side, short_side), factor)), None), remark
        low, other = _open(entry.low)
        if high.size != (low.width * factor, low.height * factor):
            raise ValueError(
                f"{entry.high} is {high.width} x {high.height} pixels and {entry.low} {low.width} x {low.height}: "
                f"that is not a factor of {factor}"
            )
        return Photograph(entry.high, _pixels(high), _pixels(low)), remark + other

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(one, files))
    return [photograph for photograph, _ in found], [text for _, remarks in found for text in remarks]


def shrink(pixels: Tensor, factor: int) -> Tensor:
    """(3, H, W) uint8 to (3, H / factor, W / factor) uint8 by Pillow's bicubic filter, which averages."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return _pixels(image.resize((image.width // factor, image.height // factor), Image.Resampling.BICUBIC))


def _open(file: Path) -> tuple[Image.Image, list[str]]:
    """A picture as RGB with 8 bits, upright, transparent parts on white; and a remark if that changed it."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {file}: {error}") from error
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64) / 257  # 65535 becomes 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB"), [f"{file} has 16 bits"]
    if image.mode == "F":
        raise ValueError(f"cannot read the picture {file}: its pixels are floating-point numbers, convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), [f"{file} is transparent"]
    return image.convert("RGB"), [f"{file} is gray"] if image.mode in ("1", "L") else []


def _shrunk(image: Image.Image, long_side: int | None, short_side: int | None) -> Image.Image:
    """A picture whose longer or shorter side has at most so many pixels."""
    scale = 1.0
    if long_side is not None:
        scale = min(scale, long_side / max(image.size))
    if short_side is not None:
        scale = min(scale, short_side / min(image.size))
    if scale == 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _cut(image: Image.Image, factor: int) -> Image.Image:
    """The upper left part whose sides divide by ``factor``."""
    return image.crop((0, 0, image.width // factor * factor, image.height // factor * factor))


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
