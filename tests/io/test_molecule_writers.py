import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_sgm.io.writers import writer_for
from tests.conftest import SHARED

Chem = pytest.importorskip("rdkit.Chem")
pytestmark = pytest.mark.filterwarnings("ignore:.*no molecule, even corrected.*")

ATOMS = ["C", "N", "O", "F"]
SMILES = ["CC(=O)O", "c1ccncc1", "N#CC(F)F", "C", "C1CC1O", "Cc1cnoc1"]


def writer():
    return writer_for({"kind": "molecule", "atoms": ATOMS, "nodes": 9})


def canonical(smiles):
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


def molecule_batch(smiles, nodes=9):
    """Arrays of SMILES, made here by rdkit alone."""
    batch = {
        "x": torch.zeros(len(smiles), nodes, len(ATOMS)),
        "adj": torch.zeros(len(smiles), nodes, nodes),
        "node_mask": torch.zeros(len(smiles), nodes, dtype=torch.bool),
        "index": torch.arange(len(smiles)),
    }
    for row, text in enumerate(smiles):
        molecule = Chem.MolFromSmiles(text)
        Chem.Kekulize(molecule, clearAromaticFlags=True)
        for atom in molecule.GetAtoms():
            batch["x"][row, atom.GetIdx(), ATOMS.index(atom.GetSymbol())] = 1.0
            batch["node_mask"][row, atom.GetIdx()] = True
        for bond in molecule.GetBonds():
            ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            batch["adj"][row, ends[0], ends[1]] = batch["adj"][row, ends[1], ends[0]] = bond.GetBondTypeAsDouble()
    return batch


def troubled():
    """Two molecules, and between them: nothing, a carbon with five bonds, two fragments."""
    batch = molecule_batch(["CCO", "CC", "CCC", "CCCC", "CN"])
    batch["x"][1] = 0.0
    batch["adj"][2, 0, 1] = batch["adj"][2, 1, 0] = 3.0
    batch["adj"][2, 1, 2] = batch["adj"][2, 2, 1] = 2.0
    batch["adj"][3, 2, 3] = batch["adj"][3, 3, 2] = 0.0
    return batch


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def structures(path):
    return list(Chem.SDMolSupplier(str(path)))


def test_every_file_holds_the_molecules(tmp_path):
    files = writer().save(molecule_batch(SMILES), tmp_path / "a_0.5")
    assert [file.name for file in files] == ["a_0.5.csv", "a_0.5.smi", "a_0.5.sdf", "a_0.5.png"]
    expected = [canonical(smiles) for smiles in SMILES]
    rows = table(files[0])
    assert [row["smiles"] for row in rows] == expected
    assert all((row["valid"], row["fragments"]) == ("1", "1") for row in rows)
    lines = [line.split() for line in files[1].read_text().splitlines()]
    assert lines == [[smiles, str(number)] for number, smiles in enumerate(expected)]
    found = structures(files[2])
    assert [Chem.MolToSmiles(molecule) for molecule in found] == expected
    assert [molecule.GetProp("_Name") for molecule in found] == [str(number) for number in range(6)]
    assert [molecule.GetProp("SMILES") for molecule in found] == expected
    flat = found[0].GetConformer().GetPositions()
    assert np.abs(flat[:, 2]).max() == 0
    assert np.linalg.norm(flat[:, None] - flat, axis=2)[np.triu_indices(4, 1)].min() > 1.0
    with Image.open(files[3]) as image:
        assert image.size == (3 * 220, 2 * 190)
        assert image.getpixel((0, 0)) == (255, 255, 255)


def test_rdkit_reads_the_smiles_file(tmp_path):
    files = writer().save(molecule_batch(SMILES), tmp_path / "a")
    found = Chem.SmilesMolSupplier(str(files[1]), titleLine=False)
    assert [molecule.GetProp("_Name") for molecule in found] == [str(number) for number in range(6)]


