"""What atoms and bonds mean: SMILES to arrays and back, valences, corrections. The one home of this knowledge.

A molecule is a graph of heavy atoms; ``adj`` holds bond orders 0, 1, 2, 3 of its kekulised form. Hydrogens fill up
valences and are never written down; formal charges, stereo and isotopes are not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Largest = Literal["text", "atoms"]
ORDERS = 3
_CHARGED = {7: 3, 8: 2, 16: 2}  # N, O, S by atomic number, and their neutral valence
_REMEMBERED = 1 << 15  # decoded molecules; several metrics and writers see the same batch one after the other


class Molecule(NamedTuple):
    """What arrays say.

    Attributes:
        smiles: canonical SMILES of the corrected molecule's largest fragment; "" where there is none.
        valid: whether no atom had too many bonds, before any correction (N, O, S may take a charge).
        fragments: number of fragments after correction.
    """

    smiles: str
    valid: bool
    fragments: int


class Encoded(NamedTuple):
    """A molecule of n heavy atoms and m bonds as numbers.

    Attributes:
        smiles: canonical, without stereo and isotopes; charges are kept here only.
        numbers: (n,) uint8 atomic numbers.
        edges: (2, m) uint8 pairs i < j of bonded atoms.
        orders: (m,) uint8 bond orders 1, 2, 3.
        charged: whether charges were dropped.
    """

    smiles: str
    numbers: NDArray[np.uint8]
    edges: NDArray[np.uint8]
    orders: NDArray[np.uint8]
    charged: bool


def rdkit() -> Any:
    """The module ``rdkit.Chem``.

    Raises:
        ValueError: rdkit is not installed.
    """
    try:
        from rdkit import Chem
    except ImportError as error:
        raise ValueError("molecules need rdkit: pip install 'lightning_sgm[molecules]'") from error
    return Chem


def quiet() -> Any:
    """A context in which rdkit writes no messages."""
    rdkit()
    from rdkit import rdBase

    return rdBase.BlockLogs()


def atomic_numbers(atoms: Sequence[str]) -> list[int]:
    """Atomic numbers of element symbols such as "C" or "Cl".

    Raises:
        ValueError: no such element, one named twice, or none at all.
    """
    table = rdkit().GetPeriodicTable()
    known = {table.GetElementSymbol(number): number for number in range(2, 119)}
    unknown = [symbol for symbol in atoms if symbol not in known]
    if unknown or len(set(atoms)) != len(atoms) or not atoms:
        raise ValueError(
            f"atoms must be different heavy elements such as [C, N, O, F], got {list(atoms)}"
            + (f": {unknown[0]!r} is none" if unknown else "")
        )
    return [known[symbol] for symbol in atoms]


def symbols(numbers: Sequence[int]) -> list[str]:
    """Element symbols of atomic numbers."""
    table = rdkit().GetPeriodicTable()
    return [table.GetElementSymbol(int(number)) for number in numbers]


def read(smiles: str) -> Any | None:
    """The sanitised rdkit molecule of a SMILES string, or None if rdkit cannot read it or finds no atom; silent."""
    with quiet():
        molecule = rdkit().MolFromSmiles(smiles)
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def encode(smiles: str) -> Encoded | None:
    """A SMILES string as numbers, or None if it is no molecule that bond orders 1, 2, 3 can say.

    Atoms come in the order of the canonical SMILES, so all spellings of a molecule give the same arrays.
    """
    chem = rdkit()
    found = read(smiles)
    canonical = chem.MolToSmiles(found, isomericSmiles=False) if found is not None else ""
    molecule = read(canonical)
    if molecule is None or molecule.GetNumAtoms() > 255:
        return None
    chem.Kekulize(molecule, clearAromaticFlags=True)
    pairs = [sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())) for bond in molecule.GetBonds()]
    orders = [_order(bond) for bond in molecule.GetBonds()]
    if max(orders, default=0) > ORDERS:
        return None  # e.g. dative bonds of metals
    return Encoded(
        canonical,
        np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], dtype=np.uint8),
        np.array(pairs, dtype=np.uint8).reshape(-1, 2).T,
        np.array(orders, dtype=np.uint8),
        any(atom.GetFormalCharge() for atom in molecule.GetAtoms()),
    )


def decode(
    x: Tensor, adj: Tensor, node_mask: Tensor, atoms: Sequence[str], largest: Largest = "text"
) -> list[Molecule]:
    """Molecules of a batch of arrays, corrected as GDSS does (Jo et al. 2022, its ``utils/mol_utils.py``).

    Bonds are added one at a time, and a N, O or S atom that then has exactly one too many gets the charge +1. While an
    atom has too many, the first of its bonds of the highest order is lowered by one, which removes a single bond. Of
    several fragments one is kept. A batch that was decoded just before costs next to nothing.

    Args:
        x: (B, N, F) one-hot atom types; a row of zeros is no atom, and its bonds count for nothing.
        adj: (B, N, N) symmetric bond orders 0, 1, 2, 3.
        node_mask: (B, N) bool, nodes that may be atoms.
        atoms: F element symbols.
        largest: which fragment is kept: that of the longest SMILES ("text", as published) or of the most atoms.

    Returns:
        B molecules.

    Raises:
        ValueError: arrays of other shapes, or an order that is not 0, 1, 2, 3; rdkit is not installed.
    """
    if x.shape[-1] != len(atoms) or adj.shape != (*node_mask.shape, node_mask.shape[-1]):
        raise ValueError(
            f"molecules of {len(atoms)} atom types need x (B, N, {len(atoms)}) and adj (B, N, N), got {tuple(x.shape)} "
            f"and {tuple(adj.shape)}"
        )
    there = (node_mask & (x > 0.5).any(-1)).cpu().numpy()
    types = x.argmax(-1).cpu().numpy().astype(np.uint8)
    orders = adj.detach().float().cpu().numpy()
    if not np.isin(orders, range(ORDERS + 1)).all():
        raise ValueError("adj must hold the bond orders 0, 1, 2, 3: quantise samples first")
    numbers = np.array(atomic_numbers(atoms), dtype=np.uint8)[types]
    bonds = orders.astype(np.uint8)
    with quiet():
        return [
            _decoded(numbers[i, kept].tobytes(), bonds[i][np.ix_(kept, kept)].tobytes(), largest)
            for i, kept in enumerate(there)
        ]


def build(numbers: Sequence[int], bonds: NDArray[np.uint8]) -> Any:
    """The uncorrected rdkit molecule of n atomic numbers and (n, n) bond orders, with charges on N, O and S."""
    pairs = np.argwhere(np.tril(bonds, -1)).tolist()
    molecule = _atoms(numbers)
    _join(molecule, pairs, bonds)
    if _overfull(molecule) is None:
        return molecule  # with fewer bonds no atom had too many either
    # The order of the bonds decides which atoms get a charge.
    molecule = _atoms(numbers)
    for pair in pairs:
        _join(molecule, [pair], bonds)
        number = _overfull(molecule)
        if number is not None:
            atom = molecule.GetAtomWithIdx(number)
            neutral = _CHARGED.get(atom.GetAtomicNum())
            if neutral is not None and sum(map(_order, atom.GetBonds())) == neutral + 1:
                atom.SetFormalCharge(1)
    return molecule


def correct(molecule: Any) -> bool:
    """Lower bonds of an rdkit RWMol in place until every atom's valence is allowed; whether that was so before."""
    kinds = rdkit().BondType
    number = _overfull(molecule)
    valid = number is None
    while number is not None:
        bond = max(molecule.GetAtomWithIdx(number).GetBonds(), key=_order)
        ends, order = (bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()), _order(bond) - 1
        # Not SetBondType: a bond that was lowered goes behind the atom's others, as in the published code.
        molecule.RemoveBond(*ends)
        if order:
            molecule.AddBond(*ends, kinds.values[order])
        number = _overfull(molecule)
    return valid


