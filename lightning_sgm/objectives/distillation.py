"""Terms of distillation: what a student of few steps is asked for, given a frozen teacher of many.

A :class:`Term` gives losses per example from a :class:`Phase`, which holds what one step of training knows and shares
what several terms need, so that nothing is computed twice. A method adds up the terms it was given; it knows none of
them. They are written for any Gaussian process: what is modelled may be an image, a latent or a residual.

Regression and score terms are those of TAD-SR (He et al. 2024, 2408.07476), :class:`Inverse` and :class:`GroundTruth`
those of SinSR (Wang et al. 2024, 2311.14760).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.objectives.denoising import ChainTimes, Times
from lightning_sgm.processes.gaussian import Level, match
from lightning_sgm.random import Draw

Solve = Callable[[Tensor, dict[str, Tensor]], Tensor]
"""From starts (B, *) at t = 1 and conditions to the teacher's results (B, *)."""
Decode = Callable[[Tensor, dict[str, Tensor]], Tensor]
"""From samples (B, *) and conditions to data."""
Answer = Literal["x0", "noise"]


class Phase:
    """What the critics or the student of one training step know of B examples.

    Given to both in turn, it hands the student's sample (and features of it) from the critics to the student, as TAD-SR
    does; with one phase for each, both see fresh noise. A phase made again of the same arguments and an equal ``draw``
    has the same noise, if its terms are asked in the same order.

    Args:
        student: the model in training.
        teacher: the frozen model; its process is that of all noise here.
        solve: the teacher's deterministic sampler; None where ``solution`` is given or no term asks for it.
        start: (B, *) states at t = 1.
        conditions: of both models; each is given those it wants.
        draw: source of all times and noise.
        data: (B, *) clean data, for terms that need them.
        solution: (B, *) results of ``solve`` from ``start``, where they are known.
        scale: standard deviation of the data; differences of samples count in units of it.
        decode: makes of samples (B, *) and conditions what people see; by default samples are that themselves.

    Attributes:
        logged: values (B,) by name, without gradient, that terms leave here to be seen, such as "score_gap".
    """

    def __init__(
        self,
        student: BaseDenoiser,
        teacher: BaseDenoiser,
        solve: Solve | None,
        start: Tensor,
        conditions: dict[str, Tensor],
        draw: Draw,
        *,
        data: Tensor | None = None,
        solution: Tensor | None = None,
        scale: float = 1.0,
        decode: Decode | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.start, self.conditions, self.draw, self.scale = start, conditions, draw, scale
        self.logged: dict[str, Tensor] = {}
        self._solve, self._data, self._solution, self._decode = solve, data, solution, decode
        self._shared: dict[Hashable, Any] = {}

    @cached_property
    def sample(self) -> Tensor:
        """The student's answer to ``start`` (B, *), with a graph if it is first asked for where gradients are on."""
        return self.student.x0(self.start, 1.0, **self.given(self.student))

    @cached_property
    def solution(self) -> Tensor:
        """The teacher's result (B, *) from the same start, without gradient.

        Raises:
            ValueError: it was not given, and neither was a solver.
        """
        if self._solution is not None:
            return self._solution
        if self._solve is None:
            raise ValueError("a term needs the teacher's solutions: give the Phase a solver, or the solutions")
        with torch.no_grad():
            return self._solve(self.start, self.conditions)

    @property
    def data(self) -> Tensor:
        """Clean data (B, *).

        Raises:
            ValueError: there are none.
        """
        if self._data is None:
            raise ValueError(
                "a term of this distillation needs clean data, and there are none: leave out Data and GroundTruth, and "
                'choose reference="solution" and real="solution"'
            )
        return self._data

    def decode(self, sample: Tensor) -> Tensor:
        """Images or the like of samples (B, *) of this phase."""
        return sample if self._decode is None else self._decode(sample, self.conditions)

    def given(self, denoiser: BaseDenoiser) -> dict[str, Tensor]:
        """The conditions that a denoiser wants."""
        return {name: self.conditions[name] for name in denoiser.conditions if name in self.conditions}

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when ``key`` was first asked for in this phase."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def noise(self, key: Hashable, times: Times) -> tuple[Level, Tensor]:
        """Levels (B,) of the teacher's process and standard normal noise (B, *), drawn once for each ``key``."""

        def make() -> tuple[Level, Tensor]:
            level = self.teacher.process.level(
                times(self.teacher.process, len(self.start), self.draw), self.start.device
            )
            return level, self.draw.normal(self.start.shape, self.start.dtype).to(self.start.device)

        return self.shared((key, "noise"), make)

    def log(self, name: str, value: Tensor) -> None:
        """Leave the means per example of ``value`` (B, *) in ``logged``."""
        self.logged[name] = example_mean(value.detach())


def example_mean(value: Tensor) -> Tensor:
    """Means (B,), float32 or better, of a value (B, *) per example."""
    return value.to(torch.promote_types(value.dtype, torch.float32)).flatten(1).mean(1)


class Term(nn.Module):
    """Base of the terms: losses of the student per example, and of a critic of the term's own if it has one.

    A critic is trained on samples of the student by an optimiser of its own; its parameters are those of the term.

    Args:
        weight: of the student's loss, at least 0. The method multiplies by it; the losses here are without.

    Attributes:
        has_critic: whether there is a critic.
    """

    has_critic: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight of {type(self).__name__} must be at least 0, got {weight}")
        self.weight = weight

    def build(self, teacher: BaseDenoiser) -> None:
        """Make what depends on the teacher; called once, before the optimisers are made.

        Raises:
            ValueError: the term cannot be used with this teacher.
        """

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,) of the student, float32 or better."""
        raise NotImplementedError

    def critic(self, phase: Phase) -> Tensor | None:
        """Losses (B,) of the critic, which send no gradient into the student; None without a critic."""
        return None


class Regression(Term):
    """Squared distance to the teacher's solution of the same start: mean ((z_s - z_t) / scale)^2."""

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,)."""
        return _squared(phase.sample - phase.solution, phase)


class Data(Term):
    """Squared distance to the data: mean ((z_s - z_gt) / scale)^2, whose optimum is a blurred mean."""

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,)."""
        return _squared(phase.sample - phase.data, phase)


