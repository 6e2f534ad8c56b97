"""Denoisers of residuals r_t = x_t - y, for networks that see images and not residuals (ResShift).

With :class:`~lightning_sgm.denoiser.EDMPreconditioning` at the residuals' standard deviation, a network that sees
residuals needs nothing from here: zero at first, it then makes :class:`~lightning_sgm.denoiser.Denoiser` the Wiener
estimate: hardly more than y at t = 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_sgm.denoiser import Denoiser, Label, Preconditioning
from lightning_sgm.processes.gaussian import GaussianProcess, Level

Output = Literal["xstart", "residual", "epsilon", "epsilon_scale"]
Scaling = Literal["latent", "pixel", "none"]


class ResShiftPreconditioning(Preconditioning):
    """What ResShift's networks see and say (Yue et al. 2023, 2307.12348, and their code).

    The network sees the scaled image x_t = r_t + y, not the residual. Its answer is, in the names of their code:

    * "xstart": x_0, as in all released models;
    * "residual": y - x_0;
    * "epsilon": the noise;
    * "epsilon_scale": the noise times sigma = kappa sqrt(eta).

    Args:
        output: what the network says.
        scaling: the network sees x_t over sqrt(sigma^2 + 1), for a "latent" x of unit variance, or over 3 sigma + 1,
            for a "pixel" in [-1, 1], or as it is, "none".
        label: see :class:`~lightning_sgm.denoiser.Preconditioning`; "index" by default.
    """

    default_label: Label = "index"

    def __init__(self, output: Output = "xstart", scaling: Scaling = "latent", label: Label | None = None) -> None:
        if output not in ("xstart", "residual", "epsilon", "epsilon_scale"):
            raise ValueError(f"output must be xstart, residual, epsilon or epsilon_scale, got {output!r}")
        if scaling not in ("latent", "pixel", "none"):
            raise ValueError(f"scaling must be latent, pixel or none, got {scaling!r}")
        super().__init__("x0" if output in ("xstart", "residual") else "noise", label)
        self.output: Output = output
        self.scaling: Scaling = scaling

    def scales(self, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """(c_in, 0, c_out): the prediction, r_0 or eps, is c_out times the network's answer (less y for "xstart")."""
        one = torch.ones_like(level.t)
        if self.scaling == "latent":
            c_in = torch.rsqrt(level.sigma**2 + 1.0)
        else:
            c_in = 1.0 / (3.0 * level.sigma + 1.0) if self.scaling == "pixel" else one
        c_out = {"residual": -one, "epsilon_scale": 1.0 / level.sigma}.get(self.output, one)
        return c_in, torch.zeros_like(one), c_out


class ResidualDenoiser(Denoiser):
    """A network that answers about residuals, under any preconditioning.

    States and answers are residuals: ``x0`` is x_0 - y, and ``noise`` is (x_t - (1 - eta) x_0 - eta y) / sigma. Under a
    :class:`ResShiftPreconditioning` it wants the condition ``origin`` (B, *), shaped like the state: y, the degraded
    image in the space of the model. The network is given it only if it asks for it too, beside or instead of the
    degraded image as it came, ``low``.

    Args:
        network: see :class:`~lightning_sgm.denoiser.Denoiser`.
        process: of the residuals.
        preconditioning: what the network sees and says.
    """

    def __init__(
        self,
        network: nn.Module,
        process: GaussianProcess,
        preconditioning: Preconditioning = ResShiftPreconditioning(),
    ) -> None:
        super().__init__(network, process, preconditioning)
        self._asked = self.conditions
        if isinstance(preconditioning, ResShiftPreconditioning):
            self.conditions = with_origin(self.conditions)

    def _output(self, x: Tensor, level: Level, conditions: dict[str, Tensor]) -> Tensor:
        output = super()._output(x, level, conditions)
        kind = self.preconditioning
        says_image = isinstance(kind, ResShiftPreconditioning) and kind.output == "xstart"
        return output - conditions["origin"] if says_image else output

    def _inputs(
        self, x: Tensor, level: Level, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if isinstance(self.preconditioning, ResShiftPreconditioning):
            x = x + origin_of(conditions, "ResidualDenoiser")
        given = {name: value for name, value in conditions.items() if name != "origin" or "origin" in self._asked}
        return super()._inputs(x, level, given)


def with_origin(conditions: tuple[str, ...]) -> tuple[str, ...]:
    """The names of conditions with "origin" among them."""
    return conditions if "origin" in conditions else (*conditions, "origin")


def origin_of(conditions: dict[str, Tensor], user: str) -> Tensor:
    """The degraded image (B, *), or a ValueError that names the ``user`` who misses it."""
    if "origin" not in conditions:
        raise ValueError(f"{user} needs the condition origin, the degraded image that residuals are counted from")
    return conditions["origin"]
