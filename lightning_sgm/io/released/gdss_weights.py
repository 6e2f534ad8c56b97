"""Weights of GDSS's code (2202.02514) by the names of :class:`GraphScore`, which stacks those of all channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sgm.networks.graph_layers import AttentionLayer, Linears
from lightning_sgm.networks.graph_score import GraphScore

_State = dict[str, Tensor]
_BOTH = ("weight", "bias")


class _Source(NamedTuple):
    """Released keys of one of our tensors: side by side within a row, stacked over rows; alone if ``copied``."""

    rows: list[list[str]]
    copied: bool = False
    transposed: bool = False

    def make(self, state: _State) -> Tensor:
        if self.copied:
            return state[self.rows[0][0]]
        tensors = [[state[key].T if self.transposed else state[key] for key in row] for row in self.rows]
        return torch.stack([torch.cat(row, -1) for row in tensors])


def from_released(state: _State, network: GraphScore) -> _State:
    """The state dict of ``network`` with released weights.

    Weights of what GDSS computes and never uses, in the last attention layer of each network, are left out.

    Args:
        state: the reference's two state dicts, the first's keys behind "x.", the second's behind "adj."; a "module." of
            DataParallel may follow.
        network: made with the arguments of the released networks, and without ``time``.

    Raises:
        ValueError: if weights are missing, unknown or of other shapes: the network is another.
    """
    state = {_plain(key): value for key, value in state.items()}
    sources, unused = _sources(network)
    wanted = {key for source in sources.values() for row in source.rows for key in row}
    advice = "give the network the arguments of the released one (params_x and params_adj in its file)"
    if missing := sorted(wanted - set(state)):
        raise ValueError(f"the weights lack {_few(missing)}: {advice}")
    if unknown := sorted(key for key in set(state) - wanted if not key.startswith(unused)):
        raise ValueError(f"the network has no place for the weights {_few(unknown)}: {advice}")
    ours = network.state_dict()
    if absent := sorted(set(ours) - set(sources)):
        raise ValueError(f"released networks have no {_few(absent)}: {advice}")
    found: _State = {}
    for name, source in sources.items():
        try:
            found[name] = source.make(state)
        except RuntimeError as error:
            raise ValueError(f"{_few(source.rows[0])} and its like are of different shapes: {error}") from error
        if found[name].shape != ours[name].shape:
            raise ValueError(
                f"{_few(source.rows[0])} gives {name} the shape {tuple(found[name].shape)} instead of "
                f"{tuple(ours[name].shape)}: {advice}"
            )
    return found


def _plain(key: str) -> str:
    part, _, rest = key.partition(".")
    return f"{part}.{rest.removeprefix('module.')}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sources(network: GraphScore) -> tuple[dict[str, _Source], tuple[str, ...]]:
    """Where each of our tensors comes from, and beginnings of keys that are of no use."""
    sources: dict[str, _Source] = {}
    unused: list[str] = []
    for part, net in (("x", network.x), ("adj", network.adj)):
        for i, layer in enumerate(net.layers):
            place = f"{part}.layers.{i}"
            if isinstance(layer, AttentionLayer):
                sources |= _attention(layer, place)
                unused += _unused(layer, place)
            else:
                sources |= {f"{place}.{n}": _Source([[f"{place}.{n}"]], copied=True) for n in _BOTH}
        sources |= _linears(net.final, f"{part}.final", f"{part}.final")
    return sources, tuple(unused)


def _attention(layer: AttentionLayer, place: str) -> dict[str, _Source]:
    found: dict[str, _Source] = {}
    heads = [f"{place}.attn.{c}" for c in range(layer.channels)]
    for n in _BOTH:
        if layer.values is not None:
            found[f"{place}.values.{n}"] = _Source([[f"{head}.gnn_v.{n}"] for head in heads])
        if layer.edges is not None and layer.conv == "gcn":
            found[f"{place}.scores.0.{n}"] = _Source([[f"{head}.gnn_q.{n}", f"{head}.gnn_k.{n}"] for head in heads])
        elif layer.edges is not None:
            for i in range(2):
                rows = [[f"{head}.gnn_{which}.linears.{i}.{n}"] for which in "qk" for head in heads]
                found[f"{place}.scores.{i}.{n}"] = _Source(rows, transposed=n == "weight")
    if layer.edges is not None:
        found |= _linears(layer.edges, f"{place}.edges", f"{place}.mlp")
    if layer.nodes is not None:
        found |= _linears(layer.nodes, f"{place}.nodes", f"{place}.multi_channel")
    return found


def _unused(layer: AttentionLayer, place: str) -> list[str]:
    """Beginnings of the keys of parts that the layer does without."""
    heads = [f"{place}.attn.{c}" for c in range(layer.channels)]
    found = [] if layer.nodes is not None else [f"{place}.multi_channel.", *(f"{head}.gnn_v." for head in heads)]
    if layer.edges is None:
        found += [f"{place}.mlp.", *(f"{head}.gnn_{which}." for which in "qk" for head in heads)]
    return found


def _linears(linears: Linears, ours: str, theirs: str) -> dict[str, _Source]:
    count = len(linears.linears)
    return {
        f"{ours}.linears.{i}.{n}": _Source(
            [[f"{theirs}.linears.{i}.{n}" if count > 1 else f"{theirs}.linear.{n}"]], True
        )
        for i in range(count)
        for n in _BOTH
    }
