"""Series without a file: sines, a simulated hopper, and daily quotes that come with a package."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_FIRST_SEED = 123  # of the training sines, as in the reference
_JOINTS = ("x", "z", "tilt", "waist", "hip", "knee", "ankle")
GENERATED = ("sines", "mujoco")
QUOTES = ("nasdaq", "sp500")
HOPPER = [f"{kind}_{joint}" for kind in ("position", "velocity") for joint in _JOINTS]  # names of its dimensions


def generate(dataset: str, windows: int, length: int, dims: int, split: int) -> tuple[Array, list[str]]:
    """Windows (windows, length, D) float64 of "sines" or "mujoco" and the names of their D dimensions.

    Args:
        dataset: which.
        windows: number of windows.
        length: steps of each.
        dims: number of dimensions of sines.
        split: which set; sets are independent of each other.
    """
    if dataset == "sines":
        return sines(windows, length, dims, split), [f"sine_{i}" for i in range(dims)]
    return hopper(windows, length, split), HOPPER


def sines(windows: int, length: int, dims: int, split: int) -> Array:
    """Windows (windows, length, dims) float64 of sin(f j + p), j = 0..length-1, f and p uniform in [0, 0.1).

    Frequency and phase are independent for each window and dimension (pad_ts.md section 5; the reference takes the same
    numbers for its training set, ``split`` 0).

    Args:
        windows: number of windows.
        length: steps of each.
        dims: number of dimensions.
        split: which set; sets are independent of each other.
    """
    generator = np.random.RandomState(_FIRST_SEED + split)
    frequency, phase = np.moveaxis(generator.uniform(0.0, 0.1, (windows, dims, 2)), -1, 0)
    angle = np.arange(length)[None, :, None] * frequency[:, None] + phase[:, None]
    return np.sin(angle, out=angle)


def hopper(windows: int, length: int, split: int) -> Array:
    """Windows (windows, length, 14) float64 of dm_control's hopper: 7 positions, 7 velocities, a step of 0.005 s.

    Each starts at random: the first two positions in [0, 0.5), the others in [-2, 2), velocities in [-5, 5); it then
    falls without action (pad_ts.md section 5).

    Args:
        windows: number of windows.
        length: steps of each.
        split: which set; sets are independent of each other.

    Raises:
        ValueError: dm-control is not installed, or a version of mujoco it does not work with.
    """
    os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn; without a display loading would fail
    try:
        from dm_control import suite

        physics = suite.load("hopper", "stand").physics
    except (ImportError, AttributeError) as error:  # mujoco 4 lacks attributes that dm-control asks for
        raise ValueError(
            f"dataset: mujoco needs dm-control and mujoco below 4 ({error}): pip install 'lightning_sgm[mujoco]'"
        ) from error
    low, high = np.repeat([0.0, -2.0, -5.0], [2, 5, 7]), np.repeat([0.5, 2.0, 5.0], [2, 5, 7])
    starts = np.random.default_rng((_FIRST_SEED, split)).uniform(low, high, (windows, 14))
    values = np.empty((windows, length, 14))
    for start, window in zip(starts, values, strict=True):
        with physics.reset_context():
            physics.data.qpos[:], physics.data.qvel[:] = start[:7], start[7:]
        for row in window:
            row[:7], row[7:] = physics.data.qpos, physics.data.qvel
            physics.step()
    return values


def quotes(name: str) -> tuple[Array, list[str]]:
    """Daily quotes 1999 to 2018 of the NASDAQ composite ("nasdaq") or the S&P 500 ("sp500"): (5031, 6) and names.

    Raises:
        ValueError: the package ``arch``, which they come with, is not installed.
    """
    try:
        table = importlib.import_module(f"arch.data.{name}").load()
    except ImportError as error:
        raise ValueError(
            f"dataset: {name} comes with the package arch ({error}): pip install 'lightning_sgm[series]', or give a "
            "path to a file of your own"
        ) from error
    return table.to_numpy(dtype=np.float64), [str(column) for column in table.columns]
