"""Frechet distance of molecules on the features of ChemNet (FCD)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from datamodules.chemistry import Largest
from lightning_sgm.metrics.base import DoubleMetric
from lightning_sgm.metrics.images import frechet, moments
from lightning_sgm.metrics.molecules import Reader, comparable

_FEATURES = 512
_ROWS = 256  # molecules that the network reads at once


class FCD(DoubleMetric):
    """Frechet ChemNet distance (Preuer et al. 2018): between Gaussians fitted to ChemNet features of two sets.

    Of corrected molecules, whose canonical SMILES the network reads; the weights come with the package `fcd_torch`. A
    molecule costs some 10 ms of a CPU. The value has no unit, 0 is best. It falls with the number of molecules (5,000
    or more are usual; features are 512): never compare values with different counts, and know the floor.

    Args:
        atoms: element symbols of the channels; ``prepare`` takes those of the data.
        largest: fragment that stands for a molecule in pieces, see ``datamodules.chemistry.decode``.

    Attributes:
        inputs: the batch entries passed to ``update``.

    Raises:
        ValueError: fcd_torch is not installed.
    """

    higher_is_better = False
    inputs: tuple[str, ...] = ("x", "adj", "node_mask")
    name = "molecules"
    real_count: Tensor
    generated_count: Tensor

    def __init__(self, atoms: list[str] | None = None, largest: Largest = "text") -> None:
        super().__init__()
        self.reader = Reader(atoms, largest)
        # Inside a list: weights of ChemNet belong neither into checkpoints nor into another precision.
        self._network = [_package().FCD().model]
        for side in ("real", "generated"):
            self.add_sum(f"{side}_count")
            self.add_sum(f"{side}_sum", _FEATURES)
            self.add_sum(f"{side}_outer", _FEATURES, _FEATURES)

    def prepare(self, data: Any) -> None:
        """Take the atoms of a DataModule where none were given."""
        self.reader.learn(data)

    def update(self, x: Tensor, adj: Tensor, node_mask: Tensor, real: bool) -> None:
        """Add molecules.

        Args:
            x: (B, N, F) one-hot atom types.
            adj: (B, N, N) bond orders.
            node_mask: (B, N) bool.
            real: whether they are data or samples.
        """
        found = [molecule.smiles for molecule in self.reader(x, adj, node_mask) if molecule.smiles]
        features = self._activations(found)
        side = "real" if real else "generated"
        self.add(f"{side}_count", float(len(found)))
        self.add(f"{side}_sum", features.sum(0))
        self.add(f"{side}_outer", features.T @ features)

    def compute(self) -> dict[str, Tensor]:
        """fcd, a float64 scalar >= 0; NaN if fewer than two samples are molecules.

        Raises:
            ValueError: fewer than two real molecules.
        """
        if not comparable("fcd", int(self.real_count), int(self.generated_count), least=2):
            return {"fcd": torch.tensor(float("nan"), dtype=torch.float64, device=self.device)}
        fits = [
            moments(*(getattr(self, f"{side}_{name}") for name in ("count", "sum", "outer")))
            for side in ("real", "generated")
        ]
        return {"fcd": frechet(*fits[0], *fits[1])}

    @torch.no_grad()
    def _activations(self, smiles: list[str]) -> Tensor:
        """(n, 512) float64 features, computed in float32 whatever the precision."""
        network = self._network[0].to(self.device)
        letters = _package().utils.SmilesDataset(smiles, canonize=False)
        parts = [torch.zeros(0, _FEATURES, dtype=torch.float64, device=self.device)]
        for start in range(0, len(smiles), _ROWS):
            rows = range(start, min(start + _ROWS, len(smiles)))
            x = torch.stack([torch.from_numpy(letters[row]) for row in rows])
            with torch.autocast(self.device.type, enabled=False):
                parts.append(network(x.mT.float().to(self.device)).double())
        return torch.cat(parts)


def _package() -> Any:
    try:
        return import_module("fcd_torch")
    except ImportError as error:
        raise ValueError("FCD needs fcd_torch: pip install 'lightning_sgm[molecules]'") from error
