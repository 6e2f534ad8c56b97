"""Where to draw the nodes of a graph, and how to tell its clusters apart by colour. Numpy only, nothing random."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_STEPS = 300  # majorisation steps at most
_SETTLED = 1e-3  # a step that moves no node by more, in edge lengths, is the last
_GOLDEN = math.pi * (3.0 - math.sqrt(5.0))


def layout(adjacency: Array) -> Array:
    """Positions at which distances in the plane come close to the numbers of edges between nodes.

    Each connected part minimises the stress sum_ij (|p_i - p_j| - d_ij)^2 / d_ij^2 (Kamada and Kawai 1989) by
    majorisation (Gansner, Koren, North 2004) from classical scaling, and lies along its longer axis; parts stand
    beside each other in rows, the largest first. One graph has one layout on a given machine.

    Args:
        adjacency: (N, N) bool, symmetric.

    Returns:
        (N, 2) float64; an edge is about 1 long.
    """
    steps = distances(adjacency)
    parts = components(steps)
    positions = np.zeros((len(adjacency), 2))
    for rows, placed in zip(parts, _beside([_stress(steps[np.ix_(rows, rows)]) for rows in parts]), strict=True):
        positions[rows] = placed
    return positions


def halves(adjacency: Array) -> tuple[Array, bool]:
    """The Fiedler vector of each connected part, which has one sign on each of two clusters.

    It is the second eigenvector of the normalised Laplacian divided by its largest entry; 0 for a single node.

    Args:
        adjacency: (N, N) bool, symmetric.

    Returns:
        (N,) in [-1, 1], and whether the largest part has two clear clusters: its second eigenvalue is less than half of
        the third.
    """
    found = np.zeros(len(adjacency))
    clear = []
    for rows in components(distances(adjacency)):
        part = adjacency[np.ix_(rows, rows)].astype(np.float64)
        scale = np.maximum(part.sum(axis=1), 1.0) ** -0.5
        # The eigenvalues ascend; the first, 0, belongs to the constant.
        values, vectors = np.linalg.eigh(np.eye(len(rows)) - scale[:, None] * part * scale)
        clear.append(len(rows) > 2 and bool(values[1] < 0.5 * values[2]))
        if len(rows) > 1:
            vector = scale * vectors[:, 1]
            found[rows] = vector / vector[np.abs(vector).argmax()]
    return found, clear[0]


def distances(adjacency: Array) -> Array:
    """(N, N) float64: the least number of edges between nodes, inf between parts.

    Args:
        adjacency: (N, N) bool, symmetric.
    """
    edges = adjacency.astype(np.float32)
    found = np.where(np.eye(len(edges), dtype=bool), 0.0, np.inf)
    front = np.eye(len(edges), dtype=np.float32)
    step = 0
    while front.any():
        step += 1
        new = (front @ edges > 0) & np.isinf(found)
        found[new] = step
        front = new.astype(np.float32)
    return found


def components(steps: Array) -> list[Array]:
    """The node numbers of every connected part, the largest part first.

    Args:
        steps: (N, N), see :func:`distances`.
    """
    if not len(steps):
        return []
    first = np.isfinite(steps).argmax(axis=1)  # the lowest number in each node's part
    parts = [np.flatnonzero(first == number) for number in np.unique(first)]
    return sorted(parts, key=len, reverse=True)


def _stress(steps: Array) -> Array:
    """(N, 2) of one connected part, around 0, its longer axis first."""
    count = len(steps)
    if count == 1:
        return np.zeros((1, 2))
    target = steps + np.eye(count)  # the diagonal plays no part, but is divided by
    weight = target**-2.0 * (1.0 - np.eye(count))
    # Inverse of the weighted Laplacian on what sums to 0.
    inverse = np.linalg.inv(np.diag(weight.sum(axis=1)) - weight + 1.0 / count) - 1.0 / count
    positions = _scaling(steps)
    for _ in range(_STEPS):
        across = positions[:, None] - positions
        pull = weight * target / np.maximum(np.sqrt((across**2).sum(axis=2)), 1e-9)
        moved = inverse @ (pull.sum(axis=1)[:, None] * positions - pull @ positions)
        done = np.abs(moved - positions).max() < _SETTLED
        positions = moved
        if done:
            break
    positions -= positions.mean(axis=0)
    axes = np.linalg.eigh(positions.T @ positions)[1][:, ::-1]
    return np.asarray(positions @ axes)


def _scaling(steps: Array) -> Array:
    """(N, 2): classical scaling. Twins, which it puts in one place, are moved apart a little, along a spiral."""
    square = steps**2
    centred = square - square.mean(axis=0) - square.mean(axis=1, keepdims=True) + square.mean()
    values, vectors = np.linalg.eigh(-0.5 * centred)
    turn = _GOLDEN * np.arange(len(steps))
    spiral = np.sqrt(np.arange(len(steps)) / len(steps)) * np.stack([np.cos(turn), np.sin(turn)])
    return np.asarray(vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 0.0)) + 0.05 * spiral.T)


def _beside(parts: list[Array]) -> list[Array]:
    """The parts moved into rows of about equal width, one edge length apart."""
    boxes = [np.ptp(part, axis=0) + 1.0 for part in parts]
    width = max([math.sqrt(sum(box.prod() for box in boxes)), *(box[0] for box in boxes)], default=0.0)
    placed, x, y, height = [], 0.0, 0.0, 0.0
    for part, box in zip(parts, boxes, strict=True):
        if x + box[0] > width + 1e-9:
            x, y, height = 0.0, y - height, 0.0
        # The upper left corner of the box goes to (x, y).
        placed.append(part + (x - part[:, 0].min(), y - part[:, 1].max()))
        x, height = x + box[0], max(height, box[1])
    return placed
