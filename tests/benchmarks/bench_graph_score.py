"""GraphScore against the networks of GDSS written out: padded batches, one channel after the other, all N x N entries.

``OMP_NUM_THREADS=1 python tests/benchmarks/bench_graph_score.py`` prints CPU milliseconds of an evaluation of both
networks, of the network of edges alone, and of an evaluation with its gradients; and the ratios. Weights are random, as
the cost does not depend on them; sizes of graphs are those of the data, where they are present, else drawn alike. The
contestants take turns, so that a busy machine slows all. The goals for the network of edges are ratios of 2
(community), 3 (ego) and 10 (ENZYMES), and 2 with gradients (gdss.md section 8).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sgm.io.released.gdss_weights import from_released
from lightning_sgm.networks.graph_layers import normalise, powers
from lightning_sgm.networks.graph_score import GraphScore

GRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data" / "graphs"


class Arguments(NamedTuple):
    """Those of :class:`GraphScore`, and ``features`` of its spec."""

    features: int
    depth: int = 3
    width: int = 32
    nodes: str = "gcn"
    layers: int = 5
    linears: int = 2
    attention_width: int = 32
    heads: int = 4
    channels: tuple[int, int, int] = (2, 8, 4)
    attention_conv: str = "gcn"

    def network(self, **more: Any) -> GraphScore:
        """The network of these arguments."""
        own = self._asdict()
        return GraphScore({"features": own.pop("features")}, **own, **more)


class Literal:
    """The two networks as the paper's code defines them (gdss.md section 3), on weights named as there.

    Args:
        arguments: of the networks.
        generator: of the weights, which are N(0, 1 / inputs).
        unused: whether there are also the weights that take no part in any answer.
    """

    def __init__(self, arguments: Arguments, generator: torch.Generator, unused: bool = True) -> None:
        self.a, self.generator, self.unused = arguments, generator, unused
        self.state: dict[str, Tensor] = {}
        a = arguments
        if a.nodes == "gcn":
            for i in range(a.depth):
                self._affine(f"x.layers.{i}", a.width if i else a.features, a.width, transposed=True)
        else:
            self._layers("x", a.depth)
        self._mlp("x.final", a.features + a.depth * a.width, 2 * (a.features + a.depth * a.width), a.features, 3)
        self._layers("adj", a.layers)
        total = a.channels[0] + (a.layers - 1) * a.channels[1] + a.channels[2]
        self._mlp("adj.final", total, 2 * total, 1, 3)

    def _affine(self, name: str, first: int, last: int, transposed: bool = False) -> None:
        shape = (first, last) if transposed else (last, first)
        self.state[f"{name}.weight"] = torch.randn(shape, generator=self.generator) / first**0.5
        self.state[f"{name}.bias"] = 0.3 * torch.randn(last, generator=self.generator)

    def _mlp(self, name: str, first: int, hidden: int, last: int, count: int) -> None:
        if count == 1:
            self._affine(f"{name}.linear", first, last)
            return
        for i in range(count):
            self._affine(f"{name}.linears.{i}", hidden if i else first, last if i == count - 1 else hidden)

    def _layers(self, part: str, count: int) -> None:
        a = self.a
        for i in range(count):
            end = i == count - 1
            nodes, edges = not end or part == "x", not end or part == "adj"
            first, last = a.channels[1] if i else a.channels[0], a.channels[2] if end and i else a.channels[1]
            width, attention = a.width if i else a.features, a.attention_width if i else a.width
            place, hidden = f"{part}.layers.{i}", 2 * max(first, last)
            for c in range(first):
                for which in "qk" if edges or self.unused else "":
                    if a.attention_conv == "gcn":
                        self._affine(f"{place}.attn.{c}.gnn_{which}", width, attention, transposed=True)
                    else:
                        self._mlp(f"{place}.attn.{c}.gnn_{which}", width, 2 * attention, attention, 2)
                if nodes or self.unused:
                    self._affine(f"{place}.attn.{c}.gnn_v", width, a.width, transposed=True)
            if edges or self.unused:
                self._mlp(f"{place}.mlp", 2 * first, hidden, last, a.linears)
            if nodes or self.unused:
                self._mlp(f"{place}.multi_channel", first * a.width, hidden, a.width, 2)

    def score_x(self, x: Tensor, adj: Tensor, mask: Tensor) -> Tensor:
        """(B, N, F), from (B, N, F), (B, N, N) and (B, N)."""
        found, channels = [x], self._powers(adj)
        for i in range(self.a.depth):
            if self.a.nodes == "gcn":
                x = torch.tanh(self._convolution(f"x.layers.{i}", x, adj))
            else:
                x, channels = self._layer(f"x.layers.{i}", x, channels, mask)
                x = torch.tanh(x)
            found.append(x)
        return self._apply("x.final", torch.cat(found, -1), F.elu) * mask[:, :, None]

    def score_adj(self, x: Tensor, adj: Tensor, mask: Tensor) -> Tensor:
        """(B, N, N), from the same."""
        channels = self._powers(adj)
        found = [channels]
        for i in range(self.a.layers):
            x, channels = self._layer(f"adj.layers.{i}", x, channels, mask)
            found.append(channels)
        score = self._apply("adj.final", torch.cat(found, 1).movedim(1, -1), F.elu).squeeze(-1)
        return score * (1 - torch.eye(len(score[0]))) * mask[:, None, :] * mask[:, :, None]

    def _powers(self, adj: Tensor) -> Tensor:
        found = [adj]
        for _ in range(self.a.channels[0] - 1):
            found.append(found[-1] @ adj)
        return torch.stack(found, 1)

    def _convolution(self, name: str, x: Tensor, adj: Tensor) -> Tensor:
        loops = adj.clone()
        loops.diagonal(dim1=1, dim2=2).fill_(1)
        scale = loops.sum(-1).clamp(min=1) ** -0.5
        normalised = scale[:, :, None] * loops * scale[:, None, :]
        return normalised @ (x @ self.state[f"{name}.weight"]) + self.state[f"{name}.bias"]

    def _apply(self, name: str, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        if f"{name}.linear.weight" in self.state:
            return F.linear(x, self.state[f"{name}.linear.weight"], self.state[f"{name}.linear.bias"])
        count = sum(key.startswith(f"{name}.linears.") for key in self.state) // 2
        for i in range(count):
            x = activation(x) if i else x
            x = F.linear(x, self.state[f"{name}.linears.{i}.weight"], self.state[f"{name}.linears.{i}.bias"])
        return x

    def _layer(self, place: str, x: Tensor, channels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        maps, values = [], []
        for c in range(channels.shape[1]):
            name, adj = f"{place}.attn.{c}", channels[:, c]
            if f"{name}.gnn_q.weight" in self.state:
                q, k = (self._convolution(f"{name}.gnn_{which}", x, adj) for which in "qk")
                maps.append(self._map(q, k))
            elif f"{name}.gnn_q.linears.0.weight" in self.state:
                q, k = (self._apply(f"{name}.gnn_{which}", x, torch.tanh) for which in "qk")
                maps.append(self._map(q, k))
            if f"{name}.gnn_v.weight" in self.state:
                values.append(self._convolution(f"{name}.gnn_v", x, adj))
        edges = channels
        if maps:
            edges = torch.cat([torch.stack(maps, -1), channels.movedim(1, -1)], -1)
            edges = self._apply(f"{place}.mlp", edges, F.elu).movedim(-1, 1)
            edges = (edges + edges.mT) * mask[:, None, None, :] * mask[:, None, :, None]
        if values:
            x = torch.tanh(self._apply(f"{place}.multi_channel", torch.cat(values, -1), F.elu) * mask[:, :, None])
        return x, edges

    def _map(self, q: Tensor, k: Tensor) -> Tensor:
        heads = self.a.heads
        q, k = (torch.cat(tensor.chunk(heads, -1)) for tensor in (q, k))
        found = torch.tanh(q @ k.mT / self.a.width**0.5).unflatten(0, (heads, -1)).mean(0)
        return (found + found.mT) / 2


def noisy(sizes: Tensor, nodes: int, features: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Masked noise x (B, N, F) and adj (B, N, N), and the mask (B, N) of graphs of these sizes."""
    mask = torch.arange(nodes) < sizes[:, None]
    noise = torch.randn(len(sizes), nodes, nodes, generator=generator).triu(1)
    x = torch.randn(len(sizes), nodes, features, generator=generator) * mask[:, :, None]
    return x, (noise + noise.mT) * mask[:, :, None] * mask[:, None, :], mask


