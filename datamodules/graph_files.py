"""Graphs from files, in one packed form: arrays (.npz), GraphML, GML, edge lists. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_EDGE_LISTS = (".edges", ".edgelist", ".txt")
_ENDINGS = (".graphml", ".gml", *_EDGE_LISTS)
_PICKLES = (".pkl", ".pickle", ".p", ".gpickle", ".pt", ".pth")
_REQUIRED = ("num_nodes", "num_edges", "edge_index")
_FORMATS = f"an .npz file of packed graphs, or a folder of {', '.join(_ENDINGS)} files with one graph each"


class PackedGraphs(NamedTuple):
    """Simple undirected graphs one after another.

    Attributes:
        num_nodes: (G,) int64, nodes of each graph.
        num_edges: (G,) int64, edges of each graph.
        edge_index: (2, sum of num_edges) int64, node numbers within the graph, i < j, each edge once.
        names: G names for messages.
        is_test: (G,) bool, the test graphs; None if the file does not say.
    """

    num_nodes: Ints
    num_edges: Ints
    edge_index: Ints
    names: list[str]
    is_test: NDArray[np.bool_] | None = None


class _Arcs(NamedTuple):
    """Graphs as they were found: as PackedGraphs, but pairs may be loops, repeated, or in any direction."""

    num_nodes: Ints
    num_edges: Ints
    edge_index: Ints
    names: list[str]
    directed: NDArray[np.bool_]  # (G,): the file says that direction counts
    is_test: NDArray[np.bool_] | None = None


def pack(num_nodes: Ints, graph: Ints, edges: Ints, names: list[str]) -> PackedGraphs:
    """Packed graphs from ``edges`` (2, E), i < j, of the graphs numbered ``graph`` (E,), which ascends."""
    return PackedGraphs(num_nodes, np.bincount(graph, minlength=len(num_nodes)).astype(np.int64), edges, names)


def starts(lengths: Ints) -> Ints:
    """(G,) where each of G stretches of these ``lengths`` (G,), one after another, begins."""
    return np.cumsum(lengths) - lengths


def read_graphs(path: Path, symmetrize: bool = False) -> PackedGraphs:
    """Graphs of a file or folder, as simple undirected graphs without isolated nodes.

    A pair of nodes listed in one direction only is an edge, and so is one listed in both. A graph is directed if its
    file says so (GraphML, GML), or if it lists some pairs in both directions and others in one; then one-way edges are
    refused. Further columns, weights and attributes are left out, repeated edges count once. Isolated nodes are dropped
    and graphs without edges left out, with a note: the model has no place for them (gdss.md section 2).

    Args:
        path: an .npz file with num_nodes (G,), num_edges (G,), edge_index (2, sum of num_edges) of node numbers within
            the graph, and perhaps is_test (G,); or a .graphml, .gml or edge list file ("u v" on each line, separated
            by white space or a comma, # or % before comments); or a folder of such files of one ending, sorted by name.
        symmetrize: make one-way edges undirected and drop self-loops, instead of refusing them.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another format, a damaged file, numbers out of range, self-loops, directed edges, no graph left.
    """
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"{path} is not read: opening a pickle runs whatever code is in it. Where you trust it, write each graph "
            f'with networkx.write_graphml(graph, f"{{number:05}}.graphml") into a folder, and give that folder'
        )
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: give {_FORMATS}")
    arcs = _read_npz(path) if path.suffix.lower() == ".npz" and path.is_file() else _read_files(path)
    graphs = _without_isolated(_undirected(arcs, path, symmetrize), path)
    if not len(graphs.num_nodes):
        raise ValueError(f"{path} holds no graph with an edge: give {_FORMATS}")
    return graphs


def _read_npz(path: Path) -> _Arcs:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*_REQUIRED, "is_test") if name in file}
    except Exception as error:  # zipfile, zlib and numpy have many ways to find a file damaged
        raise ValueError(f"cannot read {path} as .npz of numbers: {error}") from error
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {' and no '.join(missing)}: it must be {_FORMATS}")
    for name in _REQUIRED:
        _require_counts(path, name, arrays[name])
    num_nodes, num_edges, edges = (arrays[name].astype(np.int64) for name in _REQUIRED)
    total = len(num_nodes)
    if num_nodes.shape != (total,) or num_edges.shape != (total,) or edges.shape != (2, num_edges.sum()):
        raise ValueError(
            f"{path}: num_nodes and num_edges must be (G,) and edge_index (2, sum of num_edges), got "
            f"{num_nodes.shape}, {num_edges.shape}, {edges.shape} with sum {num_edges.sum()}"
        )
    graph = np.repeat(np.arange(total), num_edges)
    outside = (edges >= num_nodes[graph]).any(axis=0)
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(
            f"{path}: {outside.sum()} edges have node numbers out of range; the first is {edges[:, first].tolist()} in "
            f"graph {graph[first]}, which has {num_nodes[graph[first]]} nodes"
        )
    is_test = arrays.get("is_test")
    if is_test is not None and (is_test.shape != (total,) or not np.isin(is_test, (0, 1)).all()):
        raise ValueError(f"{path}: is_test must be {total} times true or false, got {is_test.dtype} {is_test.shape}")
    names = [f"graph {number} of {path.name}" for number in range(total)]
    flags = None if is_test is None else is_test.astype(bool)
    return _Arcs(num_nodes, num_edges, edges, names, np.zeros(total, dtype=bool), flags)


def _require_counts(path: Path, name: str, values: NDArray[Any]) -> None:
    whole = values.dtype.kind in "iu" or not values.size  # numpy makes floats of an empty list
    if values.ndim == 0 or not whole or (values < 0).any():
        raise ValueError(
            f"{path}: {name} must hold whole numbers from 0 of an integer type, got {values.dtype} of shape "
            f"{values.shape}" + (" with NaN" if values.dtype.kind == "f" and np.isnan(values).any() else "")
        )


def _read_files(path: Path) -> _Arcs:
    """Text files with one graph each; a GraphML file may hold several."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in found if file.suffix.lower() in _ENDINGS and not file.name.startswith(".")]
    endings = sorted({file.suffix.lower() for file in files})
    if len(endings) > 1:
        raise ValueError(f"{path} holds files of several formats, {', '.join(endings)}: keep those of one")
    if not endings:
        others = ", ".join(sorted({file.suffix or "without an ending" for file in found})) or "nothing at all"
        raise ValueError(f"{path} holds no graph in a known format ({others}): give {_FORMATS}")
    read = _read_edge_list if endings[0] in _EDGE_LISTS else _read_networkx
    graphs = [graph for file in files for graph in read(file)]
    num_nodes, num_edges = (
        np.array([getattr(graph, name)[0] for graph in graphs], dtype=np.int64) for name in ("num_nodes", "num_edges")
    )
    return _Arcs(
        num_nodes,
        num_edges,
        np.concatenate([np.empty((2, 0), dtype=np.int64), *(graph.edge_index for graph in graphs)], axis=1),
        [graph.names[0] for graph in graphs],
        np.array([graph.directed[0] for graph in graphs], dtype=bool),
    )


def _one(name: str, nodes: int, edges: Ints, directed: bool) -> _Arcs:
    return _Arcs(np.array([nodes]), np.array([edges.shape[1]]), edges, [name], np.array([directed]))


def _read_networkx(file: Path) -> Iterator[_Arcs]:
    import networkx as nx
    from networkx.readwrite.graphml import GraphMLReader

    try:
        # read_graphml would give the first graph of a file and hide the others. GML nodes need not have labels.
        gml = file.suffix.lower() == ".gml"
        graphs = [nx.read_gml(file, label="id")] if gml else list(GraphMLReader()(path=str(file)))
    except Exception as error:  # XML, text encoding, missing keys, networkx's own
        raise ValueError(f"cannot read {file} as {file.suffix.lower()}: {error}") from error
    for number, graph in enumerate(graphs):
        place = {node: position for position, node in enumerate(graph)}
        edges = np.array([(place[u], place[v]) for u, v in graph.edges()], dtype=np.int64).reshape(-1, 2).T
        yield _one(file.name + f" (graph {number})" * (len(graphs) > 1), len(place), edges, graph.is_directed())


def _read_edge_list(file: Path) -> Iterator[_Arcs]:
    pairs = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {file} as an edge list: {error}") from error
    for number, line in enumerate(lines, 1):
        fields = line.split("#")[0].split("%")[0].replace(",", " ").split()
        if len(fields) == 1:
            raise ValueError(f'{file} line {number}: expected two nodes, "u v", got {line.strip()!r}')
        if fields:
            pairs.append(fields[:2])
    named = [not (u + v).isdecimal() for u, v in pairs]
    if len(named) > 1 and named[0] and not any(named[1:]):
        raise ValueError(f"{file} starts with a header, {' '.join(pairs[0])!r}: remove it, or put a # before it")
    labels = [label for pair in pairs for label in pair]
    # Numbers in their own order, so that graphs come back as they were written; names as they first appear.
    order = dict.fromkeys(labels) if any(named) else sorted(set(labels), key=int)
    place = {label: position for position, label in enumerate(order)}
    edges = np.array([place[label] for label in labels], dtype=np.int64).reshape(-1, 2).T
    yield _one(file.name, len(place), edges, directed=False)


def _undirected(arcs: _Arcs, path: Path, symmetrize: bool) -> PackedGraphs:
    """Each edge once, i < j; complaints, or with ``symmetrize`` a note, about loops and one-way edges."""
    graph = np.repeat(np.arange(len(arcs.num_nodes)), arcs.num_edges)
    u, v = arcs.edge_index + starts(arcs.num_nodes)[graph]
    loop = u == v
    total = int(arcs.num_nodes.sum())
    pairs, inverse = np.unique((np.minimum(u, v) * total + np.maximum(u, v))[~loop], return_inverse=True)
    up, down, owner = np.zeros(len(pairs), bool), np.zeros(len(pairs), bool), np.zeros(len(pairs), np.int64)
    up[inverse[(u < v)[~loop]]] = True
    down[inverse[(u > v)[~loop]]] = True
    owner[inverse] = graph[~loop]
    directed = arcs.directed.copy()
    directed[owner[up & down]] = True  # listed both ways: so whoever lists others one way means it
    one_way = (up != down) & directed[owner]
    _report(graph[loop], "self-loops", "dropped", arcs, path, symmetrize)
    _report(owner[one_way], "one-way edges in directed graphs", "made undirected", arcs, path, symmetrize)
    edges = np.stack(np.divmod(pairs, max(total, 1))) - starts(arcs.num_nodes)[owner]
    return pack(arcs.num_nodes, owner, edges, arcs.names)._replace(is_test=arcs.is_test)


def _report(found: Ints, what: str, treatment: str, arcs: _Arcs, path: Path, symmetrize: bool) -> None:
    """Refuse what was found in the graphs numbered ``found`` (one entry each), or say how it is treated."""
    if not len(found):
        return
    message = f"{path}: {len(found)} {what} (in {len(np.unique(found))} of {len(arcs.names)} graphs)"
    if not symmetrize:
        first = arcs.names[int(found.min())]
        raise ValueError(f"{message}, first in {first}: with symmetrize: true they are {treatment}; or mend the data")
    rank_zero_info(f"{message} are {treatment}")


def _without_isolated(graphs: PackedGraphs, path: Path) -> PackedGraphs:
    """The graphs with their isolated nodes taken out, without those that have no edge; a note says how many."""
    graph = np.repeat(np.arange(len(graphs.num_nodes)), graphs.num_edges)
    edges = graphs.edge_index + starts(graphs.num_nodes)[graph]
    connected = np.zeros(int(graphs.num_nodes.sum()), dtype=bool)
    connected[edges] = True
    owner = np.repeat(np.arange(len(graphs.num_nodes)), graphs.num_nodes)
    num_nodes = np.bincount(owner[connected], minlength=len(graphs.num_nodes)).astype(np.int64)
    kept = num_nodes > 0
    if not connected.all() or not kept.all():
        rank_zero_info(
            f"{path}: {(~connected).sum()} isolated nodes dropped, {(~kept).sum()} graphs without edges left out"
        )
    local = (np.cumsum(connected) - 1)[edges] - starts(num_nodes)[graph]
    return PackedGraphs(
        num_nodes[kept],
        graphs.num_edges[kept],
        local,
        [name for name, keep in zip(graphs.names, kept, strict=True) if keep],
        None if graphs.is_test is None else graphs.is_test[kept],
    )
