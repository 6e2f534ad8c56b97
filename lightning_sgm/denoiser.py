"""Denoisers: what samplers, likelihoods and guidance see of a model.

A denoiser answers x0, noise, score and velocity for a noisy state. A network becomes one through a process and a
:class:`Preconditioning`; the exact denoiser of a Gaussian mixture is one without a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_sgm.processes.absorbing import AbsorbingProcess
from lightning_sgm.processes.chains import as_chain
from lightning_sgm.processes.gaussian import GaussianProcess, Level, Time, as_time, match

Prediction = Literal["noise", "x0", "score", "scaled_score", "v", "velocity"]
Label = Literal["time", "log_ratio", "sigma", "log_half_sigma", "index"]

# Each prediction as (p, q): prediction = p x_0 + q eps. All conversions follow from this table, see Denoiser.
_MIXTURES: dict[str, Callable[[Level, GaussianProcess], tuple[Tensor, Tensor]]] = {
    "noise": lambda level, process: (torch.zeros_like(level.t), torch.ones_like(level.t)),
    "x0": lambda level, process: (torch.ones_like(level.t), torch.zeros_like(level.t)),
    "score": lambda level, process: (torch.zeros_like(level.t), -1.0 / level.sigma),
    "scaled_score": lambda level, process: (torch.zeros_like(level.t), -torch.ones_like(level.t)),
    "v": lambda level, process: (-level.sigma, level.alpha),
    "velocity": lambda level, process: process.derivatives(level.t),
}
_LABELS: dict[str, Callable[[Level, GaussianProcess], Tensor]] = {
    "time": lambda level, process: 999.0 * level.t,
    "log_ratio": lambda level, process: 0.25 * torch.log(level.ratio.clamp(1e-20, 1e20)),
    "sigma": lambda level, process: level.sigma,
    "log_half_sigma": lambda level, process: torch.log(0.5 * level.sigma),
    "index": lambda level, process: as_chain(process, "the label index").label(level.t),
}


class Preconditioning:
    """What the network is asked for and how it is told the noise level.

    Args:
        prediction: "noise" (Ho et al. 2020), "x0", "score" (Song et al. 2021), "scaled_score" = sigma score = -eps
            (their NCSN++, whose output is then divided by sigma), "v" = alpha eps - sigma x_0 (Salimans and Ho 2022),
            "velocity" = dx/dt along the path (flow matching).
        label: "time" 999 t, "log_ratio" ln(sigma / alpha) / 4 (Karras et al. 2022), "sigma", "log_half_sigma"
            ln(sigma / 2) (their NCSN++, which counts sigma in images of [0, 1]), "index" of a discrete chain; None for
            the class's own, "time" here. (A named default would follow from one class to another when a recipe changes
            the class.)
    """

    default_label: Label = "time"

    def __init__(self, prediction: Prediction = "noise", label: Label | None = None) -> None:
        label = label or self.default_label
        if prediction not in _MIXTURES or label not in _LABELS:
            raise ValueError(
                f"prediction must be one of {', '.join(_MIXTURES)} and label one of {', '.join(_LABELS)}, "
                f"got {prediction!r} and {label!r}"
            )
        self.prediction: Prediction = prediction
        self.label_kind: Label = label

    def mixture(self, level: Level, process: GaussianProcess) -> tuple[Tensor, Tensor]:
        """(p, q) of the prediction, shapes of ``level``."""
        return _MIXTURES[self.prediction](level, process)

    def label(self, level: Level, process: GaussianProcess) -> Tensor:
        """The network's own name of the level, shape of ``level``."""
        return _LABELS[self.label_kind](level, process)

    def scales(self, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """(c_in, c_skip, c_out): prediction = c_skip x + c_out network(c_in x, label)."""
        one = torch.ones_like(level.t)
        return one, torch.zeros_like(one), one


class EDMPreconditioning(Preconditioning):
    """x_0 prediction with unit variance inputs and targets at every level (Karras et al. 2022, table 1).

    Written for any (alpha, sigma): their formulas in y = x / alpha at noise sigma / alpha, finite at alpha = 0.

    Args:
        sigma_data: standard deviation of the data.
        label: see :class:`Preconditioning`; "log_ratio" by default.
    """

    default_label: Label = "log_ratio"

    def __init__(self, sigma_data: float = 0.5, label: Label | None = None) -> None:
        super().__init__("x0", label)
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def scales(self, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """(c_in, c_skip, c_out) with total = sqrt(sigma^2 + alpha^2 sigma_data^2)."""
        total2 = level.sigma**2 + (level.alpha * self.sigma_data) ** 2
        total = torch.sqrt(total2)
        return 1.0 / total, level.alpha * self.sigma_data**2 / total2, level.sigma * self.sigma_data / total


class BaseDenoiser:
    """Anything that estimates x_0 from (x_t, t); the other quantities follow.

    Args:
        process: the Gaussian process of x_t.

    Attributes:
        conditions: names of the conditions it wants.
        classes: K where it wants a class ``label`` in 0 .. K - 1, or K for none; 0 where that is not known.
        cost: network evaluations that its latest answer took, per row asked.
    """

    conditions: tuple[str, ...] = ()
    classes: int = 0
    cost: int = 1

    def __init__(self, process: GaussianProcess) -> None:
        self.process = process

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """E[x_0 | x_t] for x of shape (B, *) and t of shape () or (B,)."""
        raise NotImplementedError

    def noise(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """E[eps | x_t]."""
        level = self.process.level(t, x.device)
        return (x - match(level.alpha, x) * self.x0(x, t, **conditions)) / match(level.sigma, x)

    def score(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """Gradient of ln p_t at x: -E[eps | x_t] / sigma."""
        return -self.noise(x, t, **conditions) / match(self.process.level(t, x.device).sigma, x)

    def velocity(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE: alpha' x_0 + sigma' eps."""
        level = self.process.level(t, x.device)
        d_alpha, d_sigma = self.process.derivatives(level.t)
        x0 = self.x0(x, t, **conditions)
        noise = (x - match(level.alpha, x) * x0) / match(level.sigma, x)
        return match(d_alpha, x) * x0 + match(d_sigma, x) * noise


class Denoiser(BaseDenoiser):
    """A network, the process of its inputs and what it predicts.

    A plain object, not a module: it holds a reference to a network that belongs to a method.

    Args:
        network: called as network(x, label, **conditions) with label of shape (B,), see networks/base.py.
        process: the Gaussian process.
        preconditioning: what the network predicts.
    """

    def __init__(self, network: nn.Module, process: GaussianProcess, preconditioning: Preconditioning) -> None:
        super().__init__(process)
        if preconditioning.label_kind == "index":
            as_chain(process, "the label index")
        preconditioning.scales(process.level(1.0))  # one that has none is told before training
        self.network = network
        self.preconditioning = preconditioning
        self.conditions = tuple(getattr(network, "conditions", ()))
        self.classes = int(getattr(network, "classes", 0))

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """E[x_0 | x_t]; infinite at alpha = 0 if noise or score is predicted."""
        return self._answer("x0", x, t, conditions)

    def noise(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """E[eps | x_t]."""
        return self._answer("noise", x, t, conditions)

    def velocity(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE."""
        return self._answer("velocity", x, t, conditions)

    def _answer(self, quantity: Prediction, x: Tensor, t: Time, conditions: dict[str, Tensor]) -> Tensor:
        level = self.process.level(as_time(t, x.device))
        output = self._output(x, level, conditions)
        from_x, from_output = answer_scales(quantity, self.preconditioning, level, self.process)
        return match(from_x, x) * x + match(from_output, x) * output

    def in_output(self, error: Tensor, level: Level) -> Tensor:
        """Errors of x_0 (B, *) in units of the network's answer."""
        _, from_output = answer_scales("x0", self.preconditioning, level, self.process)
        return match(1.0 / from_output, error) * error

    def features(self, x: Tensor, t: Time, **conditions: Tensor) -> list[Tensor]:
        """What the network's layers make of x: its own ``features``, for discriminators.

        Raises:
            AttributeError: the network has none.
        """
        level = self.process.level(as_time(t, x.device))
        scaled, label, conditions = self._inputs(x, level, conditions)
        return self.network.features(scaled, label, **conditions)  # type: ignore[operator]

    def _output(self, x: Tensor, level: Level, conditions: dict[str, Tensor]) -> Tensor:
        """What the network says about a state (B, *), of its dtype."""
        scaled, label, conditions = self._inputs(x, level, conditions)
        return self.network(scaled, label, **conditions).to(x.dtype)

    def _inputs(
        self, x: Tensor, level: Level, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the network is shown: scaled state, label (B,) and conditions."""
        c_in, _, _ = self.preconditioning.scales(level)
        label = self.preconditioning.label(level, self.process)
        label = label.to(torch.promote_types(x.dtype, torch.float32)).expand(len(x))
        return match(c_in, x) * x, label, conditions


def answer_scales(
    quantity: Prediction, preconditioning: Preconditioning, level: Level, process: GaussianProcess
) -> tuple[Tensor, Tensor]:
    """(a, b), float64 like ``level``: the quantity asked for is a x + b times the network's output.

    It is p' x_0 + q' eps, the two solved from x = alpha x_0 + sigma eps and the prediction F = p x_0 + q eps, so
    ((p' q - q' p) x + (alpha q' - sigma p') F) / (alpha q - sigma p). Both coefficients are float64: going through x_0
    or eps in float32 cancels near t = 0 (6 % of the cosine process' velocity at t = 1e-5).
    """
    _, c_skip, c_out = preconditioning.scales(level)
    if quantity == preconditioning.prediction:
        return c_skip, c_out
    p, q = preconditioning.mixture(level, process)
    wanted_p, wanted_q = _MIXTURES[quantity](level, process)
    scale = level.alpha * q - level.sigma * p
    from_x, from_prediction = (
        (wanted_p * q - wanted_q * p) / scale,
        (level.alpha * wanted_q - level.sigma * wanted_p) / scale,
    )
    return from_x + from_prediction * c_skip, from_prediction * c_out


class GaussianMixtureDenoiser(BaseDenoiser):
    """The exact denoiser of a mixture of K Gaussians in D dimensions: the test double of the whole project.

    Args:
        process: the Gaussian process.
        means: (K, D).
        covariances: (K, D, D), symmetric positive semi-definite.
        weights: (K,), positive; equal by default.
    """

    def __init__(
        self, process: GaussianProcess, means: Tensor, covariances: Tensor, weights: Tensor | None = None
    ) -> None:
        super().__init__(process)
        self.means = means
        self.weights = torch.ones(len(means)).to(means) if weights is None else weights
        self.variances, self.basis = torch.linalg.eigh(covariances)
        self.variances = self.variances.clamp_min(0.0)

    def _components(self, x: Tensor, t: Time) -> tuple[Level, Tensor, Tensor, Tensor]:
        """Level, log weights + log densities (B, K), residuals (B, K, D) in each basis, marginal variances."""
        level = self.process.level(t, x.device)
        alpha, sigma = (v.to(x.dtype).reshape(-1, 1, 1) for v in (level.alpha, level.sigma))
        residual = torch.einsum("bkd,kde->bke", x.flatten(1)[:, None] - alpha * self.means.to(x), self.basis.to(x))
        variance = alpha**2 * self.variances.to(x) + sigma**2
        normaliser = torch.log(2.0 * torch.pi * variance).sum(-1)
        log_joint = self.weights.to(x).log() - 0.5 * ((residual**2 / variance).sum(-1) + normaliser)
        return level, log_joint - self.weights.sum().log().to(x), residual, variance

    def log_density(self, x: Tensor, t: Time) -> Tensor:
        """ln p_t(x), shape (B,)."""
        return torch.logsumexp(self._components(x, t)[1], dim=1)

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """Posterior mean: responsibilities times each component's linear estimate."""
        level, log_joint, residual, variance = self._components(x, t)
        gain = match(level.alpha, residual) * self.variances.to(x) / variance
        estimate = self.means.to(x) + torch.einsum("bke,kde->bkd", gain * residual, self.basis.to(x))
        return torch.einsum("bk,bkd->bd", log_joint.softmax(1), estimate).reshape(x.shape)


class TokenDenoiser:
    """A token network and the absorbing process of its inputs: log-probabilities of clean tokens, free of time.

    Args:
        network: called as network(x, positions), see networks/base.py; knows ids 0..V, V the mask.
        process: the absorbing process.
        vocabulary: V, the number of real tokens.
    """

    def __init__(self, network: nn.Module, process: AbsorbingProcess, vocabulary: int) -> None:
        self.network = network
        self.process = process
        self.vocabulary = vocabulary

    @property
    def mask_id(self) -> int:
        """The absorbing state, one past the last real token."""
        return self.vocabulary

    def logits(self, x: Tensor, positions: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """Logits over the real tokens: (B, L, V) for x (B, L), or (N, V) at flat ``positions`` (N,) in B * L."""
        return self.network(x, positions=positions, **conditions)

    def log_probs(self, x: Tensor, positions: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """ln p0(token | unmasked tokens), float32, shapes of :meth:`logits` (Ou et al. 2024, theorem 1)."""
        return self.logits(x, positions, **conditions).float().log_softmax(-1)
