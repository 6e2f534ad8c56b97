"""Restoring images of any size in overlapping tiles, each as large as a network and its memory can take."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

_TILES = 32  # bits of a number below those that count tiles


def restore_tiled(
    restore: Callable[[Tensor, Tensor], Tensor],
    low: Tensor,
    factor: int,
    *,
    numbers: Tensor | None = None,
    multiple: int = 1,
    tile: int | None = None,
    overlap: int = 16,
    batch: int | None = None,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Images restored piece by piece.

    Images are padded to multiples by reflection, on the right and at the bottom, and cut again at the end; what is too
    small to be reflected goes on with its last pixel. Tiles are spread evenly, so that neighbours share at least
    ``overlap`` pixels. A quarter of an overlap at the edge of a tile is not used, because networks do not see there
    what is beyond; in the half in the middle one tile passes smoothly into the next. Weights sum to 1 everywhere.

    Memory beside that of ``restore`` is that of the answer and of one call's tiles.

    Args:
        restore: from tiles (n, C, t, u) and their numbers (n,) int64, on which all noise is to depend, to (n, D,
            t factor, u factor). Numbers are unique and independent of ``batch``; those of images in one piece are the
            images' own.
        low: (B, C, h, w), of any size.
        factor: of the enlargement.
        numbers: (B,) int64 in [0, 2^32), the numbers of the images; 0 to B - 1 by default.
        multiple: what the sides of a tile must be multiples of.
        tile: side of the tiles in pixels of ``low``, smaller where the image is; None for whole images.
        overlap: pixels that neighbours share at least.
        batch: tiles in one call; by default as many as there are images.
        on_tile: called with the tiles done and those in all after every call.

    Returns:
        (B, D, h factor, w factor) where ``low`` is. In one piece it has the dtype of the restored tiles, otherwise it
        is float32.

    Raises:
        ValueError: sizes that do not fit each other, or tiles that come back in another size.
    """
    _check(low, factor, multiple, tile, overlap, batch)
    height, width = low.shape[2:]
    low = _padded(low, multiple)
    rows, columns = (_starts(size, tile, overlap) for size in low.shape[2:])
    sides = [min(size, tile or size) for size in low.shape[2:]]
    numbers = torch.arange(len(low)) if numbers is None else numbers
    weights = [
        _weights(starts, side, factor).to(low.device) for starts, side in zip((rows, columns), sides, strict=True)
    ]
    pieces = [(image, i, j) for i in range(len(rows)) for j in range(len(columns)) for image in range(len(low))]
    whole: Tensor | None = None
    for done in range(0, len(pieces), batch or len(low)):
        part = pieces[done : done + (batch or len(low))]
        cut = [low[n, :, rows[i] : rows[i] + sides[0], columns[j] : columns[j] + sides[1]] for n, i, j in part]
        keys = torch.stack([numbers[n] + ((i * len(columns) + j) << _TILES) for n, i, j in part])
        found = _restored(restore, torch.stack(cut), keys, factor)
        if len(pieces) == len(part) == len(low):  # nothing to blend
            whole = found
        else:
            if whole is None:
                whole = low.new_zeros(
                    (len(low), found.shape[1], *(size * factor for size in low.shape[2:])), dtype=torch.float32
                )
            for (n, i, j), piece in zip(part, found, strict=True):
                top, left = rows[i] * factor, columns[j] * factor
                place = whole[n, :, top : top + piece.shape[1], left : left + piece.shape[2]]
                place += piece.to(place) * weights[0][i][:, None] * weights[1][j]
        if on_tile is not None:
            on_tile(done + len(part), len(pieces))
    assert whole is not None
    return whole[:, :, : height * factor, : width * factor]


def _check(low: Tensor, factor: int, multiple: int, tile: int | None, overlap: int, batch: int | None) -> None:
    if low.ndim != 4 or not low.numel():
        raise ValueError(f"images to restore have the shape (B, C, h, w) without zeros, got {tuple(low.shape)}")
    if min(factor, multiple, 1 if batch is None else batch) < 1:
        raise ValueError(f"factor, multiple and batch must be at least 1, got {factor}, {multiple} and {batch}")
    if tile is None:
        return
    if tile < multiple or tile % multiple:
        raise ValueError(f"the tile must be a multiple of {multiple} pixels, which the network needs, got {tile}")
    if not 0 <= overlap < tile:
        raise ValueError(f"the overlap of tiles must be from 0 to below their side {tile}, got {overlap}")


def _padded(low: Tensor, multiple: int) -> Tensor:
    """(B, C, h, w) with sides that are multiples."""
    for dim in (2, 3):
        size = low.shape[dim]
        wanted = math.ceil(size / multiple) * multiple
        # Behind the end the way back, and where that ends too, its last pixel.
        index = torch.arange(wanted, device=low.device)
        low = low.index_select(dim, torch.where(index < size, index, 2 * (size - 1) - index).clamp(min=0))
    return low


def _starts(size: int, tile: int | None, overlap: int) -> list[int]:
    """Where tiles begin so that they cover a side."""
    if tile is None or tile >= size:
        return [0]
    gaps = math.ceil((size - tile) / (tile - overlap))
    return [i * (size - tile) // gaps for i in range(gaps + 1)]


def _weights(starts: list[int], side: int, factor: int) -> Tensor:
    """(tiles, side factor) weights of every tile along a side of the image; they sum to 1 at every pixel."""
    weights = torch.ones(len(starts), side * factor, dtype=torch.float64)
    total = torch.zeros((starts[-1] + side) * factor, dtype=torch.float64)
    for i, (before, after) in enumerate(pairwise(starts)):
        shared = (before + side - after) * factor
        if shared:
            way = (torch.arange(shared, dtype=torch.float64) + 0.5) / shared
            rise = torch.sin(0.5 * math.pi * (2.0 * way - 0.5).clamp(0.0, 1.0)).square()
            weights[i + 1, :shared] *= rise
            weights[i, -shared:] *= rise.flip(0)
    places = [slice(start * factor, (start + side) * factor) for start in starts]
    for place, weight in zip(places, weights, strict=True):
        total[place] += weight
    # Already 1 where two tiles meet; not where overlaps are so large that three do.
    return torch.stack([w / total[place] for place, w in zip(places, weights, strict=True)]).float()


def _restored(restore: Callable[[Tensor, Tensor], Tensor], tiles: Tensor, numbers: Tensor, factor: int) -> Tensor:
    found = restore(tiles, numbers)
    wanted = (len(tiles), *(size * factor for size in tiles.shape[2:]))
    if found.ndim != 4 or (len(found), *found.shape[2:]) != wanted:
        raise ValueError(
            f"tiles {tuple(tiles.shape)} were restored to {tuple(found.shape)}, but factor {factor} asks for "
            f"({wanted[0]}, channels, {wanted[1]}, {wanted[2]})"
        )
    return found
