"""A law of graphs that is known at all noise levels: the joint Gaussian of a graph's node feature and edges."""

from typing import Any

import torch

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.graph import symmetric

NODES = 3


class GaussianGraphs(BaseDenoiser):
    """The exact joint denoiser of graphs with 3 nodes, whose feature (3,) and edges (3,) are N(mean, covariance).

    The two components have noise of their own; the posterior mean of all six numbers is linear in the six noisy ones.
    """

    def __init__(self, process, mean, covariance):
        self.process: Any = process
        self.mean, self.covariance = mean, covariance

    def x0(self, x, t, **conditions):
        levels = [self.process[name].level(t) for name in ("x", "adj")]
        alpha, sigma = (
            torch.stack([getattr(level, key) for level in levels]).repeat_interleave(3) for key in ("alpha", "sigma")
        )
        noisy = alpha[:, None] * self.covariance * alpha + torch.diag(sigma**2)
        gain = self.covariance * alpha @ torch.linalg.inv(noisy)
        found = self.mean + (flat(x) - alpha * self.mean) @ gain.T
        return graph(found)


def flat(state):
    """(B, 6) float64: the features of the nodes, then the edges 01, 02, 12."""
    row, column = torch.tril_indices(NODES, NODES, -1)
    return torch.cat([state["x"][:, :, 0], state["adj"][:, row, column]], 1).double()


def graph(values):
    """The other way."""
    return {"x": values[:, :3, None], "adj": symmetric(values[:, 3:], NODES)}


def law():
    """Mean (6,) and covariance (6, 6) with correlations between nodes and edges."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    mean = torch.tensor([0.5, -0.3, 0.2, 0.8, 0.1, -0.4], dtype=torch.float64)
    return mean, mixing @ mixing.T / 6 + 0.05 * torch.eye(6).double()
