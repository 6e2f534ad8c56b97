"""How far apart two sets of molecules are in the counts of their neighbourhoods (NSPDK)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.chemistry import Largest, quiet, read
from lightning_sgm.metrics.base import DoubleMetric
from lightning_sgm.metrics.molecules import Reader, comparable

_COMPLEXITY = 4
_BITS = 16
_PAIRS = 1 << 20  # pairs of atoms that are looked at together
Array = NDArray[Any]
Hashes = NDArray[np.uint64]


class NSPDK(DoubleMetric):
    """Squared maximum mean discrepancy of molecules under the neighbourhood subgraph pairwise distance kernel.

    A molecule's features (Costa and De Grave 2010, as EDeN counts them with complexity 4) are pairs of atoms at
    distance d = 0..4, each seen with its neighbourhood of radius r = 0..4, and the second atom of the pair alone. A
    neighbourhood is the elements with their numbers of bonds, and the bonds' kinds, by distance from its centre. Counts
    are hashed into 65,536 numbers, scaled to norm 1 for each (r, d) and then in all. The kernel is linear, so the
    value is |mean of real - mean of generated|^2: two sums are kept, however many molecules come.

    As in GDSS (Jo et al. 2022) molecules are corrected, sanitised ones, and an aromatic bond counts as single. Its
    hash changes with PYTHONHASHSEED, and its values by about one percent; this one is fixed.

    The value falls with the number of molecules: compare only equal counts, and know the floor (training data against
    test data). 0 is best, 2 is two sets without a common feature.

    Args:
        atoms: element symbols of the channels; ``prepare`` takes those of the data.
        largest: fragment that stands for a molecule in pieces, see ``datamodules.chemistry.decode``.

    Attributes:
        inputs: the batch entries passed to ``update``.
    """

    higher_is_better = False
    inputs: tuple[str, ...] = ("x", "adj", "node_mask")
    name = "molecules"
    real_count: Tensor
    generated_count: Tensor

    def __init__(self, atoms: list[str] | None = None, largest: Largest = "text") -> None:
        super().__init__()
        self.reader = Reader(atoms, largest)
        for side in ("real", "generated"):
            self.add_sum(f"{side}_features", 1 << _BITS)
            self.add_sum(f"{side}_count")

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
        side = "real" if real else "generated"
        _, numbers, values = features(found)
        total = np.bincount(numbers, values, 1 << _BITS)
        self.add(f"{side}_features", torch.from_numpy(total).to(self.device))
        self.add(f"{side}_count", float(len(found)))

    def compute(self) -> dict[str, Tensor]:
        """nspdk, a float64 scalar in [0, 2]; NaN if no sample is a molecule.

        Raises:
            ValueError: no real molecule.
        """
        comparable("nspdk", int(self.real_count), int(self.generated_count))
        real, generated = (
            getattr(self, f"{side}_features") / getattr(self, f"{side}_count") for side in ("real", "generated")
        )
        return {"nspdk": (real - generated).square().sum()}


def features(smiles: Sequence[str]) -> tuple[Array, Array, Array]:
    """The hashed features of molecules, as the non-zero entries of a sparse matrix with rows of norm 1.

    Args:
        smiles: n molecules that rdkit can read.

    Returns:
        row in [0, n), number of the feature in [0, 65536), value: three arrays of equal length.
    """
    if not smiles:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0)
    with quiet():
        molecules: list[Any] = [read(text) for text in smiles]
    step = max(1, _PAIRS // max(molecule.GetNumAtoms() for molecule in molecules) ** 2)
    starts = range(0, len(molecules), step)
    parts = [_features(molecules[start : start + step]) for start in starts]
    rows = np.concatenate([row + start for start, (row, _, _) in zip(starts, parts, strict=True)])
    return rows, np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def _features(molecules: list[Any]) -> tuple[Array, Array, Array]:
    """``features`` of a few molecules."""
    elements, ends, orders = _arrays(molecules)
    distance = _distances(elements > 0, ends, orders > 0)
    hoods = _neighbourhoods(elements, ends, orders, distance)
    found: list[Array] = []
    for d in range(_COMPLEXITY + 1):
        row, first, second = np.nonzero(distance == d)
        for r in range(_COMPLEXITY + 1):
            # A neighbourhood that is smaller than its radius does not count.
            reaches = (distance == r).any(-1)
            kept = reaches[row, first] & reaches[row, second]
            rows = row[kept]
            a, b = hoods[r][rows, first[kept]], hoods[r][rows, second[kept]]
            group = (rows * (_COMPLEXITY + 1) + d) * (_COMPLEXITY + 1) + r
            for hashed in (_hash(np.minimum(a, b), np.maximum(a, b), r, d), _hash(b, r, d)):
                found.append(group << _BITS | (hashed >> np.uint64(64 - _BITS)).astype(np.int64))
    keys, counts = np.unique(np.concatenate(found), return_counts=True)
    group, number = keys >> _BITS, keys & ((1 << _BITS) - 1)
    row = group // (_COMPLEXITY + 1) ** 2
    values = counts / np.sqrt(np.bincount(group, counts.astype(float) ** 2))[group]
    # Where two (r, d) of a molecule share a number the later one takes it, as in EDeN.
    order = np.lexsort((group, number, row))
    row, number, values = row[order], number[order], values[order]
    last = np.append((row[1:] != row[:-1]) | (number[1:] != number[:-1]), True)
    row, number, values = row[last], number[last], values[last]
    return row, number, values / np.sqrt(np.bincount(row, values**2))[row]


def _arrays(molecules: list[Any]) -> tuple[Array, Array, Array]:
    """Atomic numbers (B, N), ends (B, M, 2) and whole orders (B, M) of bonds; zeros where there is no atom or bond."""
    nodes = max(molecule.GetNumAtoms() for molecule in molecules)
    bonds = max(1, max(molecule.GetNumBonds() for molecule in molecules))
    elements = np.zeros((len(molecules), nodes), dtype=np.int64)
    ends = np.zeros((len(molecules), bonds, 2), dtype=np.int64)
    orders = np.zeros((len(molecules), bonds), dtype=np.int64)
    for row, molecule in enumerate(molecules):
        elements[row, : molecule.GetNumAtoms()] = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
        for place, bond in enumerate(molecule.GetBonds()):
            ends[row, place] = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            orders[row, place] = int(bond.GetBondTypeAsDouble())  # an aromatic 1.5 becomes 1
    return elements, ends, orders


def _distances(there: Array, ends: Array, bonded: Array) -> Array:
    """(B, N, N) number of bonds between atoms, one more than the complexity where it is larger or there is no path."""
    rows, nodes = there.shape
    row, bond = np.nonzero(bonded)
    i, j = ends[row, bond].T
    neighbours = np.zeros((rows, nodes, nodes), dtype=np.float32)
    neighbours[row, i, j] = neighbours[row, j, i] = 1.0
    reached = np.eye(nodes, dtype=np.float32) * there[:, None]
    distance = np.full((rows, nodes, nodes), _COMPLEXITY + 1, dtype=np.int8)
    for d in range(_COMPLEXITY + 1):
        distance[(reached > 0) & (distance > d)] = d
        reached = reached + reached @ neighbours
        np.minimum(reached, 1.0, out=reached)
    return distance


def _neighbourhoods(elements: Array, ends: Array, orders: Array, distance: Array) -> list[Hashes]:
    """Hashes (B, N) of the neighbourhoods of radius 0, 1, ..., of all atoms."""
    rows = np.arange(len(elements))[:, None]
    atoms = np.where(elements > 0, _hash(elements, (distance == 1).sum(-1)), np.uint64(0))
    bonds = np.where(orders > 0, _hash(orders), np.uint64(0))
    # A bond lies behind the nearer of its ends.
    nearer = np.minimum(distance[rows, ends[..., 0]], distance[rows, ends[..., 1]])
    running = np.zeros_like(atoms)
    hoods = []
    for d in range(_COMPLEXITY + 1):
        # Sums do not depend on the order of what is at the same distance.
        running = _hash(running, np.where(distance == d, atoms[:, None], np.uint64(0)).sum(-1), 2 * d)
        hoods.append(running)
        running = _hash(running, np.where(nearer == d, bonds[:, :, None], np.uint64(0)).sum(1), 2 * d + 1)
    return hoods


def _hash(*parts: Array | int) -> Hashes:
    """64 bits from whole numbers, in their order, with broadcasting (the finaliser of MurmurHash3, chained)."""
    state = np.full(1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for part in parts:
        state = (state ^ np.asarray(part).astype(np.uint64)) * np.uint64(0xFF51AFD7ED558CCD)
        state = (state ^ (state >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        state ^= state >> np.uint64(33)
    return state
