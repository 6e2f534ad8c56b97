from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules import MoleculeDataModule, molecule_sources
from datamodules.base import SPLITS
from datamodules.chemistry import decode

pytest.importorskip("rdkit")
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "molecules" / "qm9_subset5000.csv"
TEXTS = ["CCO", "C#N", "OC=O", "NCC(F)F", "C1CC1", "CC(C)(C)C", "O=C=O", "CN", "C", "c1ccoc1"]


def everything(data, split):
    return data.fetch(split, torch.arange(data.count(split)), None)


def read_back(data, split):
    batch = everything(data, split)
    return [m.smiles for m in decode(batch["x"], batch["adj"], batch["node_mask"], data.spec["atoms"])]


@pytest.fixture
def listed(tmp_path):
    """Write a file and open it."""

    def make(text, name="mine.csv", **options):
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return MoleculeDataModule(path=str(file), **options)

    return make


@pytest.fixture(scope="module")
def grown():
    return MoleculeDataModule(seed=3)


def test_the_default_needs_no_download_and_is_always_the_same(grown):
    data = MoleculeDataModule(seed=4)
    for split in SPLITS:
        assert data.smiles(split) == grown.smiles(split)
    texts = [text for split in SPLITS for text in grown.smiles(split)]
    assert len(set(texts)) == len(texts) > 3000
    assert grown.count("val") == grown.count("test") == round(0.1 * len(texts))
    assert grown.spec["nodes"] == 9
    assert grown.spec["atoms"] == ["C", "N", "O", "F"]
    assert MoleculeDataModule(max_nodes=4).spec["nodes"] == 4


def test_arrays_say_what_the_smiles_say(grown):
    for split in SPLITS:
        assert read_back(grown, split) == grown.smiles(split)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12))
def test_batches_keep_the_contract(grown, index):
    batch = grown.fetch("train", torch.tensor(index), 5)
    x, adj, mask = batch["x"], batch["adj"], batch["node_mask"]
    assert (x.dtype, adj.dtype, mask.dtype) == (torch.float32, torch.float32, torch.bool)
    assert mask.any(0).all()  # no wider than the largest molecule
    assert torch.equal(x.sum(-1), mask.float())
    assert torch.equal(x.amax(-1), mask.float())
    assert torch.equal(adj, adj.mT)
    assert torch.isin(adj, torch.arange(4.0)).all()
    assert not adj.diagonal(dim1=1, dim2=2).any()
    assert not adj[~(mask[:, :, None] & mask[:, None])].any()
    row = grown.fetch("train", torch.tensor(index[:1]), None)
    size = int(row["node_mask"].sum())
    assert torch.equal(row["adj"][0], adj[0, :size, :size])


def test_the_specification_counts_the_training_molecules(grown):
    batch = everything(grown, "train")
    mask, nodes = batch["node_mask"], batch["node_mask"].sum(1)
    pairs = mask[:, :, None] & mask[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool)
    entries = batch["adj"][pairs].double()
    spec = grown.spec
    assert spec["kind"] == "molecule"
    assert (spec["features"], spec["bonds"]) == (4, 3)
    assert spec["node_counts"] == torch.bincount(nodes, minlength=10).tolist()
    assert spec["edge_mean"] == pytest.approx(float(entries.mean()), rel=1e-12)
    assert spec["edge_std"] == pytest.approx(float(entries.std(correction=0)), rel=1e-12)
    types = batch["x"][mask].double()
    assert spec["feature_mean"] == pytest.approx(types.mean(0).tolist(), rel=1e-12)
    assert spec["feature_std"] == pytest.approx(types.std(0, correction=0).tolist(), rel=1e-12)


def test_loaders_and_examples_work(grown):
    batch = next(iter(grown.train_dataloader()))
    assert batch["x"].shape[:1] == batch["index"].shape == (256,)
    assert sum(len(batch["index"]) for batch in grown.test_dataloader()) == grown.count("test")
    assert len(grown.examples("val", 7)["adj"]) == 7


