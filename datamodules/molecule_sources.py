"""Where molecules come from: SMILES files, QM9, random growth; and sets of them as packed numbers."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from datamodules.chemistry import Encoded, atomic_numbers, build, encode, quiet, rdkit

Array = NDArray[Any]
_FORMAT = 1  # of the cache
_LARGE = 20_000  # molecules from which on parsing is worth a cache
_SECONDS = 10  # between two messages on progress
_ENDINGS = (".csv", ".smi", ".txt")
_TRUE, _FALSE = {"1", "1.0", "true", "yes", "test"}, {"0", "0.0", "false", "no", "train", ""}
_GROWN = {"C": 0.7, "N": 0.12, "O": 0.15, "F": 0.03}
_FREE = {"C": 4, "N": 3, "O": 2, "F": 1}


class Listing(NamedTuple):
    """SMILES as a source has them, and for each whether it belongs to the test split, where the source says that."""

    smiles: list[str]
    is_test: Array | None


class Packed(NamedTuple):
    """M molecules one behind the other.

    Attributes:
        smiles: M canonical SMILES.
        row: (M,) int64 position in the source, increasing.
        charged: (M,) bool, whether charges were dropped.
        num_nodes: (M,) int64.
        num_edges: (M,) int64.
        numbers: (sum of num_nodes,) uint8 atomic numbers.
        edge_index: (2, sum of num_edges) uint8 pairs i < j, counted within their molecule.
        orders: (sum of num_edges,) uint8.
    """

    smiles: list[str]
    row: Array
    charged: Array
    num_nodes: Array
    num_edges: Array
    numbers: Array
    edge_index: Array
    orders: Array


def read_file(path: Path, column: str, test_column: str | None) -> Listing:
    """SMILES of a .csv file with a header, or of a .smi or .txt file: the first word of every line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, no such column, or marks of test molecules that are no yes or no.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a .csv, .smi or .txt file of SMILES")
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"{path} is none of {', '.join(_ENDINGS)}: write SMILES into one of these")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            if path.suffix.lower() == ".csv":
                return _read_csv(path, stream, column, test_column)
            if test_column is not None:
                raise ValueError(f"{path} has no columns: test_column needs a .csv file")
            return Listing([line.split()[0] for line in stream if line.strip()], None)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_qm9() -> Listing:
    """The 130,831 molecules of QM9 (Ramakrishnan et al. 2014) as the package `qm9pack` has them, in QM9's order.

    Raises:
        ValueError: the package is not installed, or has other files.
    """
    found = importlib.util.find_spec("qm9pack")  # not imported: its code needs packages that are gone
    if found is None or found.origin is None:
        raise ValueError("dataset: qm9 needs the package qm9pack (104 MB): pip install qm9pack, or give a path")
    files = [Path(found.origin).parent / "data" / f"qm9_part{part}.csv" for part in (1, 2, 3)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"qm9pack has no {missing[0].name}: install version 1.0.3, pip install qm9pack==1.0.3")
    return Listing([smiles for file in files for smiles in read_file(file, "SMILES", None).smiles], None)


def grow(count: int, nodes: int) -> Listing:
    """At most ``count`` different random molecules of C, N, O and F of up to ``nodes`` atoms, always the same.

    Atoms are attached one by one to a random atom with a free valence, by a random bond order, and in every second
    molecule a random pair closes a ring. They obey valences and nothing else: many could not be made in a laboratory.
    """
    chem = rdkit()
    generator = np.random.default_rng(0)
    with quiet():
        found = [chem.MolToSmiles(build(*_grown(generator, nodes))) for _ in range(count)]
    return Listing(list(dict.fromkeys(found)), None)


def pack(listing: Listing, name: str, cache: str | None) -> Packed:
    """All molecules of a listing that rdkit can read, as numbers.

    Sets of more than 20,000 are parsed once and kept in the folder ``cache``, named by their content.

    Raises:
        ValueError: there is no molecule at all; rdkit is not installed.
    """
    from rdkit import __version__ as version  # canonical SMILES differ between versions

    text = "\n".join([str(_FORMAT), version, *listing.smiles])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = Path(cache) / f"molecules-{key}.npz" if cache and len(listing.smiles) > _LARGE else None
    if file is not None and file.is_file():
        with np.load(file, allow_pickle=False) as arrays:
            lines = arrays["smiles"].tobytes().decode().split("\n")
            return Packed(lines, **{field: arrays[field] for field in Packed._fields[1:]})
    packed = _parse(listing, name)
    if file is not None:
        _write(file, packed)
    return packed


