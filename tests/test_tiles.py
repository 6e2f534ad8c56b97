"""Tiles against the whole image: local restorations are the same, weights sum to 1, numbers do not move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_sgm.random import Draw
from lightning_sgm.tiles import restore_tiled


def nearest(low: Tensor, numbers: Tensor, factor: int = 2) -> Tensor:
    return low.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def bicubic(low: Tensor, numbers: Tensor, factor: int = 4) -> Tensor:
    return F.interpolate(low, scale_factor=factor, mode="bicubic", align_corners=False)


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    multiple=st.integers(1, 8),
    times=st.integers(1, 4),
    share=st.floats(0, 0.99),
    batch=st.none() | st.integers(1, 7),
    count=st.integers(1, 2),
)
def test_what_is_local_is_the_same_in_tiles(size, multiple, times, share, batch, count):
    """Also a partition of unity: constants come back."""
    low, tile = images(count, 3, *size), multiple * times
    sizes = []

    def watched(tiles: Tensor, numbers: Tensor) -> Tensor:
        sizes.append(tuple(tiles.shape))
        return nearest(tiles, numbers)

    found = restore_tiled(
        watched, low, 2, multiple=multiple, tile=tile, overlap=int(share * tile), batch=batch, on_tile=None
    )
    assert found.shape == (count, 3, size[0] * 2, size[1] * 2)
    assert torch.allclose(found, nearest(low, low), atol=1e-6)
    assert all(h % multiple == 0 and w % multiple == 0 and max(h, w) <= tile for _, _, h, w in sizes)
    assert all(n <= (batch or count) for n, *_ in sizes)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (90, 61)])
@pytest.mark.parametrize("tile", [None, 32])
def test_any_size(size, tile):
    low = images(1, 3, *size)
    found = restore_tiled(nearest, low, 2, multiple=16, tile=tile, overlap=8)
    assert torch.allclose(found, nearest(low, low), atol=1e-6)


def test_edges_of_tiles_are_not_used():
    """Bicubic interpolation sees two pixels further; a quarter of the overlap is enough for it."""
    low = images(1, 3, 90, 61)
    found = restore_tiled(bicubic, low, 4, tile=32, overlap=8)
    assert torch.allclose(found, bicubic(low, low), atol=1e-5)
    low = images(1, 3, 96, 64)
    assert (restore_tiled(bicubic, low, 4, tile=32, overlap=0) - bicubic(low, low)).abs().max() > 0.1


def test_neighbours_pass_smoothly_into_each_other():
    """Two tiles that know nothing of each other, answering 0 and 1: a ramp without steps."""
    found = restore_tiled(
        lambda tiles, numbers: (numbers >> 32)[:, None, None, None].expand(len(tiles), 1, 64, 64).float(),
        images(1, 3, 64, 112),
        1,
        tile=64,
        overlap=16,
    )[0, 0, 10]
    assert torch.equal(found[:52], torch.zeros(52))
    assert torch.equal(found[60:], torch.ones(52))
    assert (found.diff() >= 0).all()
    assert found.diff().max() < 0.25
    assert torch.allclose(found + found.flip(0), torch.ones(112), atol=1e-6)


def test_padding_reflects_and_then_repeats():
    seen = []

    def watched(tiles: Tensor, numbers: Tensor) -> Tensor:
        seen.append(tiles)
        return tiles

    low = images(1, 1, 5, 3)
    restore_tiled(watched, low, 1, multiple=4)
    assert torch.equal(seen[0], F.pad(low, (0, 1, 0, 3), mode="reflect"))
    restore_tiled(watched, low, 1, multiple=8)
    assert seen[1][0, 0, 0].tolist() == [low[0, 0, 0, i].item() for i in (0, 1, 2, 1, 0, 0, 0, 0)]


@pytest.mark.parametrize("batch", [None, 1, 3, 100])
def test_noise_of_a_tile_is_its_own(batch):
    """By its image's number and its place, whatever else is in the batch."""
    numbers_seen: list[int] = []

    def noisy(tiles: Tensor, numbers: Tensor) -> Tensor:
        numbers_seen.extend(numbers.tolist())
        return Draw(5, keys=numbers).normal((len(tiles), 1, *tiles.shape[2:]))

    low = images(3, 3, 40, 56)
    given_numbers = torch.tensor([7, 2, 2**32 - 1])
    found = restore_tiled(noisy, low, 1, numbers=given_numbers, tile=16, overlap=4, batch=batch)
    assert len(set(numbers_seen)) == len(numbers_seen) == 3 * 3 * 5
    for row, number in enumerate(given_numbers):
        alone = restore_tiled(noisy, low[row : row + 1], 1, numbers=number[None], tile=16, overlap=4)
        assert torch.equal(alone[0], found[row])


def test_images_in_one_piece_keep_their_numbers_and_batch():
    calls = []

    def watched(tiles: Tensor, numbers: Tensor) -> Tensor:
        calls.append((tiles.shape, numbers.tolist()))
        return tiles

    restore_tiled(watched, images(4, 3, 8, 8), 1, numbers=torch.tensor([3, 9, 1, 0]), tile=16, overlap=4)
    assert calls == [((4, 3, 8, 8), [3, 9, 1, 0])]


def test_progress_counts_tiles():
    seen = []
    restore_tiled(
        nearest, images(2, 3, 40, 24), 2, tile=16, overlap=0, batch=4, on_tile=lambda *counts: seen.append(counts)
    )
    assert seen == [(4, 12), (8, 12), (12, 12)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 24, "multiple": 16}, r"tile must be a multiple of 16 pixels.*got 24"),
        ({"tile": 8, "multiple": 16}, r"tile must be a multiple of 16 pixels.*got 8"),
        ({"tile": 0}, "tile must be"),
        ({"tile": 16, "overlap": 16}, r"overlap of tiles must be from 0 to below their side 16, got 16"),
        ({"tile": 16, "overlap": -1}, "overlap"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"multiple": 0}, "multiple"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        restore_tiled(nearest, images(1, 3, 8, 8), 2, **options)


def test_wrong_images_and_restorations_are_named():
    with pytest.raises(ValueError, match=r"shape \(B, C, h, w\).*got \(3, 8, 8\)"):
        restore_tiled(nearest, images(3, 8, 8), 2)
    with pytest.raises(ValueError, match=r"got \(1, 3, 0, 8\)"):
        restore_tiled(nearest, images(1, 3, 0, 8), 2)
    with pytest.raises(ValueError, match=r"restored to \(1, 3, 16, 16\), but factor 4 asks for \(1, channels, 32, 32"):
        restore_tiled(nearest, images(1, 3, 8, 8), 4)
