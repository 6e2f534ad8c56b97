import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.chemistry import Encoded, atomic_numbers, decode, encode, read, symbols

pytest.importorskip("rdkit")
ATOMS = ["C", "N", "O", "F"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "molecules" / "qm9_subset5000.csv"


Arrays = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def encoded(text: str) -> Encoded:
    found = encode(text)
    assert found is not None
    return found


def arrays(elements, bonds, atoms=ATOMS) -> Arrays:
    """A batch of one molecule: "CCO" and {(i, j): order}; "-" is no atom."""
    x, adj = torch.zeros(1, len(elements), len(atoms)), torch.zeros(1, len(elements), len(elements))
    for place, element in enumerate(elements):
        if element != "-":
            x[0, place, atoms.index(element)] = 1
    for (i, j), order in bonds.items():
        adj[0, i, j] = adj[0, j, i] = order
    return x, adj, torch.ones(1, len(elements), dtype=torch.bool)


def star(centre, others, first=0):
    """A centre that is bonded to each of the others; ``first`` counts the atoms before it."""
    return centre + others, {(first, first + 1 + place): 1 for place in range(len(others))}


def dense(molecule: Encoded) -> Arrays:
    names = symbols(molecule.numbers.tolist())
    pairs = map(tuple, molecule.edges.T.tolist())
    return arrays(names, dict(zip(pairs, molecule.orders.tolist(), strict=True)))


def decoded(elements, bonds, **options):
    return decode(*arrays(elements, bonds), ATOMS, **options)[0]


def test_benzene_becomes_alternating_bonds():
    found = encoded("c1ccccc1")
    assert found.smiles == "c1ccccc1"
    assert found.numbers.tolist() == [6] * 6
    assert sorted(found.orders.tolist()) == [1, 1, 1, 2, 2, 2]
    assert np.bincount(found.edges.ravel(), np.tile(found.orders, 2)).tolist() == [3] * 6
    assert (found.edges[0] < found.edges[1]).all()
    assert not found.charged


def test_all_spellings_of_a_molecule_give_the_same_arrays():
    first, *others = [encoded(s) for s in ("OC(=O)[C@@H](N)C", "C[C@H](N)C(O)=O", "[13CH3]C(N)C(=O)O", "C(N)(C)C(O)=O")]
    for other in others:
        assert other.smiles == first.smiles
        for a, b in zip(first[1:4], other[1:4], strict=True):
            np.testing.assert_array_equal(a, b)


def test_charges_are_dropped_and_told():
    found = encoded("[NH3+]CC(=O)[O-]")
    assert found.charged
    assert found.smiles == "[NH3+]CC(=O)[O-]"
    assert decode(*dense(found), ATOMS)[0].smiles == "NCC(=O)O"


@pytest.mark.parametrize("text", ["", "no molecule", "C(C)(C)(C)(C)C", "c1cccc1", "C->[Fe]", "C$C"])
def test_what_bond_orders_cannot_say_is_none(text, capfd):
    assert encode(text) is None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("elements", "bonds", "smiles", "valid", "fragments"),
    [
        ("C", {}, "C", True, 1),
        ("CO", {(0, 1): 2}, "C=O", True, 1),
        ("CN", {(0, 1): 3}, "C#N", True, 1),
        ("C-O", {(0, 1): 1, (1, 2): 1, (0, 2): 1}, "CO", True, 1),
        ("---", {(0, 1): 3}, "", True, 0),
        (*star("N", "CCCC"), "C[N+](C)(C)C", True, 1),
        (*star("O", "CCC"), "C[O+](C)C", True, 1),
        # The highest bond of the first offending atom is lowered, single bonds are cut.
        ("CCC", {(0, 1): 3, (1, 2): 2}, "C=C=C", False, 1),
        (*star("C", "CCCCC"), "CC(C)(C)C", False, 2),
        (*star("O", "CCCC"), "C[O+](C)C", False, 2),
        (*star("F", "CF"), "FF", False, 2),
        # Both get too many at once: the first is charged, the bond is lowered for the second.
        ("OO", {(0, 1): 3}, "O=[OH+]", False, 1),
    ],
)
def test_molecules_made_by_hand(elements, bonds, smiles, valid, fragments):
    assert decoded(elements, bonds) == (smiles, valid, fragments)


