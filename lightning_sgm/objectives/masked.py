"""The four losses of absorbing diffusion, which are one (Ou et al. 2024, 2406.03736, sections 3.2 and 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.processes.absorbing import AbsorbingProcess
from lightning_sgm.random import Draw

MaskedLoss = Literal["t_DSE", "t_DCE", "lambda_DCE", "k_DCE"]
Stratification = Literal["stratified", "offset", "independent"]

_LOSSES = ("t_DSE", "t_DCE", "lambda_DCE", "k_DCE")
_STRATIFICATIONS = ("stratified", "offset", "independent")


@dataclass(frozen=True)
class Masking:
    """How much of each sequence is masked, and what that is worth; all (B,) on the device of the draw.

    Attributes:
        probability: chance of each token to be masked, float64 in (0, 1]; None where ``count`` is given.
        count: number of masked tokens, int64 in 1 .. L; None where ``probability`` is given.
        weight: of the summed negative log-likelihoods of the masked tokens, float64.
        constant: added to the loss for each masked token, float64; None for nothing.
    """

    probability: Tensor | None
    count: Tensor | None
    weight: Tensor
    constant: Tensor | None = None


class MaskedObjective:
    """Any-order negative log-likelihood of tokens, an upper bound of -ln p(x0), by one of its four estimators.

    With n_i = -ln c(x_t)[i, x0_i] at the masked positions i, one draw is worth (radd.md 2.3):

    - ``t_DSE``: t ~ U(1e-3, 1), each token masked with probability lambda(t); sigma / (e^S - 1) * sum n_i. (Score
      entropy collapses to this because the network's probabilities sum to one.)
    - ``t_DCE``: same draw; sigma / (e^S - 1) * sum (n_i + ln(e^S - 1)). The second term has no gradient and, over
      all times, no mean: it only makes the reported number noisier. ``nll`` is the loss without it.
    - ``lambda_DCE``: lambda ~ U(0, 1], each token masked with probability lambda; 1 / lambda * sum n_i. Its variance is
      infinite (E[1 / lambda]), harmless in training.
    - ``k_DCE``: k ~ U{1 .. L}, exactly k tokens masked; L / k * sum n_i. The least noisy one.

    All four have the same expectation, but for the times below 1e-3 and the tokens still visible at t = 1.
    A freshly built network with a zero head scores ln V.

    Args:
        loss: the estimator.
        stratification: law of the B uniform numbers behind t, lambda or k in a batch, each of them uniform by itself.
            "stratified": one in each of B equal cells, cells dealt to the sequences at random (0.31 of the variance of
            independent lambda draws on a trained model); "offset": equally spaced with a shared random start;
            "independent". A draw with keys (exact mode), where no row may depend on its batch, spreads its keys evenly
            instead, see ``Draw.strata``.
        t_min: smallest time of the t losses, in (0, 1): their weight is infinite at 0.
    """

    def __init__(
        self, loss: MaskedLoss = "k_DCE", stratification: Stratification = "stratified", t_min: float = 1e-3
    ) -> None:
        if loss not in _LOSSES:
            raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {loss!r}")
        if stratification not in _STRATIFICATIONS:
            raise ValueError(f"stratification must be one of {', '.join(_STRATIFICATIONS)}, got {stratification!r}")
        if not 0 < t_min < 1:
            raise ValueError(f"t_min must lie strictly between 0 and 1, got {t_min}")
        self.loss: MaskedLoss = loss
        self.stratification: Stratification = stratification
        self.t_min = t_min

    def __call__(self, denoiser: TokenDenoiser, x0: Tensor, draw: Draw, **conditions: Tensor) -> dict[str, Tensor]:
        """Losses per sequence.

        Args:
            denoiser: its network sees the masked sequence and answers only at the masked positions.
            x0: (B, L) int64 real tokens, without masks.
            draw: source of the masks. On the CPU, where masked positions are counted without waiting for a GPU.
            conditions: passed on to the network.

        Returns:
            "loss" (B,) float32, nats per sequence: what the paper minimises, and the scale at which its gradient clip
            of 1 and Adam's epsilon mean what they do there.
            "nll" (B,), nats per token, without the second term of ``t_DCE``.
        """
        masking, mask = self._mask(denoiser, x0, draw)
        total = masked_nll(denoiser, x0, mask, **conditions)
        loss = total * _send(masking.weight, total)
        terms = {"loss": loss, "nll": loss / x0.shape[1]}
        if masking.constant is not None:
            terms["loss"] = loss + _send(masking.constant * mask.sum(1), total)
        return terms

    def evaluate(self, denoiser: TokenDenoiser, x0: Tensor, draw: Draw, **conditions: Tensor) -> tuple[Tensor, Tensor]:
        """One estimate of the bound, with a number by which it can be made less noisy.

        Where tokens are masked one by one, their count scatters, and a count above its mean lambda L makes the estimate
        too large by about what a token costs. The second number, weight * (count - lambda L) / L, has the mean 0 at
        every lambda whatever the model (a control variate): any multiple of it may be subtracted.

        Args:
            denoiser, x0, draw, conditions: as in a call.

        Returns:
            (B,) nats per token, the "nll" of a call with the same draw, and (B,) the control, 0 for ``k_DCE``.
        """
        masking, mask = self._mask(denoiser, x0, draw)
        length = x0.shape[1]
        total = masked_nll(denoiser, x0, mask, **conditions)
        control = torch.zeros_like(masking.weight)
        if masking.probability is not None:
            control = masking.weight * (mask.sum(1) - masking.probability * length) / length
        return total * _send(masking.weight, total) / length, control.to(total.device)

    def _mask(self, denoiser: TokenDenoiser, x0: Tensor, draw: Draw) -> tuple[Masking, Tensor]:
        """How much is masked and what it is worth, and the mask (B, L)."""
        rows, length = x0.shape
        masking = self.draw_masking(denoiser.process, rows, length, draw)
        # Only the shape of the first argument matters, as x0 holds no mask; its values are on the network's device.
        blank = torch.zeros(rows, length, dtype=torch.int64, device=draw.device)
        return masking, denoiser.process.mask(blank, denoiser.mask_id, draw, masking.probability, masking.count)

    def draw_masking(self, process: AbsorbingProcess, rows: int, length: int, draw: Draw) -> Masking:
        """Draw how much to mask in each of ``rows`` sequences of ``length`` tokens, with the weights of the loss."""
        u = self.draw_uniform(rows, draw)
        if self.loss == "k_DCE":
            count = torch.ceil(u * length).long()
            return Masking(None, count, length / count.double())
        if self.loss == "lambda_DCE":
            return Masking(u, None, 1.0 / u)
        t = self.t_min + (1.0 - self.t_min) * u
        weight = process.reveal_rate(t)
        constant = weight * torch.log(torch.expm1(process.integral(t))) if self.loss == "t_DCE" else None
        return Masking(process.mask_probability(t), None, weight, constant)

    def draw_uniform(self, rows: int, draw: Draw) -> Tensor:
        """(rows,) float64 numbers, each uniform in (0, 1], never 0, jointly distributed as ``stratification`` says."""
        if self.stratification == "independent":
            return 1.0 - draw.uniform((rows,), torch.float64)
        if self.stratification == "offset" and draw.keys is None:
            cells = torch.arange(rows, dtype=torch.float64, device=draw.device)
            return 1.0 - (draw.uniform((1,), torch.float64) + cells / rows) % 1.0
        # Dealt at random: were sequence j always in cell j, averages over draws would not converge to the batch's NLL.
        return 1.0 - draw.strata(rows)


def nll_by_masked_fraction(
    denoiser: TokenDenoiser, x0: Tensor, draw: Draw, fractions: Tensor, **conditions: Tensor
) -> Tensor:
    """Mean -ln c(x_t)[i, x0_i] of a masked token at given masked fractions, (n,) float64 nats.

    Args:
        denoiser: answers only at the masked positions.
        x0: (B, L) int64 real tokens, all of them masked in each fraction.
        draw: source of the masks.
        fractions: (n,) in (0, 1]; the nearest number of tokens, at least one, is masked in each sequence.
        conditions: passed on to the network.
    """
    rows, length = x0.shape
    blank = torch.zeros(rows, length, dtype=torch.int64, device=draw.device)
    means = []
    for count in (fractions * length).round().long().clamp(1, length).tolist():
        mask = denoiser.process.mask(blank, denoiser.mask_id, draw, count=torch.full((rows,), count))
        means.append(masked_nll(denoiser, x0, mask, **conditions).double().mean() / count)
    return torch.stack(means)


def masked_nll(denoiser: TokenDenoiser, x0: Tensor, mask: Tensor, **conditions: Tensor) -> Tensor:
    """Summed -ln c(x_t)[i, x0_i] over the masked positions i of each sequence, (B,) float32 nats.

    Args:
        denoiser: answers only at the masked positions.
        x0: (B, L) int64 real tokens.
        mask: (B, L) bool; on the CPU no device has to be waited for.
        conditions: passed on to the network.
    """
    positions = _send(mask.flatten().nonzero().squeeze(1), x0)
    noisy = x0.masked_fill(mask.to(x0.device, non_blocking=True), denoiser.mask_id)
    logits = denoiser.logits(noisy, positions, **conditions).float()
    nll = F.cross_entropy(logits, x0.flatten().index_select(0, positions), reduction="none")
    # Scatter and a dense sum, not index_add: its order of summation changes from run to run on a GPU.
    return nll.new_zeros(x0.numel()).scatter(0, positions, nll).view_as(x0).sum(1)


def _send(values: Tensor, like: Tensor) -> Tensor:
    """``values`` with type and device of ``like``, converted first and sent without waiting for the device."""
    return values.to(like.dtype).to(like.device, non_blocking=True)