def sizes_of(name: str, count: int, nodes: int) -> Tensor:
    """Sizes like those of a data set, drawn with replacement."""
    rng = np.random.default_rng(0)
    if (file := GRAPHS / f"{name}.npz").is_file():
        return torch.tensor(rng.choice(np.load(file)["num_nodes"], count))
    shares = {"qm9": ([9, 8, 7, 6], [0.83, 0.13, 0.03, 0.01]), "community_small": ([12, 14, 16, 18, 20], [0.2] * 5)}
    if name in shares:
        return torch.tensor(rng.choice(shares[name][0], count, p=shares[name][1]))
    mean = {"zinc250k": 23.2, "enzymes": 33.0}.get(name, nodes / 2.5)
    return torch.tensor(rng.normal(mean, mean / 5, count).round().clip(4, nodes).astype(np.int64))


def edges_only(network: GraphScore, x: Tensor, adj: Tensor, mask: Tensor) -> list[Tensor]:
    """The network of edges alone, in blocks; its answers are left there."""
    plan, weights, found = network._plan(mask), network.adj.prepare(), []
    for block, part, edges in zip(plan.blocks, *plan.split(x, adj), strict=True):
        edges = powers(edges if block.edge_mask is None else edges * block.edge_mask, network.powers, block)
        found.append(network.adj(weights, part, edges, normalise(edges, block), block, None))
    return found


