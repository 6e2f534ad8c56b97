"""Small models of series, and truths to hold them against, for the tests of PaD-TS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamodules import SeriesDataModule
from datamodules.scaling import Scaling
from lightning_sgm.linear_denoiser import Moments
from lightning_sgm.methods import PaDTS
from lightning_sgm.networks import DualChannel
from lightning_sgm.networks.base import Network, Spec
from lightning_sgm.objectives.discrepancy import VARIANCES
from lightning_sgm.random import Draw

L, D = 6, 3
COLUMNS = ["a", "b", "c"]


def rows(count: int = 200, seed: int = 0, dims: int = D) -> Tensor:
    """(count, dims) float64: positive, correlated, of scales 1, 10, 100."""
    x = Draw(seed).normal((count, dims), torch.float64)
    x[:, 1:] += x[:, :1]
    return (0.3 * x).exp() * 10.0 ** torch.arange(dims)


def values(count: int = 40, seed: int = 0, dims: int = D) -> Tensor:
    """Windows (count, 6, dims) in original units."""
    return rows(count * L, seed, dims).view(count, L, dims)


def spec(kind: Any = "minmax", log: bool = False, dims: int = D) -> dict[str, Any]:
    scaling = Scaling.fit(values(dims=dims).numpy(), kind, log)
    return {
        "kind": "series",
        "shape": [L + scaling.extra, dims],
        "length": L,
        "columns": COLUMNS[:dims],
        "scaling": scaling.spec,
        "classes": 0,
        "sigma_data": 1.0,
    }


def scaled(of: dict[str, Any], count: int = 40, seed: int = 0) -> Tensor:
    """Windows as the model sees them."""
    return Scaling(of["scaling"]).scale(values(count, seed, of["shape"][1])).float()


def tiny(spec: Spec) -> DualChannel:
    return DualChannel(spec, width=8, heads=2, encoders=1, blocks=1, dropout=0.0)


def dropping(spec: Spec) -> DualChannel:
    return DualChannel(spec, width=8, heads=2, encoders=1, blocks=1, dropout=0.5)


def model(of: dict[str, Any] | None = None, network: Any = tiny, **arguments: Any) -> Any:
    """A PaDTS."""
    torch.manual_seed(0)
    return PaDTS(of or spec(), network, **arguments)


class Watched(Network):
    """Mixes steps, dimensions and the label by a few weights; remembers what it was asked."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        length, dims = spec["shape"]
        self.steps = nn.Parameter(0.4 * Draw(7).normal((length, length)))
        self.dims = nn.Parameter(0.6 * Draw(8).normal((dims, dims)))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, label: Tensor, /) -> Tensor:
        self.asked.append((x.detach().clone(), label.detach().clone()))
        return self.answer(x, label)

    def answer(self, x: Tensor, label: Tensor) -> Tensor:
        moved = self.steps.to(x) @ x @ self.dims.to(x) + (label / 50).to(x).reshape(-1, 1, 1)
        return x / 2 + torch.sin(moved)


def moments(mean: Tensor, basis: Tensor, variances: Tensor, shape: tuple[int, ...]) -> Moments:
    """Those of a Gaussian law, as if learnt from all of it."""
    found = Moments(shape)
    for name, value in {"mean": mean, "basis": basis, "variances": variances}.items():
        getattr(found, name).copy_(value)
    return found


def correlation_table(x: Tensor) -> Tensor:
    """(B, P) by torch.corrcoef."""
    tables = torch.stack([torch.corrcoef(window.T) for window in x])
    row, column = torch.tril_indices(x.shape[2], x.shape[2], -1)
    return tables[:, row, column]


def discrepancy(truth: Tensor, found: Tensor) -> Tensor:
    """pad_ts.md section 2: the mean over pairs of M_p of windows (B, L, D), by all distances."""
    u, v = correlation_table(truth), correlation_table(found)
    variances = torch.tensor(VARIANCES, dtype=u.dtype)

    def kernels(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-((a[:, None] - b[None]) ** 2)[..., None] / (2 * variances)).sum(-1).mean((0, 1))

    return (kernels(u, u) + kernels(v, v) - 2 * kernels(u, v)).mean()


def data(path: Path | None = None, **arguments: Any) -> SeriesDataModule:
    """Sines (60, 6, 6 windows of 6 steps), or a file."""
    options: dict[str, Any] = {"length": L, "windows": 60, "dims": D, "batch_size": 16}
    return SeriesDataModule(path=str(path) if path else None, **{**options, **arguments})


def table(path: Path, x: Tensor, columns: list[str] | None = None) -> Path:
    """A .csv file of rows (T, D); NaN is an empty cell."""
    names = columns or COLUMNS[: x.shape[1]]
    lines = [",".join("" if value != value else repr(value) for value in row) for row in x.tolist()]
    path.write_text("\n".join([",".join(names), *lines]) + "\n", encoding="utf-8")
    return path


def named(name: str) -> Callable[[str], str]:
    """For ``assert_close``: which of several tensors differ."""
    return lambda message: f"{name}: {message}"
