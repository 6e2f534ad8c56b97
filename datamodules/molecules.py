"""Molecules as graphs of heavy atoms with bond orders: own SMILES files, QM9, random ones without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.base import DataModule, Split, require_positive
from datamodules.chemistry import ORDERS, atomic_numbers, rdkit, symbols
from datamodules.loaders import Batch, permutation
from datamodules.molecule_sources import Array, Listing, grow, pack, read_file, read_qm9

_SPLIT = 6  # purpose of a hash, see loaders.py
_QM9_ATOMS = ["C", "N", "O", "F"]


class MoleculeDataModule(DataModule):
    """Molecules of heavy atoms: a batch has ``x``, ``adj``, ``node_mask`` and ``index``.

    ``x`` (B, N, F) are one-hot atom types, ``adj`` (B, N, N) the bond orders 0, 1, 2, 3 of the kekulised molecules,
    ``node_mask`` (B, N) is bool, ``index`` (B,) int64; N is the largest atom count of the batch. Hydrogens, stereo,
    isotopes and formal charges are dropped (Jo et al. 2022). What rdkit cannot read, what has other atoms or bonds and
    what is too large is left out, counted and named in a message. A file without marks of its test molecules is cut at
    random, the same way for every ``seed``. (The test molecules of the published QM9 numbers are listed in a file that
    is not ours to ship: mark them in a ``test_column`` to compare.)

    ``spec``: kind "molecule", nodes (of the largest molecule), features F, bonds 3, atoms (F element symbols),
    node_counts (number of training molecules with 0, 1, ..., nodes atoms), edge_mean and edge_std (of ``adj`` over the
    off-diagonal entries inside the masks of the training molecules), feature_mean and feature_std (F of each, of ``x``
    over all their atoms).

    Args:
        dataset: "grown" (up to 5,000 random molecules that obey valences and nothing else, without a download) or
            "qm9" (130,831 molecules; needs the package qm9pack).
        path: a .csv file with SMILES in a column, or a .smi or .txt file with a SMILES at the start of every line;
            takes the place of ``dataset``.
        column: of a .csv file, in upper or lower case.
        test_column: of a .csv file, 1 for the molecules of the test split; then ``test_fraction`` is not used.
        atoms: element symbols in the order of the channels; None for those of the training molecules.
        max_nodes: leave out molecules with more heavy atoms; the size of "grown" ones, 9 by default.
        val_fraction: part of the molecules for validation, of those that are not for testing where a column marks
            these; 0 validates on the test molecules. None: 0 with marks, 0.1 without.
        test_fraction: part of the molecules for testing.
        batch_size: molecules per batch and process.
        seed: of the order of training.
        cache: folder where sets of more than 20,000 molecules are kept as numbers; None parses them each time.

    Raises:
        ValueError: an argument out of range, rdkit or qm9pack is not installed, a file without molecules.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        dataset: Literal["grown", "qm9"] = "grown",
        path: str | None = None,
        column: str = "smiles",
        test_column: str | None = None,
        atoms: list[str] | None = _QM9_ATOMS,
        max_nodes: int | None = None,
        val_fraction: float | None = None,
        test_fraction: float = 0.1,
        batch_size: int = 256,
        seed: int = 0,
        cache: str | None = "data",
    ) -> None:
        super().__init__(batch_size, seed)
        require_positive(max_nodes=max_nodes or 1)
        if val_fraction is None:
            val_fraction = 0.1 if test_column is None else 0.0
        if not (val_fraction >= 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                "test_fraction must be above 0, val_fraction at least 0 and their sum below 1, got "
                f"{test_fraction} and {val_fraction}"
            )
        rdkit()
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._name = path or dataset
        listing = self._listing(dataset, path, column, test_column, max_nodes)
        self._packed = pack(listing, self._name, cache)
        rows = self._cut(listing)
        if atoms is None:
            atoms = self._observed(rows["train"])
        self._type = np.full(256, -1)
        self._type[atomic_numbers(atoms)] = np.arange(len(atoms))
        kept = self._kept(listing, atoms, max_nodes)
        self._rows = {split: torch.from_numpy(row[kept[row]]) for split, row in rows.items()}
        for split in ("train", "val", "test"):
            if not len(self._rows[split]):
                raise ValueError(f"{self._name} has no molecules for {split}: give more, or other fractions")
        self._node_start, self._edge_start = (
            np.cumsum(counts) - counts for counts in (self._packed.num_nodes, self._packed.num_edges)
        )
        self.spec = self._described(list(atoms))

    def load(self) -> None:
        """Nothing: the molecules were read at construction, as ``spec`` depends on them."""

    def count(self, split: Split) -> int:
        """Number of molecules of a split."""
        return len(self._rows[split])

    def fetch(self, split: Split, index: Tensor, epoch: int | None) -> Batch:
        """Molecules ``index`` (B,) of a split: x (B, N, F), adj (B, N, N) float32 and node_mask (B, N) bool."""
        rows = self._rows[split][index].numpy()
        nodes, edges = self._packed.num_nodes[rows], self._packed.num_edges[rows]
        largest = int(nodes.max())
        molecule, place, source = _members(nodes, self._node_start[rows])
        x = np.zeros((len(rows), largest, len(self.spec["atoms"])), dtype=np.float32)
        x[molecule, place, self._type[self._packed.numbers[source]]] = 1.0
        adj = np.zeros((len(rows), largest, largest), dtype=np.float32)
        molecule, _, source = _members(edges, self._edge_start[rows])
        i, j = self._packed.edge_index[:, source]
        adj[molecule, i, j] = adj[molecule, j, i] = self._packed.orders[source]
        mask = np.arange(largest) < nodes[:, None]
        return {"x": torch.from_numpy(x), "adj": torch.from_numpy(adj), "node_mask": torch.from_numpy(mask)}

    def smiles(self, split: Split) -> list[str]:
        """Canonical SMILES of the molecules of a split in their order: without stereo, charges as in the source."""
        return [self._packed.smiles[row] for row in self._rows[split].tolist()]

    def _listing(
        self, dataset: str, path: str | None, column: str, test_column: str | None, max_nodes: int | None
    ) -> Listing:
        if path is not None:
            return read_file(Path(path), column, test_column)
        if test_column is not None:
            raise ValueError("test_column needs a path to a .csv file")
        if dataset == "grown":
            return grow(5000, max_nodes or 9)
        if dataset == "qm9":
            return read_qm9()
        raise ValueError(f"there is no dataset {dataset!r}: choose grown or qm9, or give a path")

    def _cut(self, listing: Listing) -> dict[Split, Array]:
        """Positions in the packed set of all splits, in increasing order."""
        total = len(self._packed.row)
        if listing.is_test is None:
            order = permutation(total, _SPLIT).numpy()
            test, others = np.split(order, [max(1, round(total * self.test_fraction))])
        else:
            marked = listing.is_test[self._packed.row]
            test, others = np.flatnonzero(marked), np.flatnonzero(~marked)
            others = others[permutation(len(others), _SPLIT).numpy()]
        if not self.val_fraction:
            return {"train": np.sort(others), "val": np.sort(test), "test": np.sort(test)}
        whole = total if listing.is_test is None else len(others)
        val, train = np.split(others, [max(1, round(whole * self.val_fraction))])
        return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}

    def _observed(self, rows: Array) -> list[str]:
        """Elements of molecules, by atomic number."""
        mine = np.repeat(np.isin(np.arange(len(self._packed.row)), rows), self._packed.num_nodes)
        return symbols(np.unique(self._packed.numbers[mine]).tolist())

    def _kept(self, listing: Listing, atoms: list[str], max_nodes: int | None) -> Array:
        """(M,) which packed molecules are used; says what is left out."""
        packed, total = self._packed, len(listing.smiles)
        unread = np.setdiff1d(np.arange(total), packed.row)
        owner = np.repeat(np.arange(len(packed.row)), packed.num_nodes)
        foreign = np.bincount(owner, self._type[packed.numbers] < 0, len(packed.row)) > 0
        large = packed.num_nodes > (max_nodes or packed.num_nodes.max())
        for rows, reason in (
            (unread, "cannot be read by rdkit, or have bonds of other orders than 1, 2, 3,"),
            (packed.row[foreign], f"have atoms other than {', '.join(atoms)}"),
            (packed.row[large & ~foreign], f"have more than max_nodes={max_nodes} heavy atoms"),
        ):
            if len(rows):
                first = listing.smiles[rows[0]]
                rank_zero_warn(
                    f"{self._name}: {len(rows)} of {total} molecules {reason} and are left out, first {first!r}"
                )
        kept = ~(foreign | large)
        charged = int((packed.charged & kept).sum())
        if charged:
            rank_zero_info(f"{self._name}: formal charges of {charged} of {int(kept.sum())} molecules are dropped")
        return kept

    def _described(self, atoms: list[str]) -> dict[str, object]:
        rows = self._rows["train"].numpy()
        nodes = self._packed.num_nodes[rows]
        orders = self._packed.orders[_members(self._packed.num_edges[rows], self._edge_start[rows])[2]].astype(float)
        types = self._type[self._packed.numbers[_members(nodes, self._node_start[rows])[2]]]
        share = np.bincount(types, minlength=len(atoms)) / len(types)
        entries = max(int((nodes * (nodes - 1)).sum()), 1)  # an edge stands in two of them
        mean = 2 * orders.sum() / entries
        used = torch.cat(list(self._rows.values())).numpy()
        largest = int(self._packed.num_nodes[used].max())
        return {
            "kind": "molecule",
            "nodes": largest,
            "features": len(atoms),
            "bonds": ORDERS,
            "atoms": atoms,
            "node_counts": np.bincount(nodes, minlength=largest + 1).tolist(),
            "edge_mean": float(mean),
            "edge_std": float(np.sqrt(2 * (orders**2).sum() / entries - mean**2)),
            "feature_mean": share.tolist(),
            "feature_std": np.sqrt(share * (1 - share)).tolist(),
        }


def _members(counts: Array, starts: Array) -> tuple[Array, Array, Array]:
    """Row, place in its row and position of every member, of rows with ``counts`` (B,) members from ``starts`` (B,)."""
    row = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, place, starts[row] + place
