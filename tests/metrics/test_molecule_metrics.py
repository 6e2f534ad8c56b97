import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from datamodules import MoleculeDataModule
from datamodules.chemistry import encode
from lightning_sgm.metrics import FCD, NSPDK, MoleculeQuality, SimilarityToData

Chem = pytest.importorskip("rdkit.Chem")
ATOMS = ["C", "N", "O", "F"]


def batch(*texts):
    """Arrays of SMILES; "." is a sample without atoms, "!" a carbon with five bonds."""
    size = 14
    x, adj = torch.zeros(len(texts), size, 4), torch.zeros(len(texts), size, size)
    for row, text in enumerate(texts):
        if text == "!":
            x[row, :6, 0] = 1
            adj[row, 0, 1:6] = adj[row, 1:6, 0] = 1
        elif text != ".":
            found = encode(text)
            assert found is not None
            x[row, range(len(found.numbers)), [int(n) - 6 for n in found.numbers]] = 1
            i, j = torch.from_numpy(found.edges).long()
            adj[row, i, j] = adj[row, j, i] = torch.from_numpy(found.orders).float()
    return {"x": x, "adj": adj, "node_mask": torch.ones(len(texts), size, dtype=torch.bool)}


def known(*texts, **spec):
    return SimpleNamespace(spec={"kind": "molecule", "atoms": ATOMS} | spec, smiles=lambda split: list(texts))


def values(metric):
    found = metric.compute()
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in found.values())
    return {name: float(value) for name, value in found.items()}


def test_the_five_fractions():
    metric = MoleculeQuality()
    metric.prepare(known("CCO", "CC(C)(C)C"))
    metric.update(**batch("CCO", "OCC", "CCN", "CO.C"), real=False)
    metric.update(**batch("!", ".", "CC"), real=False)
    metric.update(**batch("O"), real=True)
    # CCO, CCO, CCN, CO (of two pieces), CC(C)(C)C (corrected, of two pieces), nothing, CC
    assert values(metric) == pytest.approx(
        {"valid": 5 / 7, "valid_corrected": 6 / 7, "unique": 5 / 6, "fragmented": 2 / 7, "novel": 3 / 5}
    )


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_data_nothing_is_called_new():
    metric = MoleculeQuality(ATOMS)
    metric.update(**batch("CCO"), real=False)
    assert "novel" not in metric.compute()
    metric.prepare(None)
    assert "novel" not in metric.compute()
    empty = MoleculeQuality(ATOMS)
    with pytest.raises(ValueError, match="no sample"):
        empty.compute()
    empty.update(**batch("."), real=False)
    found = values(empty)
    assert (found["valid"], found["valid_corrected"]) == (0.0, 0.0)
    assert found["unique"] != found["unique"]


def test_the_kept_fragment_can_be_chosen():
    for metric, novel in ((MoleculeQuality(), 0.0), (MoleculeQuality(largest="atoms"), 1.0)):
        metric.prepare(known("C[N+](C)(C)C"))
        metric.update(**batch("C[N+](C)(C)C.CCCCCC"), real=False)
        assert values(metric)["novel"] == novel


def test_similarity_is_that_of_rdkit():
    from rdkit import DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    real, generated = ["CCO", "c1ccccc1O", "CC(=O)NC"], ["CCCO", "c1ccccc1N", "C#N", "CCO"]
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    bits = {text: generator.GetFingerprint(Chem.MolFromSmiles(text)) for text in real + generated}
    nearest = [max(DataStructs.TanimotoSimilarity(bits[g], bits[r]) for r in real) for g in generated]
    metric = SimilarityToData(ATOMS)
    metric.update(**batch(*real[:2]), real=True)
    metric.update(**batch(*generated), real=False)
    metric.update(**batch(*real[2:], "."), real=True)
    found = values(metric)
    assert found["snn"] == pytest.approx(sum(nearest) / len(nearest), rel=1e-6)
    assert found["scaffold"] != found["scaffold"]  # no molecule of two rings


def test_scaffolds_are_compared_by_the_cosine_of_their_counts():
    decalin, spiro, bridge = "C1CCC2CCCCC2C1", "C1CCC2(C1)CCCC2", "C1CC2CCC1CC2"
    metric = SimilarityToData(ATOMS)
    # Side chains are no part of a scaffold, and one ring makes none.
    metric.update(**batch(decalin, f"C{decalin}", spiro, "C1CCCCC1", "C"), real=True)
    metric.update(**batch(f"OC{decalin}", bridge, bridge, "C1CC1"), real=False)
    assert values(metric)["scaffold"] == pytest.approx(2 * 1 / (5**0.5 * 5**0.5))


