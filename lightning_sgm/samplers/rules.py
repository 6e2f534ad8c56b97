"""Rules: how a sampler goes from one noise level to the next.

A rule is stateless and knows no process: it asks ``evaluate.process``, and what it must remember from step to step is
passed in and out, so a step can be repeated or skipped. All of them work for every Gaussian process.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sgm.processes.gaussian import GaussianProcess, Level
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import (
    Evaluation,
    Levels,
    Processes,
    first,
    is_clean,
    level_at,
    per_component,
)

Coefficients = tuple[Tensor, Tensor, Tensor]


def euler_scales(level: Level, target: Level) -> tuple[Tensor, Tensor]:
    """(a, b) of the deterministic step a x + b x_0, with a = sigma_s / sigma_t and b = alpha_s - alpha_t a.

    The step keeps the noise that x_0 implies and changes both scales (DDIM, Song et al. 2021, 2010.02502, eq. 12): it
    is exact wherever x_0 is constant, and finite at alpha_t = 0.
    """
    keep = target.sigma / level.sigma
    return keep, target.alpha - level.alpha * keep


def euler(x: Tensor, x0: Tensor, level: Level, target: Level) -> Tensor:
    """The deterministic step of :func:`euler_scales`."""
    a, b = euler_scales(level, target)
    return a * x + b * x0


def noise_estimate(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """(x - alpha x_0) / sigma; the score is this times -1 / sigma."""
    return (x - level.alpha * x0) / level.sigma


class Rule:
    """Base of all rules.

    A rule that is one affine step, mean = a x + b x_0 with noise of standard deviation c, gives :meth:`coefficients`;
    any other overrides :meth:`__call__`.
    """

    def start(self, process: Processes, levels: list[Levels]) -> Any:
        """Memory at the start of a run over ``levels``; most rules begin with none."""
        return None

    def coefficients(self, process: GaussianProcess, level: Level, target: Level) -> Coefficients:
        """(a, b, c) of a step to a noisy target, float64 of shape ()."""
        raise NotImplementedError

    def __call__(
        self, evaluate: Evaluation, x: Any, level: Levels, target: Levels, draw: Draw, memory: Any
    ) -> tuple[Any, Any, Any]:
        """One step.

        Args:
            evaluate: the denoiser, as evaluate(x, level) -> x_0.
            x: state at ``level``, a tensor (B, *) or a dict of them.
            level: where ``x`` is.
            target: where to go, cleaner than ``level``; the last one may be without any noise.
            draw: source of the step's noise.
            memory: what :meth:`start` or the last step returned.

        Returns:
            The state at ``target``, the same before noise was added, and the memory for the next step.
        """
        if is_clean(target):
            x0 = evaluate(x, level)
            return x0, x0, memory
        coefficients = per_component(self.coefficients, evaluate.process, level, target)
        return *_affine_step(evaluate, x, level, coefficients, draw), memory


def _affine_step(
    evaluate: Evaluation, x: Any, level: Levels, coefficients: tuple[Any, Any, Any], draw: Draw
) -> tuple[Any, Any]:
    """a x + b x_0 + c z and the same without noise."""
    a, b, c = coefficients
    mean = per_component(lambda x, x0, a, b: a * x + b * x0, x, evaluate(x, level), a, b)
    return (_add_noise(evaluate, mean, c, draw) if first(c).any() else mean), mean


def _add_noise(evaluate: Evaluation, mean: Any, std: Any, draw: Draw) -> Any:
    return per_component(lambda mean, std, noise: mean + std * noise, mean, std, evaluate.noise_like(mean, draw))


class Euler(Rule):
    """DDIM, the first-order solver of the probability-flow ODE in sigma / alpha. One evaluation a step.

    Args:
        eta: how much of the noise is drawn anew, in [0, 1]: its standard deviation in that of the posterior (Song et
            al. 2021, 2010.02502, eq. 16). 0 is the ODE, 1 is :class:`Ancestral`.
    """

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta of Euler must lie in [0, 1], got {eta}")
        self.eta = eta

    def coefficients(self, process: GaussianProcess, level: Level, target: Level) -> Coefficients:
        """(a, b) of :func:`euler_scales` to a target of so much less noise, and the noise."""
        if not self.eta:
            a, b = euler_scales(level, target)
            return a, b, torch.zeros_like(a)
        _, std = process.posterior(torch.ones_like(level.t), torch.zeros_like(level.t), level, target)
        fresh = self.eta * std
        a, b = euler_scales(level, target._replace(sigma=torch.sqrt(target.sigma**2 - fresh**2)))
        return a, b, fresh


class Heun(Rule):
    """Second-order solver of the probability-flow ODE (Karras et al. 2022, algorithms 1 and 2).

    The trapezoid rule in y = x / alpha over sigma / alpha; two evaluations a step, one where no noise is left: 2 N - 1
    in all. A step from alpha = 0, where that coordinate is infinite, uses x / sigma over alpha / sigma instead.

    Args:
        churn: relative increase of sigma / alpha by fresh noise before each step, the paper's gamma; 0 for none. Its
            S_churn over N steps is min(S_churn / N, sqrt(2) - 1).
    """

    def __init__(self, churn: float = 0.0) -> None:
        if churn < 0:
            raise ValueError(f"churn must be at least 0, got {churn}")
        self.churn = churn

    def __call__(
        self, evaluate: Evaluation, x: Any, level: Levels, target: Levels, draw: Draw, memory: Any
    ) -> tuple[Any, Any, Any]:
        """Euler to the target, then the average of the slopes at both ends; see :class:`Rule`."""
        if self.churn:
            x, level = self._raise(evaluate, x, level, draw)
        x0 = evaluate(x, level)
        guess = per_component(euler, x, x0, level, target)
        if is_clean(target):
            return guess, guess, memory
        x = per_component(_trapezoid, guess, x0, evaluate(guess, target), level, target)
        return x, x, memory

    def _raise(self, evaluate: Evaluation, x: Any, level: Levels, draw: Draw) -> tuple[Any, Any]:
        """Forward to the level with (1 + churn) times the ratio, as far as the process reaches."""
        ratio = (1.0 + self.churn) * first(level).ratio
        t = first(evaluate.process).t_from_ratio(ratio).clamp(max=1.0)
        if t <= first(level).t:
            return x, level
        noisier = level_at(evaluate.process, t)

        def forward(x: Tensor, noise: Tensor, process: GaussianProcess, level: Level, noisier: Level) -> Tensor:
            scale, std = process.transition(level, noisier)
            return scale * x + std * noise

        noise = evaluate.noise_like(x, draw)
        return per_component(forward, x, noise, evaluate.process, level, noisier), noisier


def _trapezoid(guess: Tensor, x0: Tensor, next_x0: Tensor, level: Level, target: Level) -> Tensor:
    """Euler's step corrected to second order: y_s + (r_s - r_t) (d_s - d_t) / 2 for the slopes d = (y - x_0) / r."""
    stretch = level.sigma * target.alpha / (level.alpha * target.sigma) if level.alpha.any() else 1.0
    _, b = euler_scales(level, target)
    return guess + 0.5 * stretch * b * (next_x0 - x0)


