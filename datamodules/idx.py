"""MNIST's idx files (LeCun, Cortes, Burges 1998), plain or gzipped: Debian's dataset-fashion-mnist has this form."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_UINT8 = 8  # type code in an idx header; the only one that image sets use


def find_idx(folder: Path, name: str) -> Path | None:
    """The idx file ``name`` (e.g. train-images-idx3-ubyte), with or without .gz, also spelt train-images.idx3-ubyte."""
    dotted = name.replace("-idx", ".idx")
    candidates = (folder / (stem + end) for stem in (name, dotted) for end in ("", ".gz"))
    return next((file for file in candidates if file.is_file()), None)


def idx_shape(file: Path) -> list[int]:
    """Sizes in the header of an idx file: [N, H, W] for images, [N] for labels."""
    return _read(file, data=False)[0]


def read_idx(file: Path) -> Tensor:
    """The uint8 tensor in an idx file, of the shape of its header.

    Raises:
        ValueError: not an idx file of bytes, or shorter or longer than its header says.
    """
    shape, content = _read(file, data=True)
    if len(content) != np.prod(shape):
        raise ValueError(f"{file} is damaged: its header promises {np.prod(shape)} bytes, it has {len(content)}")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(shape).copy())


def _read(file: Path, data: bool) -> tuple[list[int], bytes]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            magic = stream.read(4)
            if len(magic) < 4 or magic[:3] != bytes([0, 0, _UINT8]):
                raise ValueError(f"{file} is not an idx file of bytes")
            shape = np.frombuffer(stream.read(4 * magic[3]), dtype=">u4").tolist()
            return shape, stream.read() if data else b""
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