@lru_cache(maxsize=_REMEMBERED)
def _decoded(numbers: bytes, bonds: bytes, largest: Largest) -> Molecule:
    chem = rdkit()
    molecule = build(numbers, np.frombuffer(bonds, dtype=np.uint8).reshape(len(numbers), len(numbers)))
    valid = correct(molecule)
    text = chem.MolToSmiles(molecule)
    pieces = text.split(".") if text else []
    if largest == "atoms":
        sizes = [chem.MolFromSmiles(piece, sanitize=False).GetNumAtoms() for piece in pieces]
    else:
        sizes = [len(piece) for piece in pieces]
    kept = chem.MolFromSmiles(pieces[int(np.argmax(sizes))]) if pieces else None
    return Molecule(chem.MolToSmiles(kept) if kept is not None else "", valid, len(pieces))


def _atoms(numbers: Sequence[int]) -> Any:
    chem = rdkit()
    molecule = chem.RWMol()
    for number in numbers:
        molecule.AddAtom(chem.Atom(int(number)))
    return molecule


def _join(molecule: Any, pairs: list[list[int]], bonds: NDArray[np.uint8]) -> None:
    kinds = rdkit().BondType.values
    for i, j in pairs:
        molecule.AddBond(i, j, kinds[int(bonds[i, j])])


def _order(bond: Any) -> int:
    return int(bond.GetBondType())


def _overfull(molecule: Any) -> int | None:
    """The first atom with more bonds than its element and charge allow."""
    chem = rdkit()
    problems = chem.DetectChemistryProblems(molecule, sanitizeOps=chem.SanitizeFlags.SANITIZE_PROPERTIES)
    return min((problem.GetAtomIdx() for problem in problems), default=None)