def milliseconds(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU milliseconds of each, taking turns, after a first time that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            if turn:
                found[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def bench(name: str, arguments: Arguments, batch: int, nodes: int, repeats: int) -> None:
    """Print a line for one kind of data."""
    generator = torch.Generator().manual_seed(0)
    literal = Literal(arguments, generator)
    network = arguments.network()
    network.load_state_dict(from_released(literal.state, network))
    x, adj, mask = noisy(sizes_of(name, batch, nodes), nodes, arguments.features, generator)
    state, label, flags = {"x": x, "adj": adj}, torch.ones(batch), mask.float()
    for weight in literal.state.values():
        weight.requires_grad_()

    def ours() -> dict[str, Tensor]:
        return network(state, label, node_mask=mask)

    def theirs() -> dict[str, Tensor]:
        return {"x": literal.score_x(x, adj, flags), "adj": literal.score_adj(x, adj, flags)}

    def backward(answer: dict[str, Tensor]) -> None:
        torch.stack([value.square().sum() for value in answer.values()]).sum().backward()

    with torch.no_grad():
        edges = {"theirs": lambda: literal.score_adj(x, adj, flags), "ours": lambda: edges_only(network, x, adj, mask)}
        spent = {"edges": milliseconds(edges, repeats), "both": milliseconds({"theirs": theirs, "ours": ours}, repeats)}
        worst = max(float((a - b).abs().max()) for a, b in zip(ours().values(), theirs().values(), strict=True))
    training = {"theirs": lambda: backward(theirs()), "ours": lambda: backward(ours())}
    spent["with gradients"] = milliseconds(training, max(2, repeats // 2))
    columns = [
        f"{key} {ms['theirs']:7.1f} / {ms['ours']:6.1f} = {ms['theirs'] / ms['ours']:5.2f}" for key, ms in spent.items()
    ]
    print(f"{name:<16} B={batch:<4} {'   '.join(columns)}   largest difference {worst:.1e}", flush=True)


CASES = {
    "community_small": (Arguments(10), 128, 20),
    "ego_small": (Arguments(17, depth=2), 128, 18),
    "enzymes": (Arguments(10, depth=5, layers=7), 16, 125),
    "qm9": (Arguments(4, depth=2, width=16, layers=3, linears=3, attention_width=16), 500, 9),
    "zinc250k": (Arguments(9, depth=2, width=16, layers=6, linears=3, attention_width=16), 64, 38),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    for name in options.data:
        bench(name, *CASES[name], options.repeats)


if __name__ == "__main__":
    main()