def test_columns_and_marks_of_a_table(listed):
    rows = [f'{i},"{text}\n",{int(i in (2, 5))}' for i, text in enumerate(TEXTS)]
    data = listed("ID, SMILES,Is_Test\n" + "\n".join(rows), test_column="is_test")
    assert data.smiles("test") == ["O=CO", "CC(C)(C)C"]
    assert data.smiles("val") == data.smiles("test")
    assert len(data.smiles("train")) == 8
    data = listed(
        "mol,part\n" + "\n".join(f"{t},{i < 3}" for i, t in enumerate(TEXTS)), column="MOL", test_column="part"
    )
    assert len(data.smiles("test")) == 3
    data = listed("mol,part\nC,0\nCC,0\nCCC,0\nN,1", column="mol", test_column="part", val_fraction=0.3)
    assert [data.count(split) for split in SPLITS] == [2, 1, 1]


@pytest.mark.parametrize("name", ["mine.smi", "mine.TXT"])
def test_lines_of_smiles(listed, name):
    data = listed("\n".join(f"{text}\tname of {text}" for text in TEXTS) + "\n\n", name, test_fraction=0.3)
    assert [data.count(split) for split in SPLITS] == [6, 1, 3]
    found = [text for split in SPLITS for text in data.smiles(split)]
    assert sorted(found) == sorted([*TEXTS[:2], "O=CO", *TEXTS[3:]])
    for split in SPLITS:
        assert read_back(data, split) == data.smiles(split)


def test_the_cut_does_not_depend_on_the_seed(listed):
    first, second = (listed("\n".join(TEXTS), "a.smi", seed=seed) for seed in (0, 1))
    assert [first.smiles(split) for split in SPLITS] == [second.smiles(split) for split in SPLITS]


def test_what_is_left_out_is_counted_and_named(listed):
    lines = [*TEXTS, "nonsense", "CCCl", "CC[Si]", "CCCCCCC", "[NH3+]C", ""]
    with pytest.warns(UserWarning, match="left out") as told:
        data = listed("smiles\n" + "\n".join(lines), max_nodes=6, test_fraction=0.3)
    said = " ".join(str(warning.message) for warning in told)
    assert "1 of 15 molecules cannot be read" in said
    assert "first 'nonsense'" in said
    assert "2 of 15 molecules have atoms other than C, N, O, F and are left out, first 'CCCl'" in said
    assert "1 of 15 molecules have more than max_nodes=6 heavy atoms and are left out, first 'CCCCCCC'" in said
    assert sum(data.count(split) for split in SPLITS) == 11
    assert "C[NH3+]" in [text for split in SPLITS for text in data.smiles(split)]


def test_atoms_can_be_those_of_the_training_molecules(listed):
    rows = ["CCBr,0", "CO,0", "CN,1", "CBr,1", "C,0"]
    with pytest.warns(UserWarning, match="other than C, O, Br"):
        data = listed("smiles,test\n" + "\n".join(rows), atoms=None, test_column="test")
    assert data.spec["atoms"] == ["C", "O", "Br"]
    assert data.smiles("test") == ["CBr"]
    assert everything(data, "test")["x"][0].tolist() == [[1, 0, 0], [0, 0, 1]]
    data = listed("\n".join(["CO", "OC", "CN", "N"] * 3), "b.smi", atoms=["O", "N", "C"])
    assert data.spec["atoms"] == ["O", "N", "C"]


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_large_sets_are_parsed_once(listed, tmp_path, monkeypatch):
    monkeypatch.setattr(molecule_sources, "_LARGE", 5)
    folder = tmp_path / "kept"
    first = listed("\n".join([*TEXTS, "nonsense", "[NH3+]C"]), "a.smi", cache=str(folder))
    assert [file.suffix for file in folder.iterdir()] == [".npz"]
    monkeypatch.setattr(molecule_sources, "encode", None)
    second = listed("\n".join([*TEXTS, "nonsense", "[NH3+]C"]), "b.smi", cache=str(folder))
    assert first.spec == second.spec
    for split in SPLITS:
        assert first.smiles(split) == second.smiles(split)
        for key, value in everything(first, split).items():
            assert torch.equal(value, everything(second, split)[key])
    with pytest.raises(TypeError):
        listed("\n".join([*TEXTS, "CCCC"]), "c.smi", cache=str(folder))
    assert len(list(folder.iterdir())) == 1


