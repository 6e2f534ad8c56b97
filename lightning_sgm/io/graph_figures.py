"""Pictures of graphs: many beside each other, and how single ones come out of noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_sgm.io.figures import new_figure
from lightning_sgm.io.layouts import components, distances, halves, layout

Array = NDArray[Any]

_LARGE = 60  # graphs with more nodes get a larger panel
_FAINT = 0.04  # edges fainter than this are not drawn
_MOST = 1000  # edges of a step, the darkest; more would make it black
_EDGE = (0.2, 0.22, 0.26)
_WAITING = (0.75, 0.77, 0.8)  # nodes of a graph that is not there yet
# Darkened so that white letters can be read on them.
_ELEMENTS = {"C": "#444a52", "N": "#2f5bd3", "O": "#d62f2f", "F": "#2f9e44", "P": "#e0821f", "S": "#c2a000"}
_ELEMENTS |= {"Cl": "#1f8a5a", "Br": "#8c3b1f", "I": "#7a2fa0", "B": "#c98a7a"}


@dataclass(frozen=True)
class Paint:
    """How the nodes of a graph look.

    Attributes:
        colours: (N, 3) in [0, 1].
        letters: one per node, written into it, or none.
    """

    colours: Array
    letters: Sequence[str] = ()


@dataclass(frozen=True)
class _Panel:
    """One graph: positions (N, 2) in [-0.5, 0.5], edges (E, 2) and their strengths (E,), 1 for a plain edge."""

    positions: Array
    edges: Array
    strengths: Array
    paint: Paint
    below: str = ""


def paints(graphs: Sequence[Array]) -> list[Paint]:
    """Nodes blue on one side of a graph and red on the other if most of the graphs have two clear clusters, see
    :func:`~lightning_sgm.io.layouts.halves`; otherwise the darker the higher their degree.

    Args:
        graphs: (N, N) bool each.
    """
    from matplotlib import colormaps

    sides, clear = zip(*(halves(graph) for graph in graphs), strict=True)
    if 2 * sum(clear) > len(graphs):
        return [Paint(colormaps["coolwarm"](0.5 + 0.5 * side)[:, :3]) for side in sides]
    degrees = [graph.sum(axis=1) for graph in graphs]
    most = max(1, *(degree.max() for degree in degrees))
    return [Paint(colormaps["GnBu"](0.35 + 0.65 * degree / most)[:, :3]) for degree in degrees]


def element_paint(atoms: Sequence[str]) -> Paint:
    """Atoms with their symbols, in the colours that chemists know.

    Args:
        atoms: N element symbols.
    """
    from matplotlib.colors import to_rgb

    return Paint(np.array([to_rgb(_ELEMENTS.get(atom, "#7a7a7a")) for atom in atoms]), atoms)


def describe(adjacency: Array, noun: str = "node") -> str:
    """ "18 nodes", with the number of parts if it is not one.

    Args:
        adjacency: (N, N) bool.
        noun: what a node is.
    """
    count, parts = len(adjacency), len(components(distances(adjacency)))
    return f"{count} {noun}{'s' * (count != 1)}" + (f", {parts} parts" if parts > 1 else "")


def grid_figure(graphs: Sequence[Array], titles: Sequence[str]) -> Any:
    """Graphs row by row in a square grid.

    Args:
        graphs: (N, N) bool each, of any sizes.
        titles: written below them, before the number of nodes.

    Returns:
        A matplotlib figure.
    """
    panels = []
    for graph, title, paint in zip(graphs, titles, paints(graphs), strict=True):
        panels.append(_weighted(_unit(layout(graph)), graph.astype(float), paint, f"{title}: {describe(graph)}"))
    return _figure(panels, columns=math.ceil(math.sqrt(len(panels))))


def strip_figure(
    steps: Sequence[Array], finals: Sequence[Array], looks: Sequence[Paint], times: Sequence[float]
) -> Any:
    """How graphs come out of noise: a row each, a panel for every step and one for the result.

    Nodes stand where they are in the result throughout; an edge is as dark as its value, from 0 (and below) to 1, and
    wider above 1, so edges are seen to appear. Of more than 1000 edges in a step the darkest are drawn.

    Args:
        steps: (S, N, N) floats each.
        finals: (N, N) each, the whole numbers that the last steps were rounded to.
        looks: of the nodes of each result.
        times: S numbers, written above the columns.

    Returns:
        A matplotlib figure.
    """
    panels = []
    for values, final, paint in zip(steps, finals, looks, strict=True):
        positions = _unit(layout(final > 0))
        waiting = Paint(np.tile(_WAITING, (len(final), 1)))
        panels += [_weighted(positions, _calmed(value, max(1.0, final.max())), waiting) for value in values]
        panels.append(_weighted(positions, final, paint, describe(final > 0, "atom" if paint.letters else "node")))
    return _figure(panels, columns=len(times) + 1, above=[*(f"t = {time:.2f}" for time in times), "result"])


def _weighted(positions: Array, values: Array, paint: Paint, below: str = "") -> _Panel:
    edges = np.argwhere(np.triu(values > _FAINT, 1))
    strengths = values[edges[:, 0], edges[:, 1]]
    order = strengths.argsort()  # the dark ones on top
    return _Panel(positions, edges[order], strengths[order], paint, below)


def _calmed(values: Array, highest: float) -> Array:
    """The darkest edges of a step, as wide as an edge can become: noise is no double bond."""
    pairs = np.sort(values[np.triu_indices(len(values), 1)])
    least = pairs[-_MOST] if len(pairs) > _MOST else -np.inf
    return np.where(values >= least, np.minimum(values, highest), 0.0)


def _unit(positions: Array) -> Array:
    """Moved and scaled to the width or height of a panel, around 0; small graphs do not fill it."""
    low, high = positions.min(axis=0), positions.max(axis=0)
    return np.asarray(0.84 * (positions - 0.5 * (low + high)) / max(2.0, (high - low).max()))


def _figure(panels: Sequence[_Panel], columns: int, above: Sequence[str] = ()) -> Any:
    """The panels row by row, all in one pair of axes, which is far faster than a pair for each."""
    rows = math.ceil(len(panels) / columns)
    tall = max(2.0 * max(panel.positions[:, 1].max() for panel in panels), 0.3) + 0.16
    pitch = tall + 0.14  # with the line of text below
    margin = 0.2 if above else 0.0
    side = 2.4 if max(len(panel.positions) for panel in panels) > _LARGE else 1.8
    figure, axes = new_figure(width=columns * side, height=(rows * pitch + margin) * side)
    axes.set(xlim=(0, columns), ylim=(-pitch * rows, margin), aspect="equal")
    axes.axis("off")
    for column, title in enumerate(above):
        axes.text(column + 0.5, 0.04, title, ha="center", va="bottom", fontsize=8)
    for number, panel in enumerate(panels):
        centre = np.array([number % columns + 0.5, -pitch * (number // columns) - 0.5 * tall])
        _draw(axes, panel, centre, points=72 * side)
        axes.text(centre[0], centre[1] - 0.5 * tall, panel.below, ha="center", va="top", fontsize=7, color="0.25")
    return figure


def _draw(axes: Any, panel: _Panel, centre: Array, points: float) -> None:
    """Edges, nodes and letters of a panel that is so many typographic points wide."""
    from matplotlib.collections import LineCollection

    places, letters = panel.positions + centre, panel.paint.letters
    crowd = len(panel.edges) / len(places)
    lines = np.clip(panel.strengths, 0, 1)[:, None] * [0, 0, 0, 1] + [*_EDGE, 0]
    widths = (0.9 if crowd < 3 else 0.6 if crowd < 5 else 0.3) * np.maximum(1.0, 1.6 * panel.strengths - 0.6)
    axes.add_collection(LineCollection(list(places[panel.edges]), colors=lines, linewidths=widths, zorder=1))
    width = float(np.clip(0.6 * points * _nearest(panel.positions), 2.0, 9.5 if letters else 7.5))
    outline = {"edgecolors": "white", "linewidths": 0.4 if width > 4 else 0.0}
    axes.scatter(*places.T, s=width**2, c=panel.paint.colours, zorder=2, **outline)
    for place, letter in zip(places, letters, strict=False):
        axes.text(*place, letter, color="white", ha="center", va="center_baseline", fontsize=0.65 * width, zorder=3)


def _nearest(positions: Array) -> float:
    """The median distance of nodes to their nearest neighbours."""
    if len(positions) == 1:
        return 1.0
    across = np.linalg.norm(positions[:, None] - positions, axis=2) + np.diag(np.full(len(positions), np.inf))
    return float(np.median(across.min(axis=1)))
