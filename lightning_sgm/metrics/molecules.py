"""Judges of generated molecules: validity, uniqueness, novelty, and likeness to the data by their structure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from datamodules.chemistry import Largest, Molecule, decode, quiet, rdkit, read

_SHORT = 0  # digest of no molecule, of no scaffold
_RADIUS, _FINGERPRINT = 2, 1024
_RINGS = 2
_ROWS = 2048  # generated molecules whose similarities are computed at once


class Reader:
    """Makes molecules of the arrays that a metric is fed. Metrics of one batch share the work: it is remembered.

    Args:
        atoms: element symbols of the channels, or None for those of the data that ``learn`` is shown.
        largest: fragment that stands for a molecule in pieces, see ``datamodules.chemistry.decode``.
    """

    def __init__(self, atoms: list[str] | None, largest: Largest) -> None:
        self.atoms, self.largest = atoms, largest

    def learn(self, data: Any) -> None:
        """Take the atoms of a DataModule, unless they are known.

        Raises:
            ValueError: it has none.
        """
        if self.atoms is None and data is not None:
            if "atoms" not in data.spec:
                raise ValueError(f"metrics of molecules cannot judge data of kind {data.spec.get('kind')!r}")
            self.atoms = list(data.spec["atoms"])

    def __call__(self, x: Tensor, adj: Tensor, node_mask: Tensor) -> list[Molecule]:
        """Molecules of a batch; ValueError if nobody said which atoms the channels are."""
        if self.atoms is None:
            raise ValueError("a metric of molecules needs atoms=[...], the elements of the channels, or molecule data")
        return decode(x, adj, node_mask, self.atoms, self.largest)


def comparable(name: str, real: int, generated: int, least: int = 1) -> bool:
    """Whether both sides have ``least`` molecules; says so where samples are too few, as of a model at its beginning.

    Raises:
        ValueError: too few real molecules.
    """
    if real < least:
        raise ValueError(f"{name} needs {least} or more real molecules, got {real}")
    if generated < least:
        rank_zero_warn(f"{name} is not a number: {generated} of the samples are molecules, and {least} are needed")
    return generated >= least


class MoleculeQuality(Metric):
    """How many generated molecules are chemically possible, different and new; fractions in [0, 1].

    - ``valid``: no atom has too many bonds, without any correction (N, O, S may take a charge, pieces are allowed), and
      something readable comes out; of all samples. In GDSS "validity without correction", of the readable ones, which
      are all but always all.
    - ``valid_corrected``: a molecule comes out after correction; near 1 by construction.
    - ``unique``: different molecules (canonical SMILES after correction, without stereo), of those that come out.
    - ``novel``: those that are not training molecules, of the different ones. Only with data.
    - ``fragmented``: samples that are several pieces after correction, of all samples; no other number shows it.

    unique falls and novel rises with the number of samples: compare equal counts.

    Args:
        atoms: element symbols of the channels; ``prepare`` takes those of the data.
        largest: fragment that stands for a molecule in pieces, see ``datamodules.chemistry.decode``.

    Attributes:
        inputs: the batch entries passed to ``update``.
        floor: no floor is computed: training molecules are valid and not novel.
    """

    full_state_update = False
    is_differentiable = False
    inputs: tuple[str, ...] = ("x", "adj", "node_mask")
    name = "molecules"
    floor = False
    digests: list[Tensor]
    facts: list[Tensor]

    def __init__(self, atoms: list[str] | None = None, largest: Largest = "text") -> None:
        super().__init__()
        self.reader = Reader(atoms, largest)
        self._known: Tensor | None = None
        for name in ("digests", "facts"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def prepare(self, data: Any) -> None:
        """Take atoms and training molecules of a DataModule; without one ``novel`` is left out."""
        self.reader.learn(data)
        if data is not None and self._known is None:
            self._known = _digests(data.smiles("train"))

    def update(self, x: Tensor, adj: Tensor, node_mask: Tensor, real: bool) -> None:
        """Add samples; data are not looked at.

        Args:
            x: (B, N, F) one-hot atom types.
            adj: (B, N, N) bond orders.
            node_mask: (B, N) bool.
            real: whether they are data or samples.
        """
        if real:
            return
        found = self.reader(x, adj, node_mask)
        self.digests.append(_digests(molecule.smiles for molecule in found).to(self.device))
        facts = [(molecule.valid and bool(molecule.smiles), molecule.fragments > 1) for molecule in found]
        self.facts.append(torch.tensor(facts, dtype=torch.uint8, device=self.device).view(-1, 2))

    def compute(self) -> dict[str, Tensor]:
        """The fractions, float64; NaN where there is nothing to take them of.

        Raises:
            ValueError: there was no sample.
        """
        digests, facts = _joined(self.digests), _joined(self.facts)
        if not len(digests):
            raise ValueError("MoleculeQuality has seen no sample")
        come_out = digests[digests != _SHORT]
        different = come_out.unique()
        result = {
            "valid": facts[:, 0].double().mean(),
            "valid_corrected": (digests != _SHORT).double().mean(),
            "unique": _share(len(different), len(come_out)),
            "fragmented": facts[:, 1].double().mean(),
        }
        if self._known is not None:
            new = ~torch.isin(different.cpu(), self._known)
            result["novel"] = _share(int(new.sum()), len(different))
        return {name: value.to(self.device) for name, value in result.items()}


class SimilarityToData(Metric):
    """How alike generated and real molecules are in their parts; 1 is best (Polykovskiy et al. 2020, MOSES).

    - ``snn``: for each generated molecule the largest Tanimoto similarity of Morgan fingerprints (radius 2, 1024 bits)
      to a real one, and the mean of these. It rises with the number of real molecules.
    - ``scaffold``: cosine of the counts of Murcko scaffolds with two or more rings; NaN where a side has none, as among
      molecules of few atoms.

    Args:
        atoms: element symbols of the channels; ``prepare`` takes those of the data.
        largest: fragment that stands for a molecule in pieces, see ``datamodules.chemistry.decode``.

    Attributes:
        inputs: the batch entries passed to ``update``.
    """

    higher_is_better = True
    full_state_update = False
    is_differentiable = False
    inputs: tuple[str, ...] = ("x", "adj", "node_mask")
    name = "molecules"
    real_bits: list[Tensor]
    real_scaffolds: list[Tensor]
    generated_bits: list[Tensor]
    generated_scaffolds: list[Tensor]

    def __init__(self, atoms: list[str] | None = None, largest: Largest = "text") -> None:
        super().__init__()
        self.reader = Reader(atoms, largest)
        for side in ("real", "generated"):
            self.add_state(f"{side}_bits", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_scaffolds", [], dist_reduce_fx="cat")

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
        with quiet():
            molecules = [read(smiles) for smiles in found]
        side = "real" if real else "generated"
        getattr(self, f"{side}_bits").append(_fingerprints(molecules).to(self.device))
        getattr(self, f"{side}_scaffolds").append(_digests(map(_scaffold, molecules)).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """snn and scaffold, float64 scalars in [0, 1]; NaN if no sample is a molecule.

        Raises:
            ValueError: no real molecule.
        """
        real, generated = _joined(self.real_bits), _joined(self.generated_bits)
        if not comparable("snn", len(real), len(generated)):
            nothing = torch.tensor(float("nan"), dtype=torch.float64, device=self.device)
            return {"snn": nothing, "scaffold": nothing}
        return {
            "snn": _nearest(generated, real).mean(),
            "scaffold": _cosine(_joined(self.real_scaffolds), _joined(self.generated_scaffolds)),
        }


def _digests(smiles: Iterable[str]) -> Tensor:
    """(n,) int64, 64 bits that stand for each string, 0 for the empty one; equal strings and no others have equal."""
    digests = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) if text else 0 for text in smiles]
    return torch.from_numpy(np.array(digests, dtype=np.uint64).view(np.int64))


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    """All rows, however many processes were gathered."""
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.zeros(0, 2, dtype=torch.int64)


def _share(part: int, whole: int) -> Tensor:
    return torch.tensor(part / whole if whole else float("nan"), dtype=torch.float64)


def _fingerprints(molecules: list[Any]) -> Tensor:
    """(n, 128) uint8, eight bits each."""
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=_RADIUS, fpSize=_FINGERPRINT)
    bits = [generator.GetFingerprintAsNumPy(molecule) for molecule in molecules]
    return torch.from_numpy(np.packbits(np.array(bits, dtype=np.uint8).reshape(-1, _FINGERPRINT), axis=1))


def _scaffold(molecule: Any) -> str:
    """SMILES of the Murcko scaffold; "" where it has fewer than two rings."""
    if molecule.GetRingInfo().NumRings() < _RINGS:
        return ""  # a scaffold has the molecule's rings
    from rdkit.Chem.Scaffolds import MurckoScaffold

    text: str = rdkit().MolToSmiles(MurckoScaffold.GetScaffoldForMol(molecule))
    return text


def _nearest(generated: Tensor, real: Tensor) -> Tensor:
    """(n,) float64, the largest Tanimoto similarity of each packed fingerprint to one of ``real``."""
    reference = _unpacked(real)
    size = reference.sum(1)
    found = []
    for rows in generated.split(_ROWS):
        bits = _unpacked(rows)
        common = bits @ reference.T
        found.append((common / (bits.sum(1)[:, None] + size - common).clamp(min=1)).amax(1))
    return torch.cat(found).double()


def _unpacked(packed: Tensor) -> Tensor:
    """(n, 1024) float32 of (n, 128) uint8."""
    weights = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed[:, :, None] & weights).ne(0).flatten(1).float()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the counts of digests other than that of nothing."""
    a, b = a[a != _SHORT], b[b != _SHORT]
    kinds, place = torch.cat([a, b]).unique(return_inverse=True)
    counts = [torch.bincount(part, minlength=len(kinds)).double() for part in place.split([len(a), len(b)])]
    return (counts[0] @ counts[1]) / (counts[0].norm() * counts[1].norm())
