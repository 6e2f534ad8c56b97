import pickle

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules import graph_files
from datamodules.graph_files import read_graphs
from datamodules.graphs import GraphDataModule

PETERSEN = nx.petersen_graph()


@pytest.fixture
def notes(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(graph_files, "rank_zero_info", said.append)
    return said


def adjacency(graphs, number):
    """Dense matrix of one packed graph, built edge by edge."""
    begin = int(graphs.num_edges[:number].sum())
    a = np.zeros([graphs.num_nodes[number]] * 2)
    for u, v in graphs.edge_index[:, begin : begin + graphs.num_edges[number]].T:
        assert u < v
        a[u, v] += 1
        a[v, u] += 1
    return a


def save(path, edges, nodes, **more):
    """An .npz file from lists of pairs and numbers of nodes, one each per graph."""
    pairs = np.array([pair for graph in edges for pair in graph], np.int16).reshape(-1, 2).T
    arrays = {"num_nodes": np.array(nodes, np.int16), "num_edges": np.array([len(graph) for graph in edges], np.int32)}
    np.savez(path, **{**arrays, "edge_index": pairs, **more})
    return path


def random_graphs(seed, count):
    graphs = [nx.gnp_random_graph(int(n), 0.3, seed=seed + int(n)) for n in range(4, 4 + count)]
    for graph in graphs:
        nx.add_path(graph, range(len(graph)))
    return graphs


WRITERS = {
    "graphml": lambda graph, path: nx.write_graphml(graph, path),
    "gml": lambda graph, path: nx.write_gml(graph, path),
    "edges": lambda graph, path: nx.write_edgelist(graph, path),
    "txt": lambda graph, path: nx.write_edgelist(graph, path, delimiter=",", data=False, comments="%"),
    "edgelist": lambda graph, path: nx.write_weighted_edgelist(graph, path),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_folders_come_back_as_they_were(tmp_path, ending):
    graphs = random_graphs(0, 12)
    for number, graph in enumerate(graphs):
        weighted = nx.Graph((u, v, {"weight": 0.5 * u}) for u, v in graph.edges)
        weighted.add_nodes_from(range(len(graph)))
        ordered = nx.Graph()
        ordered.add_nodes_from(range(len(graph)))
        ordered.add_edges_from(weighted.edges(data=True))
        WRITERS[ending](ordered, tmp_path / f"{number:02}.{ending}")
    (tmp_path / "picture.png").write_bytes(b"no graph")
    (tmp_path / f"._00.{ending}").write_bytes(b"\xff")
    found = read_graphs(tmp_path)
    assert found.names == [f"{number:02}.{ending}" for number in range(12)]
    for number, graph in enumerate(graphs):
        np.testing.assert_array_equal(adjacency(found, number), nx.to_numpy_array(graph, nodelist=range(len(graph))))
    assert GraphDataModule(path=str(tmp_path)).spec["nodes"] == 15


@given(st.integers(0, 1000), st.permutations(range(8)))
def test_direction_order_and_repetition_of_pairs_make_no_difference(tmp_path_factory, seed, order):
    folder = tmp_path_factory.mktemp("npz")
    graphs = random_graphs(seed, 8)
    edges = [list(graphs[i].edges) for i in order]
    nodes = [len(graphs[i]) for i in order]
    plain = read_graphs(save(folder / "plain.npz", edges, nodes))
    flipped = read_graphs(save(folder / "flipped.npz", [[(v, u) for u, v in graph][::-1] for graph in edges], nodes))
    both = read_graphs(save(folder / "both.npz", [graph + [(v, u) for u, v in graph] for graph in edges], nodes))
    twice = read_graphs(save(folder / "twice.npz", [graph * 2 for graph in edges], nodes))
    for number, i in enumerate(order):
        expected = nx.to_numpy_array(graphs[i], nodelist=range(len(graphs[i])))
        for found in (plain, flipped, both, twice):
            np.testing.assert_array_equal(adjacency(found, number), expected)


def test_names_as_nodes_comments_and_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text(
        "# a triangle with a tail\n\nber, par\npar,rom 3.5\n\nrom\tber {}\nrom oslo # end\n"
    )
    found = read_graphs(tmp_path / "a.txt")
    np.testing.assert_array_equal(adjacency(found, 0), [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0]])


def test_numbers_as_nodes_keep_their_order(tmp_path):
    (tmp_path / "a.edges").write_text("10 9\n9 2\n")
    np.testing.assert_array_equal(adjacency(read_graphs(tmp_path / "a.edges"), 0), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_a_graphml_file_may_hold_several_graphs(tmp_path):
    graph = '<graph edgedefault="undirected"><node id="a"/><node id="b"/><node id="c"/>{}</graph>'
    edges = ['<edge source="a" target="b"/>', '<edge source="c" target="b"/>']
    text = graph.format(edges[0] + edges[1]) + graph.format("".join(edges) + '<edge source="a" target="c"/>')
    (tmp_path / "two.graphml").write_text(f'<graphml xmlns="http://graphml.graphdrawing.org/xmlns">{text}</graphml>')
    found = read_graphs(tmp_path / "two.graphml")
    assert found.names == ["two.graphml (graph 0)", "two.graphml (graph 1)"]
    np.testing.assert_array_equal(adjacency(found, 0), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(adjacency(found, 1), 1 - np.eye(3))


@pytest.mark.parametrize("ending", ["graphml", "gml"])
def test_directed_files(tmp_path, notes, ending):
    path = tmp_path / f"a.{ending}"
    getattr(nx, f"write_{ending}")(nx.DiGraph([(0, 1), (1, 0), (2, 1), (0, 3)]), path)
    with pytest.raises(
        ValueError, match=r"2 one-way edges in directed graphs \(in 1 of 1 graphs\), first in a\..*symm"
    ):
        read_graphs(path)
    assert not notes
    expected = nx.to_numpy_array(nx.Graph([(0, 1), (2, 1), (0, 3)]), nodelist=range(4))
    np.testing.assert_array_equal(adjacency(read_graphs(path, symmetrize=True), 0), expected)
    (note,) = notes
    assert "2 one-way edges" in note
    assert "made undirected" in note
    getattr(nx, f"write_{ending}")(PETERSEN.to_directed(), path)
    np.testing.assert_array_equal(adjacency(read_graphs(path), 0), nx.to_numpy_array(PETERSEN))


def test_arrays_that_mix_one_way_and_two_way_pairs_are_directed(tmp_path, notes):
    edges = [[(0, 1), (1, 2)], [(0, 1), (1, 0), (2, 1)]]
    path = save(tmp_path / "a.npz", edges, [3, 3])
    with pytest.raises(ValueError, match=r"1 one-way edges .*\(in 1 of 2 graphs\), first in graph 1 of a.npz"):
        read_graphs(path)
    found = read_graphs(path, symmetrize=True)
    np.testing.assert_array_equal(adjacency(found, 1), adjacency(found, 0))


def test_self_loops(tmp_path, notes):
    path = save(tmp_path / "a.npz", [[(0, 1)], [(0, 0), (0, 1), (1, 1)], [(1, 1), (0, 1)]], [2, 2, 2])
    with pytest.raises(ValueError, match=r"3 self-loops \(in 2 of 3 graphs\), first in graph 1 of a.npz: .*dropped"):
        read_graphs(path)
    found = read_graphs(path, symmetrize=True)
    assert found.edge_index.tolist() == [[0, 0, 0], [1, 1, 1]]
    (note,) = notes
    assert "3 self-loops (in 2 of 3 graphs) are dropped" in note


def test_isolated_nodes_are_dropped_and_counted(tmp_path, notes):
    edges = [[(1, 3), (3, 4)], [], [(0, 2)], [(0, 1)]]
    path = save(tmp_path / "a.npz", edges, [6, 2, 4, 2], is_test=np.array([1, 0, 0, 1], bool))
    found = read_graphs(path)
    assert found.num_nodes.tolist() == [3, 2, 2]
    assert found.num_edges.tolist() == [2, 1, 1]
    assert found.edge_index.tolist() == [[0, 1, 0, 0], [1, 2, 1, 1]]
    assert found.names == ["graph 0 of a.npz", "graph 2 of a.npz", "graph 3 of a.npz"]
    assert found.is_test is not None
    assert found.is_test.tolist() == [True, False, True]
    (note,) = notes
    assert note.endswith("7 isolated nodes dropped, 1 graphs without edges left out")


def test_clean_files_are_read_without_a_word(tmp_path, notes):
    read_graphs(save(tmp_path / "a.npz", [[(0, 1)]], [2]))
    assert not notes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_nodes": np.array([2.0, np.nan])}, "num_nodes must hold whole numbers from 0 .* float64 .* with NaN"),
        ({"num_nodes": np.array([2, -3])}, "num_nodes must hold whole numbers from 0"),
        ({"num_nodes": np.array(3)}, r"num_nodes must hold .* of shape \(\)"),
        ({"num_nodes": np.array([2, 3, 4])}, r"got \(3,\), \(2,\), \(2, 3\) with sum 3"),
        ({"num_edges": np.array([1, 1])}, r"\(2, 3\) with sum 2"),
        ({"edge_index": np.zeros((3, 3), int)}, r"edge_index \(2, sum of num_edges\)"),
        ({"edge_index": np.array([[0.0, 0, 1], [1, 1, np.nan]])}, "edge_index must hold whole numbers"),
        ({"edge_index": np.array([[0, 0, 1], [1, 1, 3]])}, r"1 edges .* the first is \[1, 3\] in graph 1, .* 3 nodes"),
        ({"edge_index": np.array([[0, 0, 1], [1, 1, -1]])}, "edge_index must hold whole numbers from 0"),
        ({"is_test": np.array([0, 1, 1])}, "is_test must be 2 times true or false"),
        ({"is_test": np.array([0, 2])}, "is_test must be 2 times true or false"),
        ({"num_edges": np.array([0, 0]), "edge_index": np.zeros((2, 0), int)}, "holds no graph with an edge"),
        ({"num_nodes": np.array([{}, {}])}, "cannot read .*a.npz as .npz of numbers"),
    ],
)
def test_bad_arrays_are_named(tmp_path, more, message):
    path = save(tmp_path / "a.npz", [[(0, 1)], [(0, 1), (1, 2)]], [2, 3], **more)
    with pytest.raises(ValueError, match=message):
        read_graphs(path)


def test_missing_arrays_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", num_nodes=np.array([2]))
    with pytest.raises(ValueError, match=r"no array num_edges and no edge_index: it must be an .npz file"):
        read_graphs(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.npz": b"hello"}, "cannot read .*a.npz"),
        ({"a.graphml": b"<graphml"}, "cannot read .*a.graphml as .graphml"),
        ({"a.gml": b"graph [ node [ ] ]"}, "cannot read .*a.gml as .gml"),
        ({"a.gml": b"nothing"}, "cannot read .*a.gml as .gml"),
        ({"a.txt": b"0 1\n2\n"}, r"a.txt line 2: expected two nodes, .u v., got '2'"),
        ({"a.txt": b"source target\n0 1\n1 2\n"}, "starts with a header, 'source target'"),
        ({"a.txt": b"\xff\xfe0 1"}, "cannot read .*a.txt as an edge list"),
        ({"a.txt": b"# nothing\n"}, "no graph with an edge"),
        ({"a.csv": b"0,1\n"}, r"no graph in a known format \(.csv\): give an .npz file"),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_graphs(tmp_path / name)


def test_folders_without_or_with_too_many_formats(tmp_path):
    with pytest.raises(ValueError, match=r"no graph in a known format \(nothing at all\)"):
        read_graphs(tmp_path)
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no graph in a known format \(.pkl\)"):
        read_graphs(tmp_path)
    (tmp_path / "a.edges").write_text("0 1")
    (tmp_path / "README.txt").write_text("these are graphs")
    with pytest.raises(ValueError, match=r"several formats, .edges, .txt: keep those of one"):
        read_graphs(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*none: give an .npz file"):
        read_graphs(tmp_path / "none")


class Bad:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("name", ["a.pkl", "a.PICKLE", "a.gpickle"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps([Bad()]))
    with pytest.raises(
        ValueError, match=r"runs whatever code is in it.*write_graphml\(graph, f\"\{number:05\}.graphml"
    ):
        GraphDataModule(path=str(tmp_path / name))