class DPMpp2M(Rule):
    """DPM-Solver++(2M), the second-order multistep solver in ln(alpha / sigma) (Lu et al. 2022, 2211.01095, alg. 2).

    One evaluation a step. The first step and one to no noise are Euler's.
    """

    def __call__(
        self, evaluate: Evaluation, x: Any, level: Levels, target: Levels, draw: Draw, memory: Any
    ) -> tuple[Any, Any, Any]:
        """Euler's step with x_0 extrapolated from the last two answers, which are the memory; see :class:`Rule`."""
        x0 = evaluate(x, level)
        estimate = x0
        if memory is not None and not is_clean(target):
            estimate = per_component(_extrapolate, x0, *memory, level, target)
        x = per_component(euler, x, estimate, level, target)
        return x, x, (x0, level)


def _extrapolate(x0: Tensor, last_x0: Tensor, last: Level, level: Level, target: Level) -> Tensor:
    """x_0 half a step ahead, linear in ln(alpha / sigma)."""
    ahead = torch.log(level.ratio) - torch.log(target.ratio)
    behind = torch.log(last.ratio) - torch.log(level.ratio)
    return x0 + 0.5 * ahead / behind * (x0 - last_x0)


class Ancestral(Rule):
    """Draw from the process's posterior p(x_s | x_t, x_0) at the estimated x_0 (Ho et al. 2020, 2006.11239, alg. 2).

    Args:
        noise: standard deviation of the draw: the "posterior"'s own, or the forward "transition"'s, sqrt(beta_i) of
            DDPM (their other choice; Song et al.'s code for VP, while they take the posterior's for VE).
    """

    def __init__(self, noise: Literal["posterior", "transition"] = "posterior") -> None:
        if noise not in ("posterior", "transition"):
            raise ValueError(f"noise of Ancestral must be posterior or transition, got {noise!r}")
        self.noise: Literal["posterior", "transition"] = noise

    def __call__(
        self, evaluate: Evaluation, x: Any, level: Levels, target: Levels, draw: Draw, memory: Any
    ) -> tuple[Any, Any, Any]:
        """One draw; see :class:`Rule`."""
        x0 = evaluate(x, level)
        if is_clean(target):
            return x0, x0, memory

        def posterior(x0: Tensor, x: Tensor, process: GaussianProcess, level: Level, target: Level) -> tuple[Any, ...]:
            mean, std = process.posterior(x0, x, level, target)
            return mean, std if self.noise == "posterior" else process.transition(target, level)[1]

        mean, std = per_component(posterior, x0, x, evaluate.process, level, target)
        return _add_noise(evaluate, mean, std, draw), mean, memory


