"""Samples that are graphs: GraphML files, packed arrays, and drawings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor

from lightning_sgm.io.figures import pixels_of, save_figure
from lightning_sgm.io.files import atomic_write
from lightning_sgm.io.graph_figures import element_paint, grid_figure, paints, strip_figure
from lightning_sgm.io.writers import Batch, Writer, names_of, numbers_of, shown_name, with_suffix

Array = NDArray[Any]

_NAMESPACE = "http://graphml.graphdrawing.org/xmlns"


class _Packed(NamedTuple):
    """G graphs one after another, as :class:`~datamodules.GraphDataModule` reads them from .npz files."""

    num_nodes: Array  # (G,) int32
    num_edges: Array  # (G,) int32
    edge_index: Array  # (2, sum of num_edges) int32, node numbers from 0 within each graph, the lower one first


class GraphWriter(Writer):
    """Graphs without weights, drawn with clusters in two colours.

    Nodes without edges are left out, as GDSS does, and numbers of nodes close up; what remains of an empty graph is one
    node. A batch that has ``adj_steps`` (R, S, N, N), the values of the edges at the times ``t`` (S,), beside the
    result ``adj`` (R, N, N), is shown as a strip for each of the R graphs, in ``save`` and ``log``.

    Args:
        most: a picture shows at most so many graphs, the first.
    """

    def __init__(self, most: int = 25) -> None:
        self.most = most

    def save(self, batch: Batch, stem: Path) -> list[Path]:
        """All graphs in ``stem.npz``, in the form that ``--data.path`` reads, and the picture ``stem.png``.

        The arrays are num_nodes (G,), num_edges (G,) and edge_index (2, sum of num_edges), node numbers from 0 within
        each graph, the lower one first. Of a batch with steps there is the picture only.
        """
        if "adj_steps" in batch:
            return [save_figure(strip(batch), with_suffix(stem, ".png"))]
        return self._write(_pack(batch["adj"], batch["node_mask"]), _numbered(batch), stem)

    def save_each(self, batch: Batch, folder: Path) -> list[Path]:
        """``folder/NAME.graphml``."""
        files = [with_suffix(folder / name, ".graphml") for name in names_of(batch)]
        packed = _pack(batch["adj"], batch["node_mask"])
        edges = np.split(packed.edge_index, packed.num_edges.cumsum()[:-1], axis=1)
        for path, count, pairs in zip(files, packed.num_nodes.tolist(), edges, strict=True):
            with atomic_write(path) as file:
                file.write(_graphml(count, pairs.T.tolist()).encode())
        return files

    def collect(self, files: Sequence[Path], stem: Path) -> list[Path]:
        """All graphs in ``stem.npz`` and the picture of the first as ``stem.png``, called by their file names."""
        found = [_read_graphml(file) for file in files]
        packed = _Packed(
            num_nodes=np.array([count for count, _ in found], dtype=np.int32),
            num_edges=np.array([edges.shape[1] for _, edges in found], dtype=np.int32),
            edge_index=np.concatenate([edges for _, edges in found], axis=1),
        )
        return self._write(packed, [shown_name(file) for file in files], stem)

    def log(self, logger: Logger, tag: str, batch: Batch, step: int) -> None:
        """The picture."""
        if isinstance(logger, TensorBoardLogger):
            steps = "adj_steps" in batch
            figure = strip(batch) if steps else self._figure(_pack(batch["adj"], batch["node_mask"]), _numbered(batch))
            logger.experiment.add_image(tag, pixels_of(figure), step, dataformats="HWC")

    def _write(self, packed: _Packed, names: Sequence[str], stem: Path) -> list[Path]:
        path = with_suffix(stem, ".npz")
        with atomic_write(path) as file:
            np.savez_compressed(file, **packed._asdict())
        return [path, save_figure(self._figure(packed, names), with_suffix(stem, ".png"))]

    def _figure(self, packed: _Packed, names: Sequence[str]) -> Any:
        starts = [0, *packed.num_edges.cumsum().tolist()]
        graphs = []
        for row, count in enumerate(packed.num_nodes[: self.most].tolist()):
            graphs.append(np.zeros((count, count), dtype=bool))
            left, right = packed.edge_index[:, starts[row] : starts[row + 1]]
            graphs[-1][left, right] = graphs[-1][right, left] = True
        return grid_figure(graphs, names[: self.most])


def _numbered(batch: Batch) -> list[str]:
    return [str(number) for number in numbers_of(batch)]


def strip(batch: Batch, atoms: Sequence[str] = ()) -> Any:
    """The matplotlib figure of graphs coming out of noise, see :func:`~lightning_sgm.io.graph_figures.strip_figure`.

    Args:
        batch: ``adj_steps`` (R, S, N, N), ``adj`` (R, N, N), ``node_mask`` (R, N), ``t`` (S,), and for molecules ``x``
            (R, N, F).
        atoms: the F element symbols of molecules; none for plain graphs, whose isolated nodes are left out.

    Raises:
        ValueError: shapes that do not fit together.
    """
    half = _upper(batch["adj"], batch["node_mask"])
    final = np.round(half + half.swapaxes(1, 2))
    kept = np.asarray(final.any(axis=2))
    if atoms:
        x = batch["x"].detach().cpu()
        kept = ((x > 0.5).any(dim=2) & batch["node_mask"].cpu()).numpy()
        elements = x.argmax(dim=2).numpy()
    kept[:, 0] |= ~kept.any(axis=1)
    finals = [whole[np.ix_(rows, rows)] for whole, rows in zip(final, kept, strict=True)]
    values = batch["adj_steps"].detach().cpu().double().nan_to_num().numpy()
    steps = [value[:, rows][:, :, rows] for value, rows in zip(values, kept, strict=True)]
    if atoms:
        looks = [element_paint([atoms[i] for i in row[rows]]) for row, rows in zip(elements, kept, strict=True)]
    else:
        looks = paints([whole > 0 for whole in finals])
    return strip_figure(steps, finals, looks, batch["t"].tolist())


def _pack(adj: Tensor, node_mask: Tensor) -> _Packed:
    """The graphs of a batch without their isolated nodes; an entry of at least 0.5 is an edge."""
    edges = _upper(adj, node_mask) >= 0.5
    kept = edges.any(axis=1) | edges.any(axis=2)
    graph, left, right = np.nonzero(edges)
    numbers = kept.cumsum(axis=1) - 1  # of kept nodes within their graph
    return _Packed(
        num_nodes=np.maximum(kept.sum(axis=1), 1).astype(np.int32),
        num_edges=np.bincount(graph, minlength=len(edges)).astype(np.int32),
        edge_index=np.stack([numbers[graph, left], numbers[graph, right]]).astype(np.int32),
    )


def _upper(adj: Tensor, node_mask: Tensor) -> Array:
    """(B, N, N) float64 on the CPU: the entries above the diagonal between nodes inside the mask, the others 0."""
    if adj.ndim != 3 or adj.shape[1] != adj.shape[2] or node_mask.shape != adj.shape[:2]:
        raise ValueError(
            f"a batch of graphs has adj (B, N, N) and node_mask (B, N), got {tuple(adj.shape)} and "
            f"{tuple(node_mask.shape)}"
        )
    mask = node_mask.detach().cpu().numpy().astype(bool)
    return np.asarray(np.triu(adj.detach().cpu().double().numpy(), 1) * (mask[:, :, None] & mask[:, None, :]))


def _graphml(count: int, edges: Sequence[Sequence[int]]) -> str:
    nodes = "".join(f'    <node id="{number}"/>\n' for number in range(count))
    lines = "".join(f'    <edge source="{left}" target="{right}"/>\n' for left, right in edges)
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<graphml xmlns="{_NAMESPACE}">\n'
        f'  <graph edgedefault="undirected">\n{nodes}{lines}  </graph>\n</graphml>\n'
    )


def _read_graphml(path: Path) -> tuple[int, Array]:
    """Number of nodes and (2, E) edges of what ``save_each`` wrote."""
    root = ElementTree.parse(path).getroot()
    pairs = [(int(edge.get("source", "")), int(edge.get("target", ""))) for edge in root.iter(f"{{{_NAMESPACE}}}edge")]
    count = sum(1 for _ in root.iter(f"{{{_NAMESPACE}}}node"))
    return count, np.array(pairs, dtype=np.int32).reshape(-1, 2).T
