from collections import Counter
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import MoleculeDataModule
from lightning_sgm.metrics import NSPDK, nspdk

Chem = pytest.importorskip("rdkit.Chem")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "molecules" / "qm9_subset5000.csv"
TEXTS = [
    "C",
    "CO",
    "CC#N",
    "OC=O",
    "C1CC1",
    "CC(C)(C)C",
    "c1ccoc1",
    "C1CC2CCC1CC2",
    "CCCCCCCCCCO",
    "CS(=O)(=O)c1ccc(Br)cc1",
]
TEXTS += ["CC.O", "O=C1CN=C(c2ccccc2)c2cc(Cl)ccc2N1", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "[NH3+]CC(=O)[O-]", "OCC"]


def words(text):
    """The features of a molecule by EDeN's definition, in words in place of hashes: {(r, d): counts}."""
    molecule = Chem.MolFromSmiles(text)
    distance = Chem.GetDistanceMatrix(molecule)
    label = [(atom.GetSymbol(), atom.GetDegree()) for atom in molecule.GetAtoms()]
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), int(b.GetBondTypeAsDouble())) for b in molecule.GetBonds()]
    n = len(label)

    def hood(v, radius):
        levels: list[tuple] = []
        for d in range(radius + 1):
            levels.append(tuple(sorted(label[u] for u in range(n) if distance[v, u] == d)))
            if d < radius:
                levels.append(tuple(sorted(k for i, j, k in bonds if min(distance[v, i], distance[v, j]) == d)))
        return tuple(levels) if levels[-1] else None

    counts: dict[tuple[int, int], Counter] = {}
    for v in range(n):
        for u in range(n):
            for r in range(5):
                a, b = hood(v, r), hood(u, r)
                if a and b and distance[v, u] <= 4:
                    group = counts.setdefault((r, distance[v, u]), Counter())
                    group[tuple(sorted([a, b]))] += 1
                    group["half", b] += 1
    return counts


def row_of(text):
    """{feature: value}, of norm 1 for each (r, d) and then in all."""
    counts = words(text)
    found: dict[tuple, float] = {}
    for group, values in counts.items():
        norm = sqrt(sum(count**2 for count in values.values()))
        found |= {(group, word): count / norm / sqrt(len(counts)) for word, count in values.items()}
    return found


def matrix(texts, bits):
    rows, numbers, values = nspdk.features(texts)
    kinds, place = np.unique(numbers, return_inverse=True)
    assert kinds.max() < 1 << bits
    dense = np.zeros((len(texts), len(kinds)))
    np.add.at(dense, (rows, place), values)
    return dense


def test_the_kernel_is_the_one_in_words(monkeypatch):
    monkeypatch.setattr(nspdk, "_BITS", 40)  # no two words with one number
    monkeypatch.setattr(nspdk, "_PAIRS", 600)  # in pieces
    found = matrix(TEXTS, 40)
    truth = [row_of(text) for text in TEXTS]
    kernel = [[sum(a[word] * b.get(word, 0.0) for word in a) for b in truth] for a in truth]
    np.testing.assert_allclose(found @ found.T, kernel, atol=1e-12)
    assert (found > 0).sum() == sum(map(len, truth))


def test_with_16_bits_rows_keep_norm_1_and_the_kernel_changes_little(monkeypatch):
    short = matrix(TEXTS, 16)
    np.testing.assert_allclose((short**2).sum(1), 1.0, rtol=1e-12)
    monkeypatch.setattr(nspdk, "_BITS", 40)
    exact = matrix(TEXTS, 40)
    assert abs(short @ short.T - exact @ exact.T).max() < 0.02


def test_features_depend_on_the_molecule_only():
    """The order of atoms does not count, and the hash is fixed; an aromatic bond counts as a single one."""
    first, second = (nspdk.features([text])[1:] for text in ("OC(=O)CN", "NCC(O)=O"))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert nspdk.features(["C"])[1].tolist() == [22259, 58942]  # in every process
    benzene, ring = (nspdk.features([text])[1:] for text in ("c1ccccc1", "C1CCCCC1"))
    np.testing.assert_array_equal(benzene, ring)
    assert [len(part) for part in nspdk.features([])] == [0, 0, 0]


@pytest.fixture(scope="module")
def data():
    return MoleculeDataModule()


def feed(metric, data, split, count, real):
    metric.update(**{key: data.examples(split, count)[key] for key in metric.inputs}, real=real)


def test_the_value_is_the_v_statistic_of_the_kernel(data):
    metric = NSPDK()
    metric.prepare(data)
    feed(metric, data, "train", 40, real=True)
    feed(metric, data, "val", 30, real=False)
    a, b = (
        [data.smiles(split)[i] for i in data.examples(split, count)["index"].tolist()]
        for split, count in (("train", 40), ("val", 30))
    )
    rows = matrix(a + b, 16)
    kernel = rows @ rows.T
    truth = kernel[:40, :40].mean() + kernel[40:, 40:].mean() - 2 * kernel[:40, 40:].mean()
    found = metric.compute()["nspdk"]
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(truth, rel=1e-9)


def test_equal_sets_have_no_distance_and_batches_do_not_count(data):
    once, parts = NSPDK(data.spec["atoms"]), NSPDK(data.spec["atoms"])
    feed(once, data, "val", 50, real=True)
    feed(once, data, "val", 50, real=False)
    assert float(once.compute()["nspdk"]) == 0.0
    feed(once, data, "train", 50, real=False)
    for split, real in (("val", True), ("val", False), ("train", False)):
        batch = data.examples(split, 50)
        for start in range(0, 50, 20):
            parts.update(**{key: batch[key][start : start + 20] for key in parts.inputs}, real=real)
    assert float(parts.compute()["nspdk"]) == pytest.approx(float(once.compute()["nspdk"]), rel=1e-9)


def test_nothing_to_compare_is_told(data):
    metric = NSPDK()
    with pytest.raises(ValueError, match=r"needs atoms=\[...\]"):
        feed(metric, data, "val", 2, real=True)
    metric.prepare(data)
    feed(metric, data, "val", 2, real=True)
    x = torch.zeros(2, 3, 4)
    metric.update(x, torch.zeros(2, 3, 3), torch.ones(2, 3, dtype=torch.bool), real=False)
    with pytest.warns(UserWarning, match="0 of the samples are molecules"):
        assert torch.isnan(metric.compute()["nspdk"])
    metric.reset()
    with pytest.raises(ValueError, match="real molecules, got 0"):
        metric.compute()


@pytest.mark.skipif(not SHARED.is_file(), reason="no shared data beside this checkout")
def test_the_floor_of_qm9():
    """gdss.md section 10: .0018 for 500 training against 4,000 test molecules; of the mean (1 - |m|^2)(1/500 + 1/n)."""
    data = MoleculeDataModule(path=str(SHARED), test_column="is_test")
    metric = NSPDK()
    metric.prepare(data)
    whole = data.examples("train", 4000)
    for rows, real in ((slice(500), False), (slice(500, None), True)):
        metric.update(**{key: whole[key][rows] for key in metric.inputs}, real=real)
    assert float(metric.compute()["nspdk"]) == pytest.approx(0.0019, abs=0.0003)
