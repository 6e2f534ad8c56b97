import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn

from lightning_sgm.metrics import GraphMMD, graphs
from lightning_sgm.metrics.graph_kernels import bootstrap_weights, embed, mmd_with_interval, squared_mmd
from lightning_sgm.metrics.graphs import describe
from tests.conftest import SHARED

GRAPHS = SHARED / "data" / "graphs"
FEATURES = ("degree", "cluster", "orbit", "spectral")


Graphs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch_of(some, extra=0) -> Graphs:
    """x, adj and node_mask of networkx graphs, padded to the largest and ``extra`` more."""
    size = max(len(graph) for graph in some) + extra
    adj = torch.zeros(len(some), size, size)
    mask = torch.zeros(len(some), size, dtype=torch.bool)
    for row, here, graph in zip(adj, mask, some, strict=True):
        row[: len(graph), : len(graph)] = torch.from_numpy(nx.to_numpy_array(graph))
        here[: len(graph)] = True
    return torch.zeros(len(some), size, 1), adj, mask


def random_graphs(count, seed, density=0.3):
    sizes = np.random.default_rng(seed).integers(3, 12, count)
    return [nx.gnp_random_graph(int(n), density, seed=seed * 1000 + i) for i, n in enumerate(sizes)]


def filled(real, generated, **options):
    metric = GraphMMD(**options)
    metric.update(*batch_of(real), real=True)
    metric.update(*batch_of(generated), real=False)
    return metric


def shared_set(name) -> list[Graphs]:
    """Test and training batches."""
    file = np.load(GRAPHS / f"{name}.npz")
    nodes, edges, (i, j) = file["num_nodes"], file["num_edges"], file["edge_index"]
    adj = torch.zeros(len(nodes), nodes.max(), nodes.max())
    graph = np.repeat(np.arange(len(nodes)), edges)
    adj[graph, i, j] = adj[graph, j, i] = 1.0
    mask = torch.arange(nodes.max()) < torch.from_numpy(nodes)[:, None]
    test = torch.from_numpy(file["is_test"]).bool()
    return [(adj[rows, :, :1], adj[rows], mask[rows]) for rows in (test, ~test)]


def cleaned(graph):
    """What the metrics see of a networkx graph."""
    graph = nx.Graph(graph)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    graph.remove_nodes_from(list(nx.isolates(graph)))
    return graph if len(graph) else nx.empty_graph(1)


def by_library(graph):
    """Degree, clustering and spectral histograms of networkx and numpy, and whether the graph is connected."""
    graph = cleaned(graph)
    clustering = np.histogram(list(nx.clustering(graph).values()), bins=100, range=(0.0, 1.0))[0]
    values = np.linalg.eigvalsh(nx.normalized_laplacian_matrix(graph).toarray()).clip(0.0, 2.0)
    spectrum = np.histogram(values, bins=200, range=(-1e-5, 2.0))[0]
    return nx.degree_histogram(graph), clustering, spectrum, nx.is_connected(graph)


# ---- descriptions of graphs


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 14), st.floats(0.0, 1.0)), min_size=1, max_size=6), st.integers(0, 10**6))
def test_descriptions_against_networkx(kinds, seed):
    some = [nx.gnp_random_graph(nodes, density, seed=seed + i) for i, (nodes, density) in enumerate(kinds)]
    found = describe(*batch_of(some, extra=3)[1:])
    for row, graph in enumerate(some):
        degree, cluster, spectrum, connected = by_library(graph)
        assert found["degree"][row].tolist() == degree + [0] * (found["degree"].shape[1] - len(degree))
        assert found["cluster"][row].tolist() == cluster.tolist()
        assert found["spectral"][row].tolist() == spectrum.tolist()
        assert bool(found["connected"][row]) == connected
        assert int(found["nodes"][row]) == len(cleaned(graph))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 5))
def test_descriptions_know_no_order_of_nodes_and_no_padding(seed, extra):
    _, adj, mask = batch_of(random_graphs(5, seed % 1000), extra)
    order = torch.randperm(adj.shape[1], generator=torch.Generator().manual_seed(seed))
    before, after = describe(adj, mask), describe(adj[:, order][:, :, order], mask[:, order])
    for name, table in before.items():
        assert torch.equal(table, after[name]), name


