"""TimeGAN's recurrent networks, many of them trained at once: one batched product serves all."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sgm.random import Draw

BATCH = 128  # examples of each pool in a batch
_CHUNK = 100  # iterations whose batches are drawn at once
_SECONDS = 15.0  # between two lines of progress


class RecurrentNetworks:
    """R separate networks of TensorFlow's GRU cell and a linear layer.

    The cell: [r, u] = sigmoid([x, h] W + b), c = tanh([x, r h] V + d), h' = u h + (1 - u) c. The reset comes before the
    product, unlike torch.nn.GRU. Kernels are Glorot-uniform, b = 1, all other biases 0.

    Args:
        networks: R.
        inputs: D, numbers per time step.
        hidden: H, width of the state.
        draw: source of the initial values.
        device: of the parameters.

    Attributes:
        parameters: gate and candidate kernels (R, D + H, 2 H) and (R, D + H, H), output kernel (R, H, 1), each followed
            by its bias (R, 1, .); float32.
    """

    def __init__(self, networks: int, inputs: int, hidden: int, draw: Draw, device: torch.device) -> None:
        self.inputs = inputs
        self.parameters: list[Tensor] = []
        for rows, columns, bias in (
            (inputs + hidden, 2 * hidden, 1.0),
            (inputs + hidden, hidden, 0.0),
            (hidden, 1, 0.0),
        ):
            kernel = (2 * draw.uniform((networks, rows, columns)) - 1) * (6 / (rows + columns)) ** 0.5
            self.parameters += [kernel.to(device), torch.full((networks, 1, columns), bias, device=device)]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def states(self, x: Tensor) -> Tensor:
        """The states after each time step, (L, R, H, B), of sequences (L, R, D, B); the first state is 0."""
        gate, gate_bias, candidate, candidate_bias = (parameter.mT for parameter in self.parameters[:4])
        # What the inputs contribute, for all times in one product. The batch is the last axis: hidden sizes are small,
        # and products with a long last axis are several times faster.
        to_gate = gate[:, :, : self.inputs] @ x + gate_bias
        to_candidate = candidate[:, :, : self.inputs] @ x + candidate_bias
        gate_state, candidate_state = gate[:, :, self.inputs :], candidate[:, :, self.inputs :]
        h = torch.zeros_like(to_candidate[0])
        states = []
        for from_gate, from_candidate in zip(to_gate, to_candidate, strict=True):
            reset, keep = torch.baddbmm(from_gate, gate_state, h).sigmoid().chunk(2, 1)
            new = torch.baddbmm(from_candidate, candidate_state, reset * h).tanh()
            h = torch.lerp(new, h, keep)
            states.append(h)
        return torch.stack(states)

    def outputs(self, states: Tensor) -> Tensor:
        """The linear layer, (*, R, B), of states (*, R, H, B)."""
        kernel, bias = (parameter.mT for parameter in self.parameters[4:])
        return (kernel @ states + bias).squeeze(-2)


def sequences(windows: Tensor, rows: Tensor) -> Tensor:
    """The windows (N, L, D) of the indices ``rows`` (R, B) as ``RecurrentNetworks`` takes them, (L, R, D, B)."""
    return windows[rows.to(windows.device)].permute(2, 0, 3, 1).contiguous()


def distinct(draw: Draw, high: int, count: int, rows: int) -> Tensor:
    """Rows (rows, count) of different integers in [0, high), count <= high, every choice as likely as any other."""
    if high <= 4 * count:
        return draw.uniform((rows, high), torch.float64).argsort(1)[:, :count]
    # The first ``count`` different ones of a longer row: cheaper than to permute all. That there are fewer has a
    # probability below 1e-20 for the 128 used here.
    drawn = draw.integers(high, (rows, 2 * count))
    values, places = drawn.sort(dim=1, stable=True)
    again = torch.zeros_like(values, dtype=torch.bool)
    again[:, 1:] = values[:, 1:] == values[:, :-1]
    first = (places + again * 2 * count).sort(1).values[:, :count]
    return drawn.gather(1, first)


def train(
    parameters: list[Tensor],
    loss: Callable[[list[Tensor]], Tensor],
    pools: list[list[Tensor]],
    iterations: int,
    draw: Draw,
    title: str,
) -> None:
    """Minimise ``loss`` by Adam (learning rate 1e-3), showing progress where it takes long.

    Args:
        parameters: what is trained, in place.
        loss: from the batches, one (R, n) tensor of indices per kind of example, to a scalar: the SUM over networks,
            whose gradients are then each network's own.
        pools: for each kind of example the R index tensors (int64, on the CPU) that the networks draw batches from:
            ``BATCH`` different ones, or all that the smallest pool has.
        iterations: number of steps.
        draw: source of the batches.
        title: begins the lines of progress.
    """
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-8)
    began = said = time.monotonic()
    for start in range(0, iterations, _CHUNK):
        steps = min(_CHUNK, iterations - start)
        batches = [_batches(kind, steps, draw).to(device) for kind in pools]
        for step in range(steps):
            optimizer.zero_grad()
            loss([batch[:, step] for batch in batches]).backward()
            optimizer.step()
        now = time.monotonic()
        if now - said > _SECONDS:
            said, done = now, start + steps
            left = (now - began) * (iterations - done) / done
            rank_zero_info(f"{title}: {done} of {iterations} iterations, about {left:.0f} s left")


def _batches(pools: list[Tensor], steps: int, draw: Draw) -> Tensor:
    """(R, steps, n) indices from R pools."""
    count = min(BATCH, *map(len, pools))
    return torch.stack([pool[distinct(draw, len(pool), count, steps)] for pool in pools])