class Stay(Rule):
    """No predictor: the state stays as it is and only hooks move it (Song and Ermon 2019: corrector-only sampling)."""

    def __call__(
        self, evaluate: Evaluation, x: Any, level: Levels, target: Levels, draw: Draw, memory: Any
    ) -> tuple[Any, Any, Any]:
        """The state itself, or x_0 where no noise is left; see :class:`Rule`."""
        x = evaluate(x, level) if is_clean(target) else x
        return x, x, memory


def diffusion_table(process: GaussianProcess, *levels: Level) -> dict[float, tuple[Tensor, Tensor]]:
    """{t: (f, g^2)} of all levels, at once: differentiating in every step would cost as much as a small network."""
    times = torch.stack([level.t for level in levels])
    pairs = zip(process.drift(times), process.diffusion(times) ** 2, strict=True)
    return dict(zip(times.tolist(), pairs, strict=True))


class EulerMaruyama(Rule):
    """First-order solver of the reverse SDE (Song et al. 2021, eq. 6): mean = x - (f x - g^2 score) dt.

    The noise is g sqrt(dt). f and g are taken at t; dt = t - s is the step of the grid (the authors' code uses 1 / N).
    """

    def start(self, process: Processes, levels: list[Levels]) -> Any:
        """{t: (f, g^2)} of all levels."""
        return per_component(diffusion_table, process, *levels[:-1])

    def __call__(
        self, evaluate: Evaluation, x: Any, level: Levels, target: Levels, draw: Draw, memory: Any
    ) -> tuple[Any, Any, Any]:
        """One step, with f and g from the memory; see :class:`Rule`."""
        if is_clean(target):
            return super().__call__(evaluate, x, level, target, draw, memory)
        coefficients = per_component(self._coefficients, level, target, memory)
        return *_affine_step(evaluate, x, level, coefficients, draw), memory

    def _coefficients(self, level: Level, target: Level, table: dict[float, tuple[Tensor, Tensor]]) -> Coefficients:
        refuse_pure_noise(self, level)
        dt = level.t - target.t
        f, g2 = table[float(level.t)]
        pull = g2 * dt / level.sigma**2
        return 1.0 - f * dt - pull, pull * level.alpha, torch.sqrt(g2 * dt)


class ReverseDiffusion(Rule):
    """The forward transition x_t = scale x_s + std z, reversed to first order (Song et al. 2021, appendix E).

    mean = (2 - scale) x + std^2 score, noise std.

    Args:
        deterministic: half the score and no noise, the authors' probability-flow predictor.
    """

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    def coefficients(self, process: GaussianProcess, level: Level, target: Level) -> Coefficients:
        """The mean in x and x_0, and the transition's std."""
        refuse_pure_noise(self, level)
        scale, std = process.transition(target, level)
        pull = (0.5 if self.deterministic else 1.0) * (std / level.sigma) ** 2
        return 2.0 - scale - pull, pull * level.alpha, torch.zeros_like(std) if self.deterministic else std


def refuse_pure_noise(rule: Rule, level: Level) -> None:
    """Raise a ValueError for a rule that would start from alpha = 0."""
    if not level.alpha.any():
        raise ValueError(
            f"{type(rule).__name__} cannot start where alpha = 0, as its drift is infinite there: "
            "use a grid in sigma / alpha, such as LogUniform"
        )
