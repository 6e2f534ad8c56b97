"""What ``test`` says of a masked model's likelihood: its bound by several estimators, on several corpora."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.metrics.likelihood import TokenLikelihood
from lightning_sgm.objectives.masked import MaskedLoss, MaskedObjective

if TYPE_CHECKING:
    from lightning_sgm.methods.base import Batch, GenerativeModule


class BoundTest(nn.Module):
    """Collects the bound on the likelihood of test sequences, on all processes.

    Args:
        objective: the model's own, by whose loss the numbers without a name are.
        losses: further losses by which to estimate the same bound; their numbers bear their names.
        passes: repeated passes over the data, each with other masks; from them come the standard errors.

    Raises:
        ValueError: ``passes`` below 1.
    """

    def __init__(self, objective: MaskedObjective, losses: list[MaskedLoss], passes: int) -> None:
        super().__init__()
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        self.passes = passes
        self.objectives = {"": objective}
        for loss in losses:
            if loss != objective.loss:
                self.objectives[loss] = MaskedObjective(loss, objective.stratification, objective.t_min)
        self._found: dict[str, TokenLikelihood] = {}

    def begin(self, corpora: dict[str, float | None], device: torch.device) -> None:
        """Forget everything; make ready for corpora by name, with their bytes per token (None if unknown).

        All processes do the same, in the same order: some may get no batch of a small corpus, but all add up.
        """
        self._found = {
            "/".join(filter(None, (corpus, name))): TokenLikelihood(per_token).to(device)
            for corpus, per_token in corpora.items()
            for name in self.objectives
        }

    def update(self, module: GenerativeModule, denoiser: TokenDenoiser, batch: Batch, corpus: str) -> None:
        """Add all passes of a batch of ``corpus``."""
        conditions = module.conditions(batch)
        for name, objective in self.objectives.items():
            key = "/".join(filter(None, (corpus, name)))
            for repeat in range(self.passes):
                draw = module.evaluation_draw(batch, repeat)
                nll, control = objective.evaluate(denoiser, batch["x"], draw, **conditions)
                self._found[key].update(nll, batch["index"], batch["x"].shape[1], control)

    def compute(self) -> dict[str, Tensor]:
        """Numbers of :class:`~lightning_sgm.metrics.TokenLikelihood`, as [CORPUS/][LOSS/]NUMBER."""
        return {
            "/".join(filter(None, (key, name))): value
            for key, likelihood in self._found.items()
            for name, value in likelihood.compute().items()
        }