def test_what_is_dropped():
    """A self-loop, an edge to a node outside the mask, bond orders, nodes without edges."""
    adj = torch.tensor([[1.0, 3, 0, 0], [3, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])[None].repeat(2, 1, 1)
    mask = torch.tensor([[True, True, True, False], [False, False, True, True]])
    found = describe(adj, mask)
    assert found["nodes"].flatten().tolist() == [2, 1]
    assert found["degree"].tolist() == [[0, 2], [1, 0]]
    assert found["connected"].flatten().tolist() == [1, 1]
    assert found["orbit"][:, 0].tolist() == [2, 0]
    assert [row.nonzero().flatten().tolist() for row in found["spectral"]] == [[0, 199], [0]]


def test_small_pieces_make_no_difference(monkeypatch):
    _, adj, mask = batch_of(random_graphs(20, 3))
    whole = describe(adj, mask)
    monkeypatch.setattr(graphs, "_PIECE", 100)
    for name, table in describe(adj, mask).items():
        assert torch.equal(table, whole[name]), name


def test_no_graphs_have_empty_tables():
    found = describe(torch.zeros(0, 5, 5), torch.zeros(0, 5, dtype=torch.bool))
    assert {name: tuple(table.shape) for name, table in found.items()} == {
        **{"nodes": (0, 1), "connected": (0, 1), "degree": (0, 1)},
        **{"cluster": (0, 100), "orbit": (0, 15), "spectral": (0, 200)},
    }


# ---- kernels


def test_kernels_by_hand():
    """Histograms [2, 0, 0] and [1, 0, 1]: half of the mass moves by two bins, half of the L1 distance is 1/2."""
    values = torch.tensor([[2.0, 0, 0], [1, 0, 1]], dtype=torch.float64)

    def distance(feature, kernel):
        points, p = embed(values, feature, kernel)
        return float(torch.linalg.vector_norm(points[0] - points[1], p))

    assert distance("degree", "emd") == pytest.approx(1.0)
    assert distance("spectral", "emd") == pytest.approx(1.0)
    assert distance("cluster", "emd") == pytest.approx(1.0 / 100 / 0.1)
    assert distance("orbit", "emd") == pytest.approx(math.sqrt(2) / 30)
    assert distance("degree", "tv") == pytest.approx(0.5)
    assert distance("spectral", "tv") == pytest.approx(0.5)
    assert distance("cluster", "tv") == pytest.approx(0.5 / 0.1)
    assert distance("orbit", "tv") == pytest.approx(1.0 / 30)


def test_mmd_of_two_points_against_one():
    real, generated = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[1.0]]).double()
    value, within = squared_mmd(real, generated, 1.0, torch.ones(1, 1, dtype=torch.float64))
    assert float(value) == pytest.approx((1 + math.exp(-2)) / 2 + 1 - 2 * math.exp(-0.5), abs=1e-14)
    assert float(within) == 1.0


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_weights_are_repeated_graphs(p, monkeypatch):
    real, generated = torch.randn(7, 3).double(), torch.randn(6, 3).double()
    weights = bootstrap_weights(5, 6, 1)
    found, _ = squared_mmd(real, generated, p, weights)
    for value, row in zip(found, weights, strict=True):
        again = generated.repeat_interleave((row * 6).round().long(), 0)
        equal = torch.full((1, 6), 1 / 6, dtype=torch.float64)
        torch.testing.assert_close(squared_mmd(real, again, p, equal)[0][0], value, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("lightning_sgm.metrics.graph_kernels._PIECE", 12)
    torch.testing.assert_close(squared_mmd(real, generated, p, weights)[0], found, rtol=1e-12, atol=1e-12)


def test_bootstrap_weights():
    weights = bootstrap_weights(4000, 5, 7)
    counts = weights * 5
    assert torch.equal(counts, counts.round())
    torch.testing.assert_close(weights.sum(1), torch.ones(4000, dtype=torch.float64))
    # Multinomial: means 1, variances 1 - 1/5, covariances -1/5; the tolerance is five standard errors.
    covariance = torch.cov(counts.T)
    expected = torch.eye(5, dtype=torch.float64) - 0.2
    torch.testing.assert_close(counts.mean(0), torch.ones(5, dtype=torch.float64), rtol=0, atol=0.07)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.1)
    assert torch.equal(weights, bootstrap_weights(4000, 5, 7))
    assert not torch.equal(weights, bootstrap_weights(4000, 5, 8))
    assert abs(float(torch.corrcoef(torch.stack([counts[:, 0], bootstrap_weights(4000, 5, 8)[:, 0]]))[0, 1])) < 0.08