def _squared(error: Tensor, phase: Phase) -> Tensor:
    return example_mean((error / phase.scale).square())


class HighFrequencyScore(Term):
    """Score distillation by the difference of the teacher's answers to two noised samples (TAD-SR).

    With one noise n for both, x_s = alpha z_s + sigma n, x_r = alpha z_r + sigma n and g = eps_hat(x_s) - eps_hat(x_r)
    without gradient, the loss is mean (g z_s / scale): its gradient by z_s / scale is g / D for D numbers per example,
    and its value means nothing. What there is to see is "score_gap" in ``phase.logged``, the mean of |g|. As

        g = alpha / sigma ((z_s - z_r) - (x0_hat(x_s) - x0_hat(x_r))),

    it pulls at what the teacher takes for noise in z_s - z_r, most at small noise: alpha / sigma is 25, 4.2 and 2.7 at
    the first three of ResShift's 15 indices. (Their code scales the teacher's input twice, and its noise is uniform in
    [0, 1); here the input is the teacher's own and the noise Gaussian.)

    Args:
        weight: see :class:`Term`.
        times: law of the noise; the paper's small noise by default, for a continuous process take
            :class:`~lightning_sgm.objectives.denoising.UniformLogSNR` with a small ``ratio_max``.
        reference: z_r: the teacher's "solution" or the "data"; with "noise", n takes the place of eps_hat(x_r): score
            distillation sampling (Poole et al. 2022, 2209.14988), noisy even where the student is perfect.
    """

    def __init__(
        self,
        weight: float = 1.0,
        times: Times = ChainTimes(first=0, last=2),
        reference: Literal["solution", "data", "noise"] = "solution",
    ) -> None:
        super().__init__(weight)
        if reference not in ("solution", "data", "noise"):
            raise ValueError(f"reference must be solution, data or noise, got {reference!r}")
        self.times = times
        self.reference: Literal["solution", "data", "noise"] = reference

    def build(self, teacher: BaseDenoiser) -> None:
        """Try the law of the noise, before hours pass.

        Raises:
            ValueError: the teacher's process has no such levels.
        """
        try:
            self.times(teacher.process, 2, Draw(0))
        except ValueError as error:
            raise ValueError(
                f"HighFrequencyScore cannot draw its noise: {error}; or give it times, as UniformLogSNR with ratio_max"
            ) from error

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,): the gradient is right, the value is not to be read."""
        sample = phase.sample
        gap = self._gap(sample.detach(), phase)
        phase.log("score_gap", gap.abs())
        return example_mean(gap * (sample / phase.scale))

    @torch.no_grad()
    def _gap(self, sample: Tensor, phase: Phase) -> Tensor:
        """g (B, *)."""
        level, noise = phase.noise(self, self.times)
        teacher, conditions = phase.teacher, phase.given(phase.teacher)

        def estimate(z: Tensor) -> Tensor:
            return teacher.noise(teacher.process.perturb(z, level, noise), level.t, **conditions)

        found = estimate(sample)
        if self.reference == "noise":
            return found - noise
        return found - estimate(phase.solution if self.reference == "solution" else phase.data)


class Inverse(Term):
    """The student must also find the way back: from the teacher's solution to its start (SinSR).

    mean ((start_hat(z_t) - start) / scale)^2, where start_hat reads a clean sample as a state at the smallest noise
    level t_min, at which a one-step student has nothing else to do.

    Args:
        weight: see :class:`Term`.
        answer: what start_hat is: the student's "x0" as in the paper, for networks that answer x_0 themselves; or
            sigma(1) times its "noise". Take "noise" under preconditionings whose x_0 at low noise is nearly the input
            whatever the network says, such as :class:`~lightning_sgm.denoiser.EDMPreconditioning`.
    """

    def __init__(self, weight: float = 1.0, answer: Answer = "x0") -> None:
        super().__init__(weight)
        self.answer = _checked(answer)

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,)."""
        return _squared(_start_of(phase.solution, phase, self.answer) - phase.start, phase)


class GroundTruth(Term):
    """Data through the student's own inverse: mean ((f(start_hat(z_gt), 1) - z_gt) / scale)^2 (SinSR).

    The start is without gradient, so :class:`Inverse` teaches how to find it and this term what to make of it.

    Args:
        weight: see :class:`Term`.
        answer: see :class:`Inverse`; give both the same.
    """

    def __init__(self, weight: float = 1.0, answer: Answer = "x0") -> None:
        super().__init__(weight)
        self.answer = _checked(answer)

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,)."""
        with torch.no_grad():
            start = _start_of(phase.data, phase, self.answer)
        return _squared(phase.student.x0(start, 1.0, **phase.given(phase.student)) - phase.data, phase)


def _start_of(z: Tensor, phase: Phase, answer: Answer) -> Tensor:
    """The student's estimate (B, *) of the start at t = 1 that leads to the sample ``z``."""
    student, process = phase.student, phase.student.process
    if answer == "x0":
        return student.x0(z, process.t_min, **phase.given(student))
    noise = student.noise(z, process.t_min, **phase.given(student))
    return match(process.level(1.0, z.device).sigma, z) * noise


def _checked(answer: Answer) -> Answer:
    if answer not in ("x0", "noise"):
        raise ValueError(f"answer must be x0 or noise, got {answer!r}")
    return answer