def _parse(listing: Listing, name: str) -> Packed:
    begin = told = time.monotonic()
    rows: list[int] = []
    found: list[Encoded] = []
    for row, smiles in enumerate(listing.smiles):
        molecule = encode(smiles)
        if molecule is not None:
            rows.append(row)
            found.append(molecule)
        if (now := time.monotonic()) - told > _SECONDS:
            told, left = now, (now - begin) * (len(listing.smiles) / (row + 1) - 1)
            rank_zero_info(f"{name}: {row + 1} of {len(listing.smiles)} molecules parsed, {left:.0f} s left")
    if not found:
        raise ValueError(f"{name} has no molecule among {len(listing.smiles)} lines: does it hold SMILES?")
    return Packed(
        [molecule.smiles for molecule in found],
        np.array(rows),
        np.array([molecule.charged for molecule in found]),
        np.array([len(molecule.numbers) for molecule in found]),
        np.array([len(molecule.orders) for molecule in found]),
        np.concatenate([molecule.numbers for molecule in found]),
        np.concatenate([molecule.edges for molecule in found], axis=1),
        np.concatenate([molecule.orders for molecule in found]),
    )


def _write(file: Path, packed: Packed) -> None:
    """Write a cache file at once; what fails on the way leaves nothing behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    lines = np.frombuffer("\n".join(packed.smiles).encode(), dtype=np.uint8)
    try:
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, **{**packed._asdict(), "smiles": lines})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _read_csv(path: Path, stream: Any, column: str, test_column: str | None) -> Listing:
    reader = csv.reader(stream)
    header = [field.strip() for field in next(reader, [])]
    place = _place(path, header, column, "column")
    test = None if test_column is None else _place(path, header, test_column, "test_column")
    width = max(place, test or 0)
    smiles, marks = [], []
    for fields in reader:
        if not fields:
            continue
        if len(fields) <= width:
            raise ValueError(f"{path} line {reader.line_num} has {len(fields)} fields, fewer than its header")
        smiles.append(fields[place].strip())
        if test is not None:
            marks.append(fields[test].strip().lower())
    unclear = next((mark for mark in marks if mark not in _TRUE | _FALSE), None)
    if unclear is not None:
        raise ValueError(f"column {test_column} of {path} must say 1 or 0 (true or false), got {unclear!r}")
    return Listing(smiles, np.array([mark in _TRUE for mark in marks]) if test is not None else None)


def _place(path: Path, header: list[str], name: str, option: str) -> int:
    """Position of a column, whatever its case."""
    lower = [field.lower() for field in header]
    if name.lower() not in lower:
        raise ValueError(f"{path} has no column {name!r}, only {', '.join(header) or 'nothing'}: set {option}")
    return lower.index(name.lower())


def _grown(generator: np.random.Generator, nodes: int) -> tuple[list[int], NDArray[np.uint8]]:
    """Atomic numbers and bond orders of one random molecule."""
    size = int(generator.integers((nodes + 1) // 2, nodes + 1))
    names = generator.choice(list(_GROWN), size=size, p=list(_GROWN.values())).tolist()
    free = np.array([_FREE[name] for name in names])
    kinds = dict(zip(_GROWN, atomic_numbers(list(_GROWN)), strict=True))
    bonds = np.zeros((size, size), dtype=np.uint8)

    def bond(i: int, j: int, order: int) -> None:
        bonds[i, j] = bonds[j, i] = order
        free[[i, j]] -= order

    for atom in range(1, size):
        open_ends = np.flatnonzero(free[:atom])
        if not len(open_ends):
            size = atom
            break
        other = int(generator.choice(open_ends))
        bond(atom, other, min(int(generator.choice(3, p=[0.75, 0.2, 0.05])) + 1, int(free[atom]), int(free[other])))
    pairs = np.argwhere(np.triu((free[:size, None] > 0) & (free[:size] > 0) & (bonds[:size, :size] == 0), 1))
    if len(pairs) and generator.random() < 0.5:
        first, second = pairs[generator.integers(len(pairs))]
        bond(first, second, 1)
    return [kinds[name] for name in names[:size]], bonds[:size, :size]
