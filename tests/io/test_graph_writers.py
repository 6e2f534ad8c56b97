from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_sgm.io.graph_figures import describe, element_paint, grid_figure, paints, strip_figure
from lightning_sgm.io.graphs import GraphWriter, strip
from lightning_sgm.io.layouts import components, distances, halves, layout
from lightning_sgm.io.writers import writer_for
from tests.conftest import SHARED

nx = pytest.importorskip("networkx")

SPEC = {"kind": "graph", "nodes": 6, "features": 2, "bonds": 1, "node_counts": [0, 0, 0, 1], "edge_mean": 0.3}


def graph_batch(graphs, nodes=None):
    """A batch of networkx graphs with nodes 0, 1, ..."""
    nodes = nodes or max(map(len, graphs))
    adj = torch.zeros(len(graphs), nodes, nodes)
    node_mask = torch.zeros(len(graphs), nodes, dtype=torch.bool)
    for row, graph in enumerate(graphs):
        adj[row, : len(graph), : len(graph)] = torch.from_numpy(nx.to_numpy_array(graph, dtype=np.float32))
        node_mask[row, : len(graph)] = True
    return {
        "x": torch.zeros(len(graphs), nodes, 2),
        "adj": adj,
        "node_mask": node_mask,
        "index": torch.arange(len(graphs)),
    }


def adjacency(graph):
    return nx.to_numpy_array(graph, nodelist=sorted(graph)) > 0


def bridged_cliques():
    graph = nx.disjoint_union(nx.complete_graph(6), nx.complete_graph(5))
    graph.add_edge(0, 6)
    return graph


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name].tolist() for name in file}


def test_isolated_nodes_go_and_an_empty_graph_is_one_node(tmp_path):
    batch = graph_batch([nx.empty_graph(5), nx.empty_graph(3), nx.path_graph(4)], nodes=6)
    batch["adj"][0, 1, 3] = batch["adj"][0, 3, 1] = 1.0
    batch["adj"][0, 3, 4] = batch["adj"][0, 4, 3] = 1.0
    batch["adj"][2, 0, 5] = batch["adj"][2, 5, 0] = 1.0  # outside the mask
    batch["adj"][2, 2, 2] = 1.0  # no graph of ours has loops
    packed, picture = writer_for(SPEC).save(batch, tmp_path / "a_0.5")
    assert (packed.name, picture.name) == ("a_0.5.npz", "a_0.5.png")
    assert load(packed) == {
        "num_nodes": [3, 1, 4],
        "num_edges": [2, 0, 3],
        "edge_index": [[0, 1, 0, 1, 2], [1, 2, 1, 2, 3]],
    }
    with Image.open(picture) as image:
        assert min(image.size) > 100


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 2**31)), min_size=1, max_size=4))
def test_files_hold_the_graphs_they_were_made_from(tmp_path_factory, seeds):
    folder = tmp_path_factory.mktemp("graphs")
    graphs = [nx.gnp_random_graph(nodes, 0.3, seed=seed) for nodes, seed in seeds]
    files = GraphWriter().save_each(graph_batch(graphs), folder)
    for file, graph in zip(files, graphs, strict=True):
        kept = graph.subgraph([node for node in sorted(graph) if graph.degree(node)])
        expected = nx.convert_node_labels_to_integers(kept, ordering="sorted") if kept else nx.empty_graph(1)
        found = nx.read_graphml(file, node_type=int)
        assert not found.is_directed()
        assert (set(found), sorted(map(sorted, found.edges))) == (set(expected), sorted(map(sorted, expected.edges)))