def test_only_the_first_of_two_atoms_that_get_too_many_by_the_last_bond_is_charged():
    """As in the published code: the same molecule is valid when the bond between the nitrogens comes earlier."""
    ends = {(6, i): 1 for i in range(3)} | {(7, i): 1 for i in range(3, 6)} | {(6, 7): 1}
    assert not decoded("CCCCCCNN", ends).valid
    early = {(0, 1): 1} | {(0, i): 1 for i in range(2, 5)} | {(1, i): 1 for i in range(5, 8)}
    assert decoded("NNCCCCCC", early) == ("C[N+](C)(C)[N+](C)(C)C", True, 1)


def test_the_kept_fragment_has_the_longest_text_or_the_most_atoms():
    elements, bonds = star("N", "CCCC")
    chain = {(5 + i, 6 + i): 1 for i in range(5)}
    assert decoded(elements + "CCCCCC", bonds | chain).smiles == "C[N+](C)(C)C"
    assert decoded(elements + "CCCCCC", bonds | chain, largest="atoms").smiles == "CCCCCC"


def test_what_is_outside_the_mask_does_not_count():
    x, adj, mask = arrays("CCO", {(0, 1): 1, (1, 2): 1})
    mask[0, 2] = False
    assert decode(x, adj, mask, ATOMS)[0].smiles == "CC"


neutral = {"C": 4, "N": 3, "O": 2, "F": 1}
most = {"C": 4, "N": 4, "O": 3, "F": 1}


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 7))
    elements = draw(st.lists(st.sampled_from("CNOF"), min_size=size, max_size=size))
    bonds = {}
    for i in range(size):
        for j in range(i):
            if order := draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3])):
                bonds[j, i] = order
    return elements, bonds


@given(graphs(), st.randoms(use_true_random=False))
def test_validity_is_a_matter_of_valences(graph, random):
    elements, bonds = graph
    found = decoded(elements, bonds)
    valence = [sum(order for pair, order in bonds.items() if place in pair) for place in range(len(elements))]
    again = read(found.smiles)
    assert again is not None
    assert again.GetNumAtoms() <= len(elements)
    if found.valid:
        assert all(count <= most[element] for count, element in zip(valence, elements, strict=True))
    if all(count <= neutral[element] for count, element in zip(valence, elements, strict=True)):
        assert found.valid
        order = list(range(len(elements)))
        random.shuffle(order)
        moved = {(order[i], order[j]): kind for (i, j), kind in bonds.items()}
        names = [elements[order.index(place)] for place in range(len(elements))]
        other = decoded(names, moved)
        assert (other.valid, other.fragments) == (True, found.fragments)
        if found.fragments == 1:
            assert other.smiles == found.smiles


def test_a_batch_is_its_molecules():
    singles = [arrays("CCO", {(0, 1): 1, (1, 2): 1}), arrays("CNF", {(0, 1): 2, (0, 2): 1}), arrays("F-C", {(0, 2): 1})]
    x, adj, mask = (torch.cat(parts) for parts in zip(*singles, strict=True))
    assert [m.smiles for m in decode(x, adj, mask, ATOMS)] == ["CCO", "N=CF", "CF"]
    wider = torch.nn.functional.pad
    found = decode(wider(x, (0, 0, 0, 4)), wider(adj, (0, 4, 0, 4)), wider(mask, (0, 4)), ATOMS)
    assert [m.smiles for m in found] == ["CCO", "N=CF", "CF"]


def test_mistakes_are_told():
    x, adj, mask = arrays("CO", {(0, 1): 1})
    with pytest.raises(ValueError, match="3 atom types"):
        decode(x, adj, mask, ["C", "N", "O"])
    with pytest.raises(ValueError, match="quantise samples first"):
        decode(x, adj * 0.7, mask, ATOMS)
    with pytest.raises(ValueError, match="'Xx' is none"):
        atomic_numbers(["C", "Xx"])
    for atoms in (["C", "C"], [], ["H"]):
        with pytest.raises(ValueError, match="different heavy elements"):
            atomic_numbers(atoms)


def test_without_rdkit_the_cure_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning_sgm\[molecules\]'"):
        encode("C")


@pytest.mark.skipif(not SHARED.is_file(), reason="no shared data beside this checkout")
def test_molecules_of_qm9_survive_the_way_there_and_back():
    texts = [line.split(",")[1] for line in SHARED.read_text().splitlines()[1:]]
    found = [encoded(text) for text in texts[::10]]
    assert len(found) == 500
    for molecule in found:
        again = decode(*dense(molecule), ATOMS)[0]
        assert again.valid
        assert molecule.charged or again.smiles == molecule.smiles
