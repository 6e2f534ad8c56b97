"""What metrics of time series share: windows in common units, fair halves, and windows kept for a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.scaling import Scaling
from lightning_sgm.random import Draw

_GOLDEN = -7046029254386353131  # 2^64 over the golden ratio, as int64


class Units:
    """Takes windows from model space to [0, 1], where the metrics of PaD-TS live; checks them on the way.

    Until ``learn`` has seen data with a scaling, windows are taken to be in [-1, 1].

    Attributes:
        columns: names of the dimensions; None if the data gave none.
        shape: (L, D) of windows in original units; None before it is known.
    """

    def __init__(self) -> None:
        self.scaling: Scaling | None = None
        self.columns: list[str] | None = None
        self.shape: tuple[int, int] | None = None

    def learn(self, data: Any) -> None:
        """Take scaling, names and size from the ``spec`` of a DataModule; None is let pass."""
        spec = getattr(data, "spec", {})
        self.scaling = Scaling(spec["scaling"]) if "scaling" in spec else None
        self.columns = [str(name) for name in spec["columns"]] if "columns" in spec else None
        self.shape = (int(spec["length"]), len(self.columns)) if self.columns and "length" in spec else None

    def name(self, dimension: int) -> str:
        """What a dimension is called."""
        return self.columns[dimension] if self.columns else str(dimension)

    def __call__(self, x: Tensor) -> Tensor:
        """Windows in units of each dimension's range: 0 its smallest, 1 its largest training value.

        Args:
            x: (B, L', D) in model space.

        Returns:
            (B, L, D) float64; not clamped.

        Raises:
            ValueError: x has not three axes, or another size than before.
        """
        if x.dim() != 3:
            raise ValueError(f"metrics of series take windows (B, L, D), got the shape {tuple(x.shape)}")
        x = x.detach().double()
        windows = (x + 1) / 2 if self.scaling is None else self.scaling.unit(x)
        size = (windows.shape[1], windows.shape[2])
        if self.shape not in (None, size):
            raise ValueError(f"windows of L x D = {size[0]} x {size[1]}, but the data's are {self.shape}")
        self.shape = size
        return windows


def fingerprints(windows: Tensor) -> Tensor:
    """(B,) int64, a function of the values of each window (B, L, D), taken in float32, and of nothing else."""
    bits = windows.float().contiguous().flatten(1).view(torch.int32).long()
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _GOLDEN | 1
    return (bits * places).sum(1)


def first_half(windows: Tensor, seed: int) -> Tensor:
    """(B,) bool: which windows belong to the first of two random, disjoint halves.

    By a fair coin for each window that its own values and the seed decide, so neither the order nor the process in
    which windows arrive changes the halves, and equal windows share theirs.
    """
    return Draw(seed, fingerprints(windows)).integers(2, (len(windows),)) == 0


class WindowMetric(Metric):
    """A metric that keeps all windows, float32 in [0, 1], for ``compute``. Subclasses have a ``name``.

    Attributes:
        inputs: the batch entries passed to ``update``.
        units: takes windows to [0, 1].
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    name = "windows"
    inputs: tuple[str, ...] = ("x",)
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.units = Units()
        for side in ("real", "generated"):
            self.add_state(side, [], dist_reduce_fx="cat")

    def prepare(self, data: Any) -> None:
        """Take the scaling of a DataModule."""
        self.units.learn(data)

    def update(self, x: Tensor, real: bool) -> None:
        """Add windows.

        Args:
            x: (B, L', D) in model space.
            real: whether they are data or samples.

        Raises:
            ValueError: not windows, or another size than before.
        """
        (self.real if real else self.generated).append(self.units(x).float())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the windows of all processes (torchmetrics); one without windows takes part with an empty tensor.

        torchmetrics would send an empty vector in its place, which the other processes cannot receive.
        """
        for held in (self.real, self.generated):
            if isinstance(held, list) and not held:
                held.append(torch.zeros(0, *(self.units.shape or (0, 0)), device=self.device))
        super().sync(*args, **kwargs)

    def gathered(self, least: int) -> tuple[Tensor, Tensor]:
        """All real and all generated windows (N, L, D), in an order that depends on the windows alone.

        Raises:
            ValueError: fewer than ``least`` on a side.
        """
        sides = [_joined(self.real), _joined(self.generated)]
        if min(map(len, sides)) < least:
            raise ValueError(
                f"{self.name} needs at least {least} real and {least} generated windows, got {len(sides[0])} and "
                f"{len(sides[1])}: raise test_samples (val_samples) or the number of validation and test windows"
            )
        real, generated = (side[fingerprints(side).argsort()] for side in sides)
        return real, generated


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.zeros(0, 0, 0)