def test_similarity_of_a_set_to_itself_is_one():
    metric = SimilarityToData(ATOMS)
    for real in (True, False):
        metric.update(**batch("CCO", "C1CCC2CCCCC2C1", "CN"), real=real)
    assert values(metric) == pytest.approx({"snn": 1.0, "scaffold": 1.0})
    with pytest.warns(UserWarning, match="0 of the samples are molecules"):
        assert all(value.isnan() for value in only_real().compute().values())
    with pytest.raises(ValueError, match="got 0"):
        SimilarityToData(ATOMS).compute()


def only_real():
    metric = SimilarityToData(ATOMS)
    metric.update(**batch("CCO", "C", "CN"), real=True)
    return metric


@pytest.mark.filterwarnings("ignore::DeprecationWarning:fcd_torch")
def test_fcd_is_that_of_the_package():
    fcd_torch = pytest.importorskip("fcd_torch")
    data = MoleculeDataModule()
    real, generated = data.examples("train", 40), data.examples("val", 30)
    metric = FCD()
    metric.prepare(data)
    metric.update(**{key: real[key] for key in metric.inputs}, real=True)
    for rows in (slice(7), slice(7, None)):
        metric.update(**{key: generated[key][rows] for key in metric.inputs}, real=False)
    texts = [
        [data.smiles("train")[i] for i in real["index"].tolist()],
        [data.smiles("val")[i] for i in generated["index"].tolist()],
    ]
    assert values(metric)["fcd"] == pytest.approx(fcd_torch.FCD(device="cpu")(*texts), rel=1e-3)
    fresh = copy.deepcopy(metric)
    fresh.reset()
    fresh.update(**{key: real[key] for key in metric.inputs}, real=True)
    with pytest.warns(UserWarning, match="0 of the samples are molecules, and 2 are needed"):
        assert fresh.compute()["fcd"].isnan()


def test_fcd_without_its_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcd_torch", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning_sgm\[molecules\]'"):
        FCD()


def make_fcd():
    pytest.importorskip("fcd_torch")
    return FCD(ATOMS)


METRICS = [lambda: NSPDK(ATOMS), lambda: MoleculeQuality(ATOMS), lambda: SimilarityToData(ATOMS), make_fcd]


def feed(metric):
    metric.update(**batch("CCO", "C1CCC2CCCCC2C1", "CN"), real=True)
    metric.update(**batch("CCO", "C1CCC2CCCCC2C1", "!", "."), real=False)


@pytest.mark.parametrize("make", METRICS)
def test_metrics_move_between_test_and_fit_and_half_precision(make):
    metric = make()
    with torch.inference_mode():
        feed(metric)
        metric.reset()
    metric.to(torch.bfloat16)
    feed(metric)
    fresh = make()
    feed(fresh)
    torch.testing.assert_close(metric.compute(), fresh.compute(), rtol=0, atol=0, equal_nan=True)
    assert not metric.state_dict()


@pytest.mark.parametrize("make", METRICS)
def test_metrics_want_molecules(make):
    metric = make()
    with pytest.raises(ValueError, match="4 atom types"):
        metric.update(torch.zeros(1, 3, 5), torch.zeros(1, 3, 3), torch.ones(1, 3, dtype=torch.bool), real=False)
    unaware = type(metric)()
    with pytest.raises(ValueError, match="'image'"):
        unaware.prepare(SimpleNamespace(spec={"kind": "image"}))


def _judge(rank, file, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metrics = [NSPDK(ATOMS), MoleculeQuality(ATOMS), SimilarityToData(ATOMS)]
    mine = [["CCO", "C1CCC2CCCCC2C1"], ["CN"]], [["CCO"], ["C1CCC2CCCCC2C1", "!", "."]]
    for metric in metrics:
        for texts, real in zip(mine, (True, False), strict=True):
            metric.update(**batch(*texts[rank]), real=real)
    torch.save([metric.compute() for metric in metrics], f"{results}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_see_all_molecules(tmp_path):
    spawn(_judge, (tmp_path / "meet", tmp_path / "result"), nprocs=2)
    for rank in range(2):
        for make, found in zip(METRICS, torch.load(tmp_path / f"result{rank}"), strict=False):
            metric = make()
            feed(metric)
            torch.testing.assert_close(found, metric.compute(), rtol=1e-12, atol=1e-12)
