"""Optimisers that torch has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Muon for the matrices inside of a network, AdamW for everything else, as Muon is meant to be used.

    Muon (Jordan et al. 2024) moves a matrix by its momentum made orthogonal. It is for layers that map features to
    features; tables of tokens, output layers, biases, norms and convolutions stay with AdamW. Both are torch's.

    Args:
        params: (name, parameter) pairs, as :class:`~lightning_sgm.methods.GenerativeModule` gives them.
        lr: learning rate of AdamW.
        muon_lr: learning rate of Muon, in the same units: updates are scaled to the root mean square of AdamW's (Liu et
            al. 2025, 2502.16982).
        betas, weight_decay: of AdamW.
        momentum, muon_weight_decay: of Muon.
        adamw: a matrix whose name contains one of these is left to AdamW.

    Raises:
        ValueError: parameters without names, or none for Muon.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        muon_lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        muon_weight_decay: float = 0.0,
        adamw: tuple[str, ...] = ("embed", "output", "head"),
    ) -> None:
        named = list(params)
        if not all(isinstance(entry, tuple) for entry in named):
            raise ValueError("MuonAdamW tells matrices by their names: give it module.named_parameters()")
        hidden = [(name, p) for name, p in named if p.ndim == 2 and not any(part in name for part in adamw)]
        if not hidden:
            raise ValueError("MuonAdamW finds no matrix for Muon in this network: use torch.optim.AdamW")
        chosen = {name for name, _ in hidden}
        rest = [(name, p) for name, p in named if name not in chosen]
        self._parts: list[Optimizer] = [
            Muon(
                hidden,
                lr=muon_lr,
                momentum=momentum,
                weight_decay=muon_weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if rest:
            fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in rest)
            self._parts.append(AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused))
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__([dict(group) for group in groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimiser's groups (whose learning rates schedules change) and state."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the parts, too."""
        return {**super().__getstate__(), "_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of any optimiser; ``load_state_dict`` ends here as well."""
        super().__setstate__(state)
        if len(self._parts) == len(self.param_groups):
            self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: afterwards nobody could say whose the parameters are."""
        if len(self.param_groups) == len(self._parts):
            raise ValueError("MuonAdamW takes all parameters when it is made")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the loss if ``closure`` gives it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def make_optimizer(factory: Callable[[Any], Optimizer], named: list[tuple[str, nn.Parameter]]) -> Optimizer:
    """The optimiser of (name, parameter) pairs.

    Raises:
        ValueError: the factory does not take pairs.
    """
    try:
        optimizer = factory(named)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the optimizer must take (name, parameter) pairs, as torch's do: {error}; a function of yours finds "
            "the parameters by [parameter for _, parameter in pairs]"
        ) from error
    # Lightning refuses to clip for fused optimisers that unscale gradients themselves: let its scaler do that.
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer
