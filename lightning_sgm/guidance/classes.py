"""Guidance by a class: without a classifier (Ho and Salimans 2022) and by one (Song et al. 2021, section 5)."""

from __future__ import annotations

import math
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.io.checkpoint import load
from lightning_sgm.processes.gaussian import Level, Time, as_time, match

Quantity = Literal["x0", "noise", "velocity"]


class ClassifierFree(BaseDenoiser):
    """Classifier-free guidance (Ho and Salimans 2022, 2207.12598): away from the answer without a class.

    Every answer is null + weight (conditional - null), the two from one network call of 2 B rows: weight 0 is the
    unconditional model, 1 the conditional one (their w is weight - 1), and more makes samples more typical of their
    class and less diverse. The network must have learnt both: train with ``drop: {label: 0.1}``.

    Args:
        denoiser: with a class ``label``.
        weight: >= 0.
        interval: (low, high], the levels sigma / alpha at which guidance acts; elsewhere the conditional answer alone,
            which costs one evaluation (Kynkaanniemi et al. 2024, 2404.07724). None: at all levels.
        null: the label that stands for no class; None for the network's own, K.

    Raises:
        ValueError: a denoiser without classes, a weight or an interval out of range.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        weight: float = 2.0,
        interval: tuple[float, float] | None = None,
        null: int | None = None,
    ) -> None:
        super().__init__(denoiser.process)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight of ClassifierFree must be a number >= 0, got {weight}")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(f"interval of ClassifierFree must be [low, high] with 0 <= low < high, got {interval}")
        if "label" not in denoiser.conditions:
            raise ValueError(
                "ClassifierFree needs a network that takes the class: set its conditional to true, and train with "
                "drop: {label: 0.1}"
            )
        if null is None and not denoiser.classes:
            raise ValueError("ClassifierFree cannot tell the network's null label: give null, or the network classes")
        self.denoiser, self.weight, self.interval = denoiser, weight, interval
        self.null = denoiser.classes if null is None else null
        self.conditions, self.classes = denoiser.conditions, denoiser.classes

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """Guided E[x_0 | x_t], see :class:`~lightning_sgm.denoiser.BaseDenoiser`."""
        return self._guided("x0", x, t, conditions)

    def noise(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """Guided E[eps | x_t]."""
        return self._guided("noise", x, t, conditions)

    def velocity(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """Guided dx/dt."""
        return self._guided("velocity", x, t, conditions)

    def _guided(self, quantity: Quantity, x: Tensor, t: Time, conditions: dict[str, Tensor]) -> Tensor:
        """All quantities are affine in x_0 at a given x, so each is guided by the same formula."""
        label = _label(conditions, "ClassifierFree")
        ask, time = getattr(self.denoiser, quantity), as_time(t)
        inside = self._inside(time)
        if not inside.any():  # grids are on the CPU: nothing waits for a device
            answer = ask(x, t, **conditions)
            self.cost = self.denoiser.cost
            return answer
        twice = {name: torch.cat([value, value]) for name, value in conditions.items()}
        twice["label"] = torch.cat([label, torch.full_like(label, self.null)])
        both = ask(torch.cat([x, x]), torch.cat([time, time]) if time.ndim else time, **twice)
        self.cost = 2 * self.denoiser.cost
        conditional, null = both.chunk(2)
        return torch.lerp(null, conditional, match(torch.where(inside, self.weight, 1.0), x))

    def _inside(self, time: Tensor) -> Tensor:
        """Whether guidance acts, bool of the shape of ``time``."""
        if self.interval is None:
            return torch.ones_like(time, dtype=torch.bool)
        ratio = self.process.level(time).ratio
        return (ratio > self.interval[0]) & (ratio <= self.interval[1])


@runtime_checkable
class NoisyClassifier(Protocol):
    """What guidance needs of a classifier; :class:`lightning_sgm.methods.Classifier` is one.

    Attributes:
        classes: K.
        ratios: smallest and largest noise level sigma / alpha that it knows.
    """

    classes: int
    ratios: tuple[float, float]

    def log_probs(self, x: Tensor, level: Level) -> Tensor:
        """ln p(class | x_t = x), (B, K), for x (B, *) at ``level`` (of shape () or (B,)) of any Gaussian process."""
        ...


class ClassifierGuidance(BaseDenoiser):
    """Guidance by a classifier of noisy data: score + scale * gradient of ln p_t(label | x) (Song et al. 2021, eq. 14).

    Turns an unconditional model, or any other denoiser, into a conditional one. It acts wherever the denoiser is asked,
    in predictors, correctors and ODE solvers. The classifier may have been trained under another process: what it is
    shown is x / alpha at the level sigma / alpha, in which all processes agree. Above its largest level it says how x_0
    moves at that level. Its forward and backward pass count as one evaluation.

    Args:
        denoiser: what is guided.
        classifier: a checkpoint of a :class:`~lightning_sgm.methods.Classifier`, or in Python the classifier itself.
        scale: of the gradient: 0 is no guidance, 1 Bayes' rule; more makes samples more typical of their class
            (Dhariwal and Nichol 2021).

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: no checkpoint of a classifier, or one for another number of classes; a scale out of range.
    """

    def __init__(self, denoiser: BaseDenoiser, classifier: str | NoisyClassifier, scale: float = 1.0) -> None:
        super().__init__(denoiser.process)
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale of ClassifierGuidance must be a number >= 0, got {scale}")
        self.denoiser, self.scale = denoiser, scale
        self.classifier = _load(classifier) if isinstance(classifier, str) else classifier
        self.classes = self.classifier.classes
        if denoiser.classes not in (0, self.classes):
            raise ValueError(f"the classifier knows {self.classes} classes, but the denoiser {denoiser.classes}")
        self.conditions = (*(name for name in denoiser.conditions if name != "label"), "label")

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """Guided E[x_0 | x_t], see :class:`~lightning_sgm.denoiser.BaseDenoiser`."""
        return self._guided("x0", x, t, conditions)

    def noise(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """Guided E[eps | x_t]."""
        return self._guided("noise", x, t, conditions)

    def velocity(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """Guided dx/dt."""
        return self._guided("velocity", x, t, conditions)

    def _guided(self, quantity: Quantity, x: Tensor, t: Time, conditions: dict[str, Tensor]) -> Tensor:
        """The denoiser's answer moved as a shift of x_0 by sigma^2 / alpha times the gradient moves it.

        With the ratio r = sigma / alpha that is r^2 / sqrt(1 + r^2) times the gradient with respect to
        x / sqrt(alpha^2 + sigma^2), which is finite at alpha = 0 once r is cut at what the classifier knows.
        """
        label = _label(conditions, "ClassifierGuidance")
        if "label" not in self.denoiser.conditions:
            conditions = {name: value for name, value in conditions.items() if name != "label"}
        answer = getattr(self.denoiser, quantity)(x, t, **conditions)
        self.cost = self.denoiser.cost + 1
        level = self.process.level(as_time(t, x.device))
        ratio = level.ratio.clamp(max=self.classifier.ratios[1])
        shift = ratio**2 * torch.sqrt((level.alpha**2 + level.sigma**2) / (1.0 + ratio**2))
        if quantity == "noise":
            shift = -level.alpha / level.sigma * shift
        elif quantity == "velocity":
            d_alpha, d_sigma = self.process.derivatives(level.t)
            shift = (d_alpha - d_sigma * level.alpha / level.sigma) * shift
        return answer + match(self.scale * shift, x) * self._gradient(x, level, label)

    def _gradient(self, x: Tensor, level: Level, label: Tensor) -> Tensor:
        """Gradient of ln p(label | x) with respect to x, 0 for the label K: no class."""
        self._follow(x.device)

        def log_prob(x: Tensor) -> Tensor:
            log_probs = self.classifier.log_probs(x, level)
            chosen = log_probs.gather(1, label.clamp(max=self.classes - 1)[:, None])[:, 0]
            return torch.where(label < self.classes, chosen, 0.0).sum()

        # Not autograd.grad, which cannot see through tensors of Lightning's inference mode.
        return torch.func.grad(log_prob)(x)

    def _follow(self, device: torch.device) -> None:
        """Move the classifier there: it is no part of the model, which Lightning moves."""
        part = next(self.classifier.parameters(), None) if isinstance(self.classifier, nn.Module) else None
        # Not if it is there already: Module.to is a crash of the interpreter inside of torch.func.vjp.
        if part is not None and part.device != device:
            with torch.inference_mode(False):
                cast(nn.Module, self.classifier).to(device)


def _load(path: str) -> NoisyClassifier:
    """The classifier of a checkpoint, frozen."""
    classifier = load(path)
    if not isinstance(classifier, NoisyClassifier):
        raise ValueError(
            f"{path} holds a {type(classifier).__name__}, which is no classifier: train one with fit "
            "--config classifier"
        )
    return cast(NoisyClassifier, classifier.requires_grad_(False))


def _label(conditions: dict[str, Tensor], user: str) -> Tensor:
    if "label" not in conditions:
        raise ValueError(f"{user} needs to know the class: give label, (B,) int64")
    return conditions["label"]
