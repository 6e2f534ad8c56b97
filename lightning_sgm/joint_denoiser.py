"""The denoiser of a state of several components that diffuse together under one time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgm.denoiser import BaseDenoiser, Preconditioning, Prediction, answer_scales
from lightning_sgm.processes.gaussian import GaussianProcess, Time, as_time, match

State = dict[str, Tensor]


class JointDenoiser(BaseDenoiser):
    """One network that sees all components and predicts something for each: the partial scores of Jo et al. 2022.

    Answers and states are dicts of tensors (B, *), one per component. Both networks of a pair are asked at once.

    Args:
        network: called as network(state, label, **conditions) with label (B,), gives a dict like the state.
        process: of each component.
        preconditioning: what is predicted for each; the label is made by that of the first.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Mapping[str, GaussianProcess],
        preconditioning: Mapping[str, Preconditioning],
    ) -> None:
        self.network = network
        self.process: Any = process
        self.preconditioning = dict(preconditioning)
        self.conditions = tuple(getattr(network, "conditions", ()))

    def x0(self, x: Any, t: Time, **conditions: Tensor) -> Any:
        """E[x_0 | x_t] of each component."""
        return self._answer("x0", x, t, conditions)

    def noise(self, x: Any, t: Time, **conditions: Tensor) -> Any:
        """E[eps | x_t] of each component."""
        return self._answer("noise", x, t, conditions)

    def score(self, x: Any, t: Time, **conditions: Tensor) -> Any:
        """The partial scores: gradient of ln p_t(state) with respect to each component."""
        return self._answer("score", x, t, conditions)

    def velocity(self, x: Any, t: Time, **conditions: Tensor) -> Any:
        """dx/dt of the joint probability-flow ODE, by component."""
        return self._answer("velocity", x, t, conditions)

    def _answer(self, quantity: Prediction, x: State, t: Time, conditions: dict[str, Tensor]) -> State:
        first = next(iter(x))
        time = as_time(t, x[first].device)
        levels = {name: process.level(time) for name, process in self.process.items()}
        scaled = {
            name: match(self.preconditioning[name].scales(levels[name])[0], part) * part for name, part in x.items()
        }
        label = self.preconditioning[first].label(levels[first], self.process[first])
        label = label.to(torch.promote_types(x[first].dtype, torch.float32)).expand(len(x[first]))
        output = self.network(scaled, label, **conditions)
        found: State = {}
        for name, part in x.items():
            from_x, from_output = answer_scales(quantity, self.preconditioning[name], levels[name], self.process[name])
            found[name] = match(from_x, part) * part + match(from_output, part) * output[name].to(part.dtype)
        return found