def test_samples_are_numbered_and_collected_in_order(tmp_path):
    graphs = [nx.path_graph(size) for size in range(2, 8)]
    whole, writer = graph_batch(graphs), GraphWriter()
    files: dict[int, Path] = {}
    for rows in ([4, 1], [0, 2], [5, 3]):
        part = {name: value[torch.tensor(rows)] for name, value in whole.items()}
        files |= dict(zip(rows, writer.save_each(part, tmp_path), strict=True))
    assert [files[i].name for i in range(6)] == [f"00000{i}.graphml" for i in range(6)]
    packed, picture = writer.collect([files[i] for i in range(6)], tmp_path / "samples")
    assert load(packed)["num_nodes"] == [2, 3, 4, 5, 6, 7]
    direct, same = writer.save(whole, tmp_path / "direct")
    assert load(packed) == load(direct)
    with Image.open(picture) as one, Image.open(same) as other:
        assert np.array_equal(np.array(one), np.array(other))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_is_written_can_be_trained_on(tmp_path):
    files = pytest.importorskip("datamodules.graph_files")
    graphs = [bridged_cliques(), nx.cycle_graph(5), nx.star_graph(4)]
    writer = GraphWriter()
    packed, _ = writer.save(graph_batch(graphs), tmp_path / "all")
    writer.save_each(graph_batch(graphs), tmp_path / "each")
    for found in (files.read_graphs(packed), files.read_graphs(tmp_path / "each")):
        assert found.num_nodes.tolist() == [11, 5, 5]
        assert found.edge_index.tolist() == [
            [u for g in graphs for u, _ in sorted(map(sorted, g.edges))],
            [v for g in graphs for _, v in sorted(map(sorted, g.edges))],
        ]