def test_interval_is_as_wide_as_fresh_samples_scatter():
    """200 sets of 40 points: their values scatter as the intervals say, and 95 % of these should hold the middle."""
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(60, 2, generator=draw).double()
    found = []
    for _ in range(200):
        generated = (torch.randn(40, 2, generator=draw) + 1.0).double()
        found.append(torch.stack(mmd_with_interval(real, generated, 2.0, bootstrap_weights(200, 40, 0))))
    value, low, high = torch.stack(found, 1)
    ends = torch.quantile(value, torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert float((high - low).mean()) == pytest.approx(float(ends[1] - ends[0]), rel=0.15)
    assert float(((low < value.median()) & (value.median() < high)).double().mean()) > 0.9
    assert bool(((low < value) & (value < high)).all())


def test_interval_of_points_that_are_all_far_apart():
    """There k(G, G) = 1 with itself only: a draw with repeats has about twice the value, and the interval must not."""
    generated = 100.0 * torch.arange(1, 51).double()[:, None]
    value, low, high = mmd_with_interval(torch.zeros(1, 1).double(), generated, 1.0, bootstrap_weights(2000, 50, 0))
    assert float(value) == pytest.approx(1.0 + 1 / 50, abs=1e-12)
    assert float(low) < float(value) < float(high) < 1.0 + 1.5 / 50


# ---- the metric


def kernel_by_hand(a, b, feature, kernel):
    """The published kernel of two histograms (or two vectors of orbit counts), one pair at a time."""
    if feature != "orbit":
        size = max(len(a), len(b))
        a, b = (np.pad(np.asarray(v, float), (0, size - len(v))) / np.sum(v) for v in (a, b))
    sigma = {"degree": 1.0, "cluster": 0.1, "orbit": 30.0, "spectral": 1.0}[feature]
    if kernel == "tv":
        distance = np.abs(a - b).sum() / 2
    elif feature == "orbit":
        distance = np.linalg.norm(a - b)
    else:
        places = np.arange(len(a)) / (100 if feature == "cluster" else 1)
        distance = pytest.importorskip("scipy.stats").wasserstein_distance(places, places, a, b)
    return math.exp(-(distance**2) / (2 * sigma**2))


@pytest.mark.parametrize("kernel", ["emd", "tv"])
def test_values_against_the_definition(kernel):
    real, generated = random_graphs(6, 1), random_graphs(5, 2, 0.5)
    result = filled(real, generated, kernel=kernel, repeats=20).compute()

    def features(some):
        orbits = describe(*batch_of(some)[1:])
        for row, graph in enumerate(some):
            degree, cluster, spectrum, _ = by_library(graph)
            means = (orbits["orbit"][row].double() / orbits["nodes"][row]).numpy()
            yield {"degree": degree, "cluster": cluster, "spectral": spectrum, "orbit": means}

    a, b = list(features(real)), list(features(generated))
    for feature in FEATURES:

        def mean(first, second, feature=feature):
            return np.mean([kernel_by_hand(f[feature], s[feature], feature, kernel) for f in first for s in second])

        expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
        assert float(result[feature]) == pytest.approx(expected, abs=1e-10), feature
    assert float(result["connected"]) == np.mean([by_library(graph)[3] for graph in generated])
    assert (float(result["graphs_real"]), float(result["graphs"])) == (6, 5)


@pytest.mark.parametrize("kernel", ["emd", "tv"])
def test_a_set_against_itself_is_0(kernel):
    some = random_graphs(15, 4)
    result = filled(some, some[::-1], kernel=kernel).compute()
    for feature in FEATURES:
        assert abs(float(result[feature])) < 1e-12
        assert float(result[f"{feature}_low"]) < float(result[f"{feature}_high"])
    other = filled(some, [nx.complete_graph(8)] * 15, kernel=kernel).compute()
    assert all(float(other[feature]) > 0.01 for feature in FEATURES)


def test_batches_and_their_order_make_no_difference():
    real, generated = random_graphs(9, 5), random_graphs(12, 6)
    whole = filled(real, generated).compute()
    metric = GraphMMD()
    for first in (8, 4, 0):
        metric.update(*batch_of(generated[first : first + 4], extra=first), real=False)
    for graph in reversed(real):
        metric.update(*batch_of([graph]), real=True)
    torch.testing.assert_close(metric.compute(), whole, rtol=0, atol=1e-12)
    metric.reset()
    with pytest.raises(ValueError, match="mmd_emd needs real and generated graphs, got 0 and 0"):
        metric.compute()


def test_features_are_chosen():
    real, generated = random_graphs(4, 7), random_graphs(4, 8)
    everything = filled(real, generated, repeats=10).compute()
    for features in (["spectral"], ["orbit", "degree"]):
        result = filled(real, generated, features=features, repeats=10).compute()
        expected = {f"{f}{end}" for f in features for end in ("", "_low", "_high")} | {"connected", "graphs"}
        assert set(result) == expected | {"graphs_real"}
        for name in features:
            torch.testing.assert_close(result[name], everything[name], rtol=0, atol=1e-14)


def test_names_and_refusals():
    assert (GraphMMD().name, GraphMMD(kernel="tv").name) == ("mmd_emd", "mmd_tv")
    with pytest.raises(ValueError, match='must be "emd" or "tv", got \'rbf\''):
        GraphMMD(kernel="rbf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"some of degree, cluster, orbit, spectral, got \['motif'\]"):
        GraphMMD(features=["motif"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="repeats of GraphMMD must be at least 1, got 0"):
        GraphMMD(repeats=0)
    x, adj, mask = batch_of([nx.path_graph(3)])
    with pytest.raises(ValueError, match=r"got \(1, 3, 2\) and \(1, 3\)"):
        GraphMMD().update(x, adj[:, :, :2], mask, real=True)
    adj[0, 0, 2] = 1.0
    with pytest.raises(ValueError, match="symmetric"):
        GraphMMD().update(x, adj, mask, real=True)


def test_half_precision_does_not_round_counts():
    some = [nx.complete_graph(30), nx.path_graph(9)]
    metric = filled(some, random_graphs(5, 1))
    expected = filled(some, random_graphs(5, 1)).compute()
    torch.testing.assert_close(metric.to(torch.bfloat16).compute(), expected, rtol=0, atol=0)


def test_moves_between_test_and_fit_and_is_not_in_checkpoints():
    with torch.inference_mode():
        metric = filled(random_graphs(3, 1), random_graphs(3, 2))
        first = metric.compute()
        metric.reset()
    metric.update(*batch_of(random_graphs(3, 1)), real=True)
    metric.update(*batch_of(random_graphs(3, 2)), real=False)
    torch.testing.assert_close(metric.compute(), first, rtol=0, atol=0)
    assert not metric.state_dict()


def _process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metric = GraphMMD()
    metric.update(*batch_of(random_graphs(9, 5)[rank::2]), real=True)
    if rank == 0:  # the other one has no sample
        metric.update(*batch_of(random_graphs(12, 6)), real=False)
    torch.save(metric.compute(), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_one_without_samples(tmp_path):
    spawn(_process, (str(tmp_path),), nprocs=2)
    expected = filled(random_graphs(9, 5), random_graphs(12, 6)).compute()
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), expected, rtol=0, atol=1e-12)


# ---- measured floors (gdss.md section 10): test graphs against all training graphs


@pytest.mark.skipif(not GRAPHS.is_dir(), reason="the shared graphs are not here")
@pytest.mark.parametrize(
    ("name", "kernel", "floors"),
    [
        ("community_small", "emd", (0.0034, 0.0092, 0.0010, 0.034)),
        ("community_small", "tv", (0.0023, 0.0482, 0.0016, 0.012)),
        ("ego_small", "emd", (0.0142, 0.0273, 0.0044, 0.025)),
        ("ego_small", "tv", (0.0038, 0.0227, 0.0047, 0.006)),
        ("enzymes", "emd", (0.0082, 0.0959, 0.0123, 0.012)),
        ("grid", "emd", (0.0001, 0.0000, 0.0001, 0.018)),
    ],
)
def test_floors(name, kernel, floors):
    test, training = shared_set(name)
    metric = GraphMMD(kernel, repeats=10)
    metric.update(*test, real=True)
    metric.update(*training, real=False)
    result = metric.compute()
    for feature, floor in zip(FEATURES, floors, strict=True):
        # Spectra: the reference loses the eigenvalue 2 of bipartite graphs where it is rounded up (48 of 100 grids).
        tolerance = 0.0011 if feature == "spectral" else 0.00011
        assert float(result[feature]) == pytest.approx(floor, abs=tolerance), feature
    assert float(result["connected"]) == pytest.approx(1.0 if name != "enzymes" else 449 / 470, abs=1e-9)