def test_qm9_is_read_from_its_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "qm9pack"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for part in range(3):
        rows = [f'"x{i}",{i},"{text}","[1,2]"' for i, text in enumerate(TEXTS)][part::3]
        (package / "data" / f"qm9_part{part + 1}.csv").write_text("XYZ_file,Index,SMILES,More\n" + "\n".join(rows))
    monkeypatch.syspath_prepend(tmp_path)
    data = MoleculeDataModule("qm9", cache=None)
    assert sum(data.count(split) for split in SPLITS) == len(TEXTS)
    (package / "data" / "qm9_part2.csv").unlink()
    with pytest.raises(ValueError, match=r"no qm9_part2.csv: install version 1\.0\.3"):
        MoleculeDataModule("qm9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install qm9pack"):
        MoleculeDataModule("qm9")


@pytest.mark.parametrize(
    ("text", "name", "options", "message"),
    [
        ("smiles\nC", "a.sdf", {}, "none of .csv, .smi, .txt"),
        ("mol\nC", "a.csv", {}, "no column 'smiles', only mol: set column"),
        ("", "a.csv", {}, "no column 'smiles', only nothing"),
        ("smiles\nC", "a.csv", {"test_column": "x"}, "no column 'x', only smiles: set test_column"),
        ("smiles,x\nC,1\nN,maybe", "a.csv", {"test_column": "x"}, "must say 1 or 0 .*'maybe'"),
        ("smiles,x\nC,1\nN", "a.csv", {"test_column": "x"}, "line 3 has 1 fields"),
        ("C\nN", "a.smi", {"test_column": "x"}, "has no columns"),
        ("hello\nworld", "a.txt", {}, "no molecule among 2 lines"),
        ("", "a.txt", {}, "no molecule among 0 lines"),
        ("C\nN", "a.smi", {}, "no molecules for train"),
        ("smiles,x\nC,0\nN,0", "a.csv", {"test_column": "x"}, "no molecules for val"),
        ("C\nN\nO", "a.smi", {"atoms": ["C", "Q"]}, "'Q' is none"),
        ("C\nN\nO", "a.smi", {"max_nodes": -1}, "max_nodes must be at least 1"),
        ("C\nN\nO", "a.smi", {"val_fraction": 0.6, "test_fraction": 0.4}, "sum below 1"),
        ("C\nN\nO", "a.smi", {"test_fraction": 0.0}, "test_fraction must be above 0"),
        ("C\nN\nO", "a.smi", {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_mistakes_are_told(listed, text, name, options, message):
    with pytest.raises(ValueError, match=message):
        listed(text, name, **options)


def test_more_mistakes_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.csv"):
        MoleculeDataModule(path=str(tmp_path / "missing.csv"))
    (tmp_path / "latin.smi").write_bytes(b"C\xff\xfe")
    with pytest.raises(ValueError, match=r"latin\.smi is not UTF-8"):
        MoleculeDataModule(path=str(tmp_path / "latin.smi"))
    with pytest.raises(ValueError, match="no dataset 'zinc': choose grown or qm9"):
        MoleculeDataModule("zinc")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="test_column needs a path"):
        MoleculeDataModule(test_column="is_test")


@pytest.mark.skipif(not SHARED.is_file(), reason="no shared data beside this checkout")
def test_molecules_of_qm9():
    data = MoleculeDataModule(path=str(SHARED), test_column="is_test")
    assert [data.count(split) for split in SPLITS] == [4000, 1000, 1000]
    assert data.spec["nodes"] == 9
    assert np.sum(data.spec["node_counts"]) == 4000
    found, truth = read_back(data, "test"), data.smiles("test")
    charged = [text for text in truth if "+" in text]
    assert len(charged) < 10
    assert all(a == b for a, b in zip(found, truth, strict=True) if b not in charged)