@pytest.mark.skipif(not (SHARED / "data" / "graphs").is_dir(), reason="the shared graph sets are absent")
def test_published_sets_come_back(tmp_path):
    with np.load(SHARED / "data" / "graphs" / "ego_small.npz", allow_pickle=False) as file:
        sets = {name: file[name] for name in ("num_nodes", "num_edges", "edge_index")}
    graphs = []
    for count, edges in zip(
        sets["num_nodes"], np.split(sets["edge_index"], sets["num_edges"].cumsum()[:-1], axis=1), strict=True
    ):
        graphs.append(nx.empty_graph(int(count)))
        graphs[-1].add_edges_from(edges.T.tolist())
    packed, _ = GraphWriter().save(graph_batch(graphs), tmp_path / "ego")
    found = load(packed)
    assert found["num_nodes"] == sets["num_nodes"].tolist()
    starts = [0, *np.cumsum(found["num_edges"]).tolist()]
    pairs = np.array(found["edge_index"]).T.tolist()
    for row, graph in enumerate(graphs):
        assert pairs[starts[row] : starts[row + 1]] == sorted(map(sorted, graph.edges))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        GraphWriter().save(graph_batch([nx.path_graph(3)]), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_checked(tmp_path):
    batch = graph_batch([nx.path_graph(3)])
    with pytest.raises(ValueError, match=r"\(B, N, N\).*\(1, 3, 3\).*\(1, 2\)"):
        GraphWriter().save(batch | {"node_mask": batch["node_mask"][:, :2]}, tmp_path / "a")


# Pictures.


def reverse_steps(graphs, steps=4):
    """A batch of noise that fades over graphs."""
    batch, t = graph_batch(graphs), torch.linspace(1.0, 0.0, steps)
    noise = torch.randn(batch["adj"].shape).triu(1)
    values = batch["adj"][:, None] + t[:, None, None] * (noise + noise.mT)[:, None]
    return batch | {"adj_steps": values, "t": t}


@pytest.mark.parametrize("steps", [False, True])
def test_pictures_in_tensorboard(tmp_path, steps):
    logger = TensorBoardLogger(tmp_path, "", "")
    graphs = [bridged_cliques(), nx.path_graph(3), nx.empty_graph(2)]
    batch = reverse_steps(graphs) if steps else graph_batch(graphs)
    writer = GraphWriter()
    writer.log(logger, "reverse" if steps else "samples", batch, 3)
    writer.log(CSVLogger(tmp_path), "samples", batch, 3)
    logger.finalize("success")
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("reverse" if steps else "samples")
    assert event.step == 3
    assert event.width > 300
    written = writer.save(batch, tmp_path / "x")
    assert [path.suffix for path in written] == ([".png"] if steps else [".npz", ".png"])
    with Image.open(written[-1]) as image:
        assert image.size == (event.width, event.height)


def lines_and_nodes(figure):
    """(alphas of the lines, positions of the nodes) of every panel."""
    (axes,) = figure.axes
    drawn = zip(axes.collections[::2], axes.collections[1::2], strict=True)
    return [(lines.get_colors()[:, 3], np.array(nodes.get_offsets())) for lines, nodes in drawn]


def test_a_picture_shows_every_edge_of_the_first_graphs():
    graphs = [nx.complete_graph(70), nx.path_graph(5), nx.empty_graph(1)]
    figure = grid_figure([adjacency(graph) for graph in graphs], ["4", "7", "9"])
    panels = lines_and_nodes(figure)
    assert [len(alphas) for alphas, _ in panels] == [70 * 69 // 2, 4, 0]
    assert all((alphas == 1).all() for alphas, _ in panels)
    assert [text.get_text() for text in figure.axes[0].texts] == ["4: 70 nodes", "7: 5 nodes", "9: 1 node"]


def test_a_picture_shows_the_first_graphs_only(tmp_path):
    graphs = [nx.path_graph(4)] * 7
    few, _ = (
        GraphWriter(most=4).save(graph_batch(part), tmp_path / f"{len(part)}")[1] for part in (graphs[:4], graphs)
    )
    assert few.read_bytes() == (tmp_path / "7.png").read_bytes()
    assert len(load(tmp_path / "7.npz")["num_nodes"]) == 7


def test_edges_appear_in_place_as_dark_as_their_values():
    final = adjacency(nx.path_graph(3)).astype(float)
    step = np.array([[0.0, 0.5, -1.0], [0.5, 0.0, 1.7], [-1.0, 1.7, 0.0]])
    figure = strip_figure([np.stack([step, final])], [final], paints([final > 0]), [1.0, 0.25])
    (first, at), (second, then), (last, end) = lines_and_nodes(figure)
    assert first == pytest.approx([0.5, 1.0])
    assert second == pytest.approx([1.0, 1.0])
    assert last == pytest.approx([1.0, 1.0])
    assert then - at == pytest.approx(np.tile([1.0, 0.0], (3, 1)))
    assert end - then == pytest.approx(np.tile([1.0, 0.0], (3, 1)))
    assert [text.get_text() for text in figure.axes[0].texts[:3]] == ["t = 1.00", "t = 0.25", "result"]


def test_a_strip_leaves_out_nodes_that_the_result_lost_and_bears_what_is_not_finite():
    batch = reverse_steps([nx.empty_graph(6), nx.empty_graph(6)])
    batch["adj"][0, 1:4, 1:4] = 1.0 - torch.eye(3)
    batch["adj_steps"][0, 0] = torch.nan
    panels = lines_and_nodes(strip(batch))
    assert [len(nodes) for _, nodes in panels] == [3] * 5 + [1] * 5
    assert [len(alphas) for alphas, _ in panels[::4][:2]] == [0, 3]


def test_a_strip_of_large_graphs_shows_the_darkest_edges():
    noise = np.random.default_rng(0).normal(size=(60, 60))
    values = noise + noise.T
    final = adjacency(nx.cycle_graph(60)).astype(float)
    (alphas, _), _ = lines_and_nodes(strip_figure([values[None]], [final], paints([final > 0]), [1.0]))
    strongest = np.sort(values[np.triu_indices(60, 1)])[-1000:]
    positive = strongest[strongest > 0.04]
    assert np.sort(alphas) == pytest.approx(np.clip(positive, 0, 1))


def test_clusters_or_degrees_choose_the_colours():
    cliques, star = adjacency(bridged_cliques()), adjacency(nx.star_graph(5))
    one, two = (paint.colours for paint in paints([cliques, cliques]))
    assert np.array_equal(one, two)
    red, blue = one[:, 0], one[:, 2]
    assert len({*(red > blue)[:6]}) == len({*(red > blue)[6:]}) == 1
    assert (red > blue)[0] != (red > blue)[6]
    degrees = paints([star, star, cliques])[0].colours
    assert degrees[0].sum() < degrees[1].sum()  # the hub is darker
    assert np.unique(degrees[1:], axis=0).shape == (1, 3)
    assert element_paint(["C", "Cl"]).letters == ["C", "Cl"]
    assert not np.array_equal(*element_paint(["C", "Cl"]).colours)


def test_parts_are_counted():
    assert describe(adjacency(nx.disjoint_union(nx.path_graph(3), nx.path_graph(2)))) == "5 nodes, 2 parts"
    assert describe(np.zeros((1, 1), dtype=bool), "atom") == "1 atom"


# Layouts.


@given(st.integers(1, 12), st.integers(0, 2**31))
def test_distances_and_parts_are_those_of_networkx(nodes, seed):
    graph = nx.gnp_random_graph(nodes, 0.2, seed=seed)
    found = distances(adjacency(graph))
    expected = np.full((nodes, nodes), np.inf)
    for source, lengths in nx.all_pairs_shortest_path_length(graph):
        expected[source, list(lengths)] = list(lengths.values())
    assert np.array_equal(found, expected)
    parts = components(found)
    assert {frozenset(part.tolist()) for part in parts} == {frozenset(part) for part in nx.connected_components(graph)}
    assert [len(part) for part in parts] == sorted(map(len, parts), reverse=True)


def stress(positions, steps):
    upper = np.triu_indices(len(steps), 1)
    apart = np.linalg.norm(positions[:, None] - positions, axis=2)[upper]
    return (((apart - steps[upper]) / steps[upper]) ** 2).sum()


def test_a_path_is_a_straight_line_and_a_lattice_is_square():
    line = layout(adjacency(nx.path_graph(7)))
    assert np.ptp(line[:, 1]) < 0.1
    assert np.abs(np.diff(line[:, 0])) == pytest.approx(1.0, abs=0.02)
    graph = nx.grid_2d_graph(9, 6)
    corners = layout(adjacency(graph))
    edges = np.array([(sorted(graph).index(u), sorted(graph).index(v)) for u, v in graph.edges])
    lengths = np.linalg.norm(corners[edges[:, 0]] - corners[edges[:, 1]], axis=1)
    assert lengths.max() / lengths.min() < 1.5


@pytest.mark.parametrize("seed", range(6))
def test_the_stress_is_as_low_as_that_of_kamada_and_kawai(seed):
    graph = nx.connected_watts_strogatz_graph(16, 4, 0.2, seed=seed)
    steps = distances(adjacency(graph))
    theirs = nx.kamada_kawai_layout(graph)
    ours = stress(layout(adjacency(graph)), steps)
    best = min(
        stress(scale * np.array([theirs[node] for node in sorted(graph)]), steps) for scale in np.linspace(0.5, 8, 300)
    )
    assert ours < 1.1 * best


def test_twins_are_apart_and_parts_do_not_meet():
    star = layout(adjacency(nx.star_graph(9)))
    apart = np.linalg.norm(star[:, None] - star, axis=2) + np.eye(10)
    assert apart.min() > 0.3
    graph = nx.disjoint_union_all([nx.cycle_graph(8), nx.path_graph(4), *[nx.path_graph(2)] * 3, nx.empty_graph(2)])
    positions = layout(adjacency(graph))
    boxes = [
        (positions[part].min(axis=0), positions[part].max(axis=0)) for part in components(distances(adjacency(graph)))
    ]
    for place, (low, high) in enumerate(boxes):
        for other_low, other_high in boxes[:place]:
            assert ((low - other_high > 0.99) | (other_low - high > 0.99)).any()


def test_two_clusters_are_clear_in_cliques_with_a_bridge_and_not_in_a_star():
    sides, clear = halves(adjacency(bridged_cliques()))
    assert clear
    assert np.abs(sides).max() == 1.0
    assert len({*np.sign(sides[:6])}) == len({*np.sign(sides[6:])}) == 1
    assert sides[0] * sides[6] < 0
    assert not halves(adjacency(nx.star_graph(6)))[1]
    assert halves(np.zeros((1, 1), dtype=bool))[0].tolist() == [0.0]
