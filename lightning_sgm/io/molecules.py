"""Samples that are molecules: SMILES, tables, structure files and drawings, by rdkit."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.chemistry import decode, quiet, rdkit, read
from lightning_sgm.io.figures import pixels_of, save_figure
from lightning_sgm.io.files import atomic_write
from lightning_sgm.io.graphs import strip
from lightning_sgm.io.writers import Batch, Writer, names_of, numbers_of, with_suffix

_PANEL = (220, 190)  # pixels


class _Row(NamedTuple):
    """One sample, see :class:`~datamodules.chemistry.Molecule`."""

    number: int
    smiles: str
    valid: bool
    fragments: int


class MoleculeWriter(Writer):
    """Molecules, corrected and cut to their largest fragment as GDSS does, see :func:`datamodules.chemistry.decode`.

    Four files hold them: ``.csv`` has a row for every sample, with its number, SMILES, whether it was valid before
    correction and the number of fragments; ``.smi`` has "SMILES number" on each line, ``.sdf`` structures with
    coordinates in the plane, ``.png`` drawings. A sample that is no molecule has an empty SMILES in the first and is
    missing in the next two; a warning counts them. A batch that has ``adj_steps`` (R, S, N, N) and ``t`` (S,) too is
    shown as R strips of bonds coming out of noise, before correction, in ``save`` and ``log``.

    Args:
        atoms: element symbols of the channels.
        most: a picture shows at most so many molecules, the first.

    Raises:
        ValueError: rdkit is not installed.
    """

    def __init__(self, atoms: Sequence[str], most: int = 25) -> None:
        rdkit()  # to fail before hours of sampling
        self.atoms = list(atoms)
        self.most = most

    def save(self, batch: Batch, stem: Path) -> list[Path]:
        """``stem.csv``, ``stem.smi``, ``stem.sdf`` and ``stem.png``; of a batch with steps the last."""
        if "adj_steps" in batch:
            return [save_figure(strip(batch, self.atoms), with_suffix(stem, ".png"))]
        return self._write(self._rows(batch), stem)

    def save_each(self, batch: Batch, folder: Path) -> list[Path]:
        """One table ``folder/parts/FIRST.csv`` for all of the batch: as a file a molecule is one line."""
        rows = self._rows(batch)
        path = with_suffix(folder / "parts" / min(names_of(batch)), ".csv")
        _write_text(_table(rows), path)
        return [path] * len(rows)

    def collect(self, files: Sequence[Path], stem: Path) -> list[Path]:
        """All molecules in the order of their numbers, in the files that ``save`` writes."""
        rows = [row for file in dict.fromkeys(files) for row in _read_table(file)]
        return self._write(sorted(rows), stem)

    def log(self, logger: Logger, tag: str, batch: Batch, step: int) -> None:
        """The picture."""
        if isinstance(logger, TensorBoardLogger):
            steps = "adj_steps" in batch
            pixels = pixels_of(strip(batch, self.atoms)) if steps else self._drawings(self._rows(batch))
            logger.experiment.add_image(tag, pixels, step, dataformats="HWC")

    def _rows(self, batch: Batch) -> list[_Row]:
        found = decode(batch["x"], batch["adj"], batch["node_mask"], self.atoms)
        return [_Row(number, *molecule) for number, molecule in zip(numbers_of(batch), found, strict=True)]

    def _write(self, rows: list[_Row], stem: Path) -> list[Path]:
        from PIL import Image

        table, smiles, structures, picture = (with_suffix(stem, end) for end in (".csv", ".smi", ".sdf", ".png"))
        decoded = [row for row in rows if row.smiles]
        if len(decoded) < len(rows):
            rank_zero_warn(
                f"{len(rows) - len(decoded)} of {len(rows)} samples are no molecule, even corrected: their smiles are "
                f"empty in {table}"
            )
        _write_text(_table(rows), table)
        _write_text("".join(f"{row.smiles} {row.number}\n" for row in decoded), smiles)
        _write_text(_structures(decoded), structures)
        with atomic_write(picture) as file:
            Image.fromarray(self._drawings(rows)).save(file, format="PNG")
        return [table, smiles, structures, picture]

    def _drawings(self, rows: Sequence[_Row]) -> NDArray[np.uint8]:
        """(height, width, 3): structures row by row in a square grid, numbered, with what correction did."""
        rdkit()
        from rdkit.Chem.Draw import rdMolDraw2D

        rows = rows[: self.most]
        columns = math.ceil(math.sqrt(len(rows)))
        width, height = _PANEL
        canvas = rdMolDraw2D.MolDraw2DCairo(columns * width, math.ceil(len(rows) / columns) * height, width, height)
        options: Any = canvas.drawOptions()
        options.legendFontSize, options.padding, options.fixedBondLength = 15, 0.12, 26.0
        options.drawMolsSameScale = False  # one long chain would make all others tiny
        options.bondLineWidth = 2
        molecules = [read(row.smiles) if row.smiles else _nothing() for row in rows]
        canvas.DrawMolecules(molecules, legends=[_legend(row) for row in rows])
        canvas.FinishDrawing()
        return _pixels(canvas.GetDrawingText())


def _nothing() -> Any:
    """A word in place of a structure; rdkit leaves out the legends of empty ones."""
    molecule: Any = rdkit().MolFromSmiles("*")
    molecule.GetAtomWithIdx(0).SetProp("_displayLabel", "none")
    return molecule


def _legend(row: _Row) -> str:
    if not row.smiles:
        return f"{row.number}: no molecule"
    notes = ["corrected"] * (not row.valid) + [f"largest of {row.fragments} parts"] * (row.fragments > 1)
    return f"{row.number}" + (": " + ", ".join(notes) if notes else "")


def _pixels(png: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def _structures(rows: Sequence[_Row]) -> str:
    """SDF records titled by number, with SMILES and whether the sample was valid as properties."""
    chem = rdkit()
    from rdkit.Chem.rdDepictor import Compute2DCoords

    text = io.StringIO()
    with quiet(), chem.SDWriter(text) as writer:
        for row in rows:
            molecule: Any = read(row.smiles)
            Compute2DCoords(molecule)
            for name, value in (("_Name", row.number), ("SMILES", row.smiles), ("valid", int(row.valid))):
                molecule.SetProp(name, str(value))
            writer.write(molecule)
    return text.getvalue()


def _table(rows: Sequence[_Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_Row._fields)
    writer.writerows((row.number, row.smiles, int(row.valid), row.fragments) for row in rows)
    return text.getvalue()


def _read_table(path: Path) -> list[_Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            _Row(int(row["number"]), row["smiles"], row["valid"] == "1", int(row["fragments"]))
            for row in csv.DictReader(file)
        ]


def _write_text(text: str, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
