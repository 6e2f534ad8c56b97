"""Batches of graphs of different sizes as blocks of equal ones, and their edges as pairs i < j."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 1000  # what starting one more block costs, in entries of adjacency matrices
_LARGEST = 16384  # entries of a block's adjacency matrices: its attention maps should stay in a core's cache


class Pairs(NamedTuple):
    """Where the p pairs i < j are in flattened square matrices of S entries.

    Attributes:
        upper: (p,) int64, place of entry (i, j).
        lower: (p,) int64, place of entry (j, i).
        square: (S,) int64, number of the pair at each place, p where there is none (the diagonal).
    """

    upper: Tensor
    lower: Tensor
    square: Tensor


class Block(NamedTuple):
    """``graphs`` graphs that are worked on as graphs of ``size`` nodes.

    Attributes:
        rows: (graphs,) int64, which graphs of the batch; None for all.
        graphs: b.
        size: n.
        pairs: of one graph.
        edge_mask: (b p,) bool, pairs that exist; None if every graph has n nodes.
    """

    rows: Tensor | None
    graphs: int
    size: int
    pairs: Pairs
    edge_mask: Tensor | None


class Plan(NamedTuple):
    """How a batch (B, N) becomes blocks and returns. M = sum of b n and P = sum of b p run over the blocks.

    Attributes:
        blocks: in the order of M and P.
        nodes: (M,) int64 places in B N; None if they are all, in order.
        pairs: the P pairs in flattened B N N; None if they are those of one block of all.
        mask: (M,) bool, nodes that exist.
        shape: (B, N).
    """

    blocks: list[Block]
    nodes: Tensor | None
    pairs: Pairs | None
    mask: Tensor
    shape: tuple[int, int]

    def split(self, x: Tensor, adj: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, N, F) and (B, N, N) as a list of (b, n, F) and a list of pairs (1, b p) of each block."""
        x = x.flatten(0, 1)
        x = x if self.nodes is None else x.index_select(0, self.nodes)
        if self.pairs is None:
            pairs = fold(adj.flatten(1), self.blocks[0].pairs).view(1, -1)
        else:
            pairs = fold(adj.reshape(1, -1), self.pairs)
        pairs = 0.5 * pairs
        nodes = x.split([block.graphs * block.size for block in self.blocks])
        edges = pairs.split([block.graphs * len(block.pairs.upper) for block in self.blocks], 1)
        split = [part.view(block.graphs, block.size, -1) for part, block in zip(nodes, self.blocks, strict=True)]
        return split, list(edges)

    def join(self, nodes: list[Tensor], pairs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The reverse of :meth:`split`, zero outside the mask: (b n, F) and (1, b p) to (B, N, F) and (B, N, N)."""
        batch, size = self.shape
        x = torch.cat(nodes) * self.mask[:, None]
        if self.nodes is not None:
            x = x.new_zeros(batch * size, x.shape[1]).index_copy(0, self.nodes, x)
        masked = [
            part if block.edge_mask is None else part * block.edge_mask
            for part, block in zip(pairs, self.blocks, strict=True)
        ]
        if self.pairs is None:
            adj = spread(masked[0].view(batch, -1), self.blocks[0].pairs)
        else:
            adj = spread(torch.cat(masked, 1), self.pairs)
        return x.view(batch, size, -1), adj.view(batch, size, size)


def fold(square: Tensor, pairs: Pairs) -> Tensor:
    """Entry (i, j) plus entry (j, i) of flattened matrices, (R, S) to (R, p)."""
    return _Fold.apply(square, *pairs) if square.requires_grad else _fold(square, *pairs)


def spread(values: Tensor, pairs: Pairs, diagonal: float = 0.0) -> Tensor:
    """Flattened symmetric matrices of values per pair, (R, p) to (R, S), with ``diagonal`` where there is no pair."""
    if values.requires_grad:
        return _Spread.apply(values, diagonal, *pairs)
    return _spread(values, diagonal, *pairs)


def _fold(square: Tensor, upper: Tensor, lower: Tensor, places: Tensor) -> Tensor:
    return square.index_select(1, upper).add_(square.index_select(1, lower))


def _spread(values: Tensor, diagonal: float, upper: Tensor, lower: Tensor, places: Tensor) -> Tensor:
    return F.pad(values, (0, 1), value=diagonal).index_select(1, places)


class _Fold(torch.autograd.Function):
    """Each of the two is the other's adjoint, so that gradients are gathers too, not the slow index_add."""

    @staticmethod
    def forward(ctx: Any, square: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs)
        return _fold(square, *pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return spread(grad, Pairs(*ctx.saved_tensors)), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, diagonal: float, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs)
        return _spread(values, diagonal, *pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return fold(grad, Pairs(*ctx.saved_tensors)), None, None, None, None


class Planner:
    """Plans of batches; the last one is kept, as a sampler asks a thousand times for the same.

    On CPUs graphs are worked on in blocks of equal or almost equal sizes, which saves most of the padding. Elsewhere,
    and under ``torch.compile``, all of them are one block, for which nothing need be known about the mask.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Plan] | None = None

    def __call__(self, mask: Tensor) -> Plan:
        """The plan of a batch's ``node_mask`` (B, N) bool."""
        if torch.compiler.is_compiling() or mask.device.type != "cpu":
            return whole(mask)
        # Compared by value, since a mask may be changed in place or copied; that takes microseconds.
        if self._last is None or not torch.equal(self._last[0], mask):
            self._last = mask.clone(), grouped(mask)
        return self._last[1]


def pairs_of(size: int, device: torch.device) -> Pairs:
    """The pairs of a graph of ``size`` nodes; those of the last sizes asked for are kept."""
    return _pairs(size, device) if torch.compiler.is_compiling() else _kept_pairs(size, device)


def _pairs(size: int, device: torch.device) -> Pairs:
    i, j = torch.triu_indices(size, size, 1, device=device).unbind()
    return _places(i * size + j, j * size + i, size * size)


@lru_cache(maxsize=64)
def _kept_pairs(size: int, device: torch.device) -> Pairs:
    # What is first made in Lightning's validation must still serve training, which inference tensors cannot.
    with torch.inference_mode(False):
        return _pairs(size, device)


def _places(upper: Tensor, lower: Tensor, total: int) -> Pairs:
    number = torch.arange(len(upper), device=upper.device)
    square = torch.full((total,), len(upper), device=upper.device)
    return Pairs(upper, lower, square.index_copy(0, upper, number).index_copy(0, lower, number))


def whole(mask: Tensor) -> Plan:
    """The plan of one block: every graph is worked on as one of N nodes, under masks."""
    batch, size = mask.shape
    pairs = pairs_of(size, mask.device)
    both = (mask[:, :, None] & mask[:, None, :]).flatten(1).index_select(1, pairs.upper).flatten()
    return Plan([Block(None, batch, size, pairs, both)], None, None, mask.flatten(), (batch, size))


@torch.inference_mode(False)
def grouped(mask: Tensor) -> Plan:
    """The plan of blocks of similar sizes; graphs without nodes are in none of them."""
    batch, width = mask.shape
    sizes = mask.sum(1)
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # a graph's own nodes first
    by_size = sizes.argsort(stable=True)
    start = int((sizes == 0).sum())
    blocks: list[Block] = []
    nodes, upper, lower = ([torch.zeros(0, dtype=torch.int64)] for _ in range(3))
    for count, size in cuts(sizes[by_size[start:]].tolist()):
        rows = by_size[start : start + count]
        start += count
        pairs = pairs_of(size, mask.device)
        i, j = pairs.upper // size, pairs.upper % size
        own = order[rows, :size]
        base = rows[:, None] * width
        nodes.append((base + own).flatten())
        upper.append(((base + own[:, i]) * width + own[:, j]).flatten())
        lower.append(((base + own[:, j]) * width + own[:, i]).flatten())
        inside = torch.arange(size) < sizes[rows, None]
        edge_mask = None if bool(inside.all()) else (inside[:, i] & inside[:, j]).flatten()
        blocks.append(Block(rows, count, size, pairs, edge_mask))
    index = torch.cat(nodes)
    everywhere = _places(torch.cat(upper), torch.cat(lower), batch * width * width)
    return Plan(blocks, index, everywhere, mask.flatten()[index], (batch, width))


def cuts(sizes: list[int]) -> list[tuple[int, int]]:
    """Ascending sizes as blocks (number of graphs, largest size) of the least total cost.

    A block costs a constant plus the entries of its adjacency matrices, padding included; dynamic programming over the
    distinct sizes, then large blocks of one size are cut for the cache.
    """
    distinct = sorted(set(sizes))
    ends = [0, *accumulate(sizes.count(size) for size in distinct)]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for k, size in enumerate(distinct, 1):
        best.append(min((best[j][0] + _BLOCK + (ends[k] - ends[j]) * size**2, j) for j in range(k)))
    blocks: list[tuple[int, int]] = []
    k = len(distinct)
    while k:
        j, size = best[k][1], distinct[k - 1]
        count, step = ends[k] - ends[j], max(1, _LARGEST // size**2)
        pieces = -(-count // step)
        blocks[:0] = [((count + p) // pieces, size) for p in range(pieces)]
        k = j
    return blocks
