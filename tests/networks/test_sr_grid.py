"""Degraded images on the grid of the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_sgm.networks.sr_grid import LowGrid


def test_images_on_the_same_grid_stay_as_they_are():
    grid, low = LowGrid({"shape": [48, 4, 6], "low_shape": [3, 4, 6]}, "X"), torch.randn(2, 3, 4, 6)
    assert grid(low, (4, 6)) is low
    assert grid.channels == 3


def test_smaller_images_are_enlarged():
    grid = LowGrid({"shape": [3, 12, 18], "low_shape": [3, 4, 6]}, "X")
    low = torch.randn(1, 3, 4, 6)
    large = grid(low, (12, 18))
    # The middle pixel of each 3 x 3 lies on the old one, and a cubic through the pixels keeps those.
    torch.testing.assert_close(large[..., 1::3, 1::3], low)
    assert large.shape == (1, 3, 12, 18)
    assert grid.channels == 3


def test_blocks_of_larger_images_become_channels():
    grid, low = LowGrid({"shape": [3, 4, 4], "low_shape": [2, 8, 8]}, "X"), torch.randn(2, 2, 8, 8)
    answer = grid(low, (4, 4))
    assert answer.shape == (2, grid.channels, 4, 4)
    assert grid.channels == 8
    torch.testing.assert_close(answer[1, :, 2, 3].sort().values, low[1, :, 4:6, 6:8].flatten().sort().values)
    assert torch.equal(F.pixel_shuffle(answer, 2), low)


@pytest.mark.parametrize(("shape", "low"), [((3, 6, 6), (3, 4, 4)), ((3, 8, 8), (3, 4, 8)), ((3, 8, 8), (3, 16, 8))])
def test_grids_that_do_not_fit_are_refused(shape: tuple[int, ...], low: tuple[int, ...]):
    with pytest.raises(ValueError, match="X needs sides of its images that are a whole multiple"):
        LowGrid({"shape": list(shape), "low_shape": list(low)}, "X")


def test_data_without_degraded_images_are_refused():
    with pytest.raises(ValueError, match="X needs 'low_shape' in the data's spec, but data of kind 'image'"):
        LowGrid({"kind": "image", "shape": [3, 8, 8]}, "X")
    with pytest.raises(ValueError, match="X is for images, got shape"):
        LowGrid({"shape": [3, 8], "low_shape": [3, 8, 8]}, "X")


def test_sizes_may_change_but_not_their_ratio():
    grid = LowGrid({"shape": [3, 8, 8], "low_shape": [3, 4, 4]}, "X")
    assert grid(torch.randn(1, 3, 5, 7), (10, 14)).shape == (1, 3, 10, 14)
    with pytest.raises(ValueError, match=r"'low' of 3 channels and sides \[10, 14\] over 2.* got shape \[3, 5, 6\]"):
        grid(torch.randn(1, 3, 5, 6), (10, 14))
    with pytest.raises(ValueError, match="'low' of 3 channels"):
        grid(torch.randn(1, 1, 5, 7), (10, 14))
    with pytest.raises(ValueError, match="'low' of 3 channels"):
        grid(torch.randn(1, 3, 5, 7), (11, 14))  # 11 / 2 rounds to 5
