"""What restoration asks of samplers: few steps that begin at a chain's last index, and a way back to the noise.

Their deterministic step (SinSR, Wang et al. 2024, 2311.14760) is :class:`~lightning_sgm.samplers.rules.Euler` on
residuals and needs no rule of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.chains import as_chain
from lightning_sgm.processes.gaussian import GaussianProcess
from lightning_sgm.samplers.evaluation import Evaluation, Levels, is_clean, per_component
from lightning_sgm.samplers.grids import Grid
from lightning_sgm.samplers.rules import euler


class TrailingChain(Grid):
    """N of a chain's T indices, ceil(k T / N) - 1 for k = N .. 1: equal steps from the last index to no noise.

    Where :class:`~lightning_sgm.samplers.grids.ChainGrid` always visits index 0, which has hardly any noise, the step
    to no noise is here as long as all others: the better choice for few steps. 4 of 15 are {14, 11, 7, 3}, as in
    TAD-SR (He et al. 2024, 2408.07476); all of them are the same in both grids.
    """

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """Times of ``steps`` + 1 indices, for as many steps of a sampler with finish "clean".

        Raises:
            ValueError: the process is no discrete chain, or has not so many indices.
        """
        chain = as_chain(process, "TrailingChain")
        count = steps + 1
        if count > chain.steps:
            raise ValueError(
                f"TrailingChain cannot visit {count} levels of a chain of {chain.steps}: a sampler with finish clean "
                f"has at most {chain.steps} steps, one with finish mean or state one fewer"
            )
        return torch.stack([chain.time(-(-k * chain.steps // count) - 1) for k in range(count, 0, -1)])


def invert(denoiser: BaseDenoiser, x: Any, levels: list[Levels], **conditions: Tensor) -> Any:
    """The state at the first of ``levels`` from which Euler's sampler comes to ``x`` (the inverse of DDIM).

    Each step asks for x_0 at its noisier level, as the step that it undoes did, but about the state that it has: it is
    exact where the answer does not depend on the state.

    Args:
        denoiser: the model.
        x: state (B, *) at the last noisy level, or a dict of them.
        levels: noisiest first, as :meth:`~lightning_sgm.samplers.loop.Sampler.levels` gives them. A clean one at the
            end is left out: data without noise do not say which noise they came from.
        conditions: passed to the denoiser.
    """
    evaluate = Evaluation(denoiser, conditions)
    noisy = [level for level in levels if not is_clean(level)]
    for level, noisier in pairwise(reversed(noisy)):
        x = per_component(euler, x, evaluate(x, noisier), level, noisier)
    return x