def test_what_is_no_molecule_is_listed_and_counted(tmp_path):
    with pytest.warns(UserWarning, match=r"1 of 5 samples are no molecule.*a\.csv"):
        files = writer().save(troubled(), tmp_path / "a")
    rows = [(row["number"], row["smiles"], row["valid"], row["fragments"]) for row in table(files[0])]
    assert rows[:2] == [("0", "CCO", "1", "1"), ("1", "", "1", "0")]
    # The triple bond is lowered: the first of the highest order.
    assert rows[2:] == [("2", "C=C=C", "0", "1"), ("3", "CCC", "1", "2"), ("4", "CN", "1", "1")]
    assert [line.split()[1] for line in files[1].read_text().splitlines()] == ["0", "2", "3", "4"]
    found = structures(files[2])
    assert [molecule.GetProp("_Name") for molecule in found] == ["0", "2", "3", "4"]
    assert [molecule.GetProp("valid") for molecule in found] == ["1", "0", "1", "1"]


def test_no_molecule_at_all_can_be_written(tmp_path):
    batch = troubled()
    batch["x"] *= 0.0
    files = writer().save(batch, tmp_path / "a")
    assert [row["smiles"] for row in table(files[0])] == [""] * 5
    assert files[1].read_bytes() == files[2].read_bytes() == b""
    with Image.open(files[3]) as image:
        assert np.array(image).min() < 100  # their numbers


def test_parts_of_batches_and_processes_are_joined_in_order(tmp_path):
    whole = troubled()
    files: dict[int, Path] = {}
    for rows in ([4, 1], [0], [2, 3]):
        part = {name: value[torch.tensor(rows)] for name, value in whole.items()}
        files |= dict(zip(rows, writer().save_each(part, tmp_path), strict=True))
    assert {file.relative_to(tmp_path).as_posix() for file in files.values()} == {
        f"parts/00000{i}.csv" for i in (0, 1, 2)
    }
    collected = writer().collect([files[i] for i in range(5)], tmp_path / "samples")
    direct = writer().save(whole, tmp_path / "direct")
    for one, other in zip(collected, direct, strict=True):
        if one.suffix == ".sdf":  # its records may hold the time
            one_smiles, other_smiles = ([Chem.MolToSmiles(m) for m in structures(file)] for file in (one, other))
            assert one_smiles == other_smiles
        else:
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("steps", [False, True])
def test_pictures_in_tensorboard(tmp_path, steps):
    logger, batch = TensorBoardLogger(tmp_path, "", ""), troubled()
    if steps:
        t = torch.linspace(1.0, 0.0, 4)
        noise = torch.randn(batch["adj"].shape).triu(1)
        batch |= {"t": t, "adj_steps": batch["adj"][:, None] + t[:, None, None] * (noise + noise.mT)[:, None]}
    writer().log(logger, "samples", batch, 7)
    writer().log(CSVLogger(tmp_path), "samples", batch, 7)
    logger.finalize("success")
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("samples")
    assert event.step == 7
    written = writer().save(batch, tmp_path / "x")
    assert [path.suffix for path in written] == ([".png"] if steps else [".csv", ".smi", ".sdf", ".png"])
    with Image.open(written[-1]) as image:
        assert image.size == (event.width, event.height)


def test_a_strip_ends_in_the_atoms_of_the_sample():
    from lightning_sgm.io.graphs import strip

    batch = molecule_batch(["CCO", "NC"])
    batch["adj"][1] = 0.0  # single atoms stay atoms
    batch |= {"t": torch.tensor([0.5]), "adj_steps": batch["adj"][:, None]}
    (axes,) = strip(batch, ATOMS).axes
    assert [text.get_text() for text in axes.texts if text.get_text() in ATOMS] == ["C", "C", "O", "N", "C"]
    assert {"3 atoms", "2 atoms, 2 parts"} <= {text.get_text() for text in axes.texts}


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(OSError, match=r"a\.csv"):
        writer().save(molecule_batch(SMILES), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.skipif(not (SHARED / "data" / "molecules").is_dir(), reason="the shared molecules are absent")
def test_molecules_of_qm9_come_back(tmp_path):
    with (SHARED / "data" / "molecules" / "qm9_subset5000.csv").open() as file:
        smiles = [row["smiles"] for row in csv.DictReader(file)][::25]
    smiles = [text for text in smiles if "+" not in text and "-" not in text]
    files = writer().save(molecule_batch(smiles), tmp_path / "a")
    assert [row["smiles"] for row in table(files[0])] == [canonical(text) for text in smiles]
    assert [Chem.MolToSmiles(m, isomericSmiles=False) for m in structures(files[2])] == [canonical(s) for s in smiles]
