"""What solving the probability-flow ODE needs: coordinates that suit every process, and black-box solvers.

For straight paths the first coordinate is the time itself:

    u = sigma / (alpha + sigma), the share of noise, and z = x / n with n = sqrt(alpha^2 + sigma^2),
    dz / d ln u = (alpha + sigma) / n (alpha z / n - x_0(n z)).

This is finite where alpha = 0 and needs no derivative of a schedule, and z stays of the data's size, so that a
tolerance means the same at every level.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_sgm.processes.gaussian import GaussianProcess, Level, as_time
from lightning_sgm.samplers.evaluation import Levels, Processes, first, level_at, per_component

Solver = Literal[
    "dopri5", "dopri8", "bosh3", "adaptive_heun", "scipy_RK45", "scipy_RK23", "scipy_DOP853", "scipy_LSODA"
]
Slope = Callable[[float, Tensor], Tensor]
Watch = Callable[[float, Tensor], None]


class Integrator:
    """An adaptive solver of dy / dp = slope(p, y) for a batch of states, at one common step size.

    A step of torchdiffeq's solvers is accepted when the root mean square of the error, in units of atol + rtol |y|, is
    at most 1 in *every* row: no example pays for the others with its accuracy. scipy's solvers, on the CPU and without
    gradients, take one mean over all rows.

    Args:
        solver: an adaptive solver of torchdiffeq; or one of scipy, with "scipy" in front.
        rtol: relative tolerance of a step, > 0.
        atol: absolute tolerance of a step, > 0.

    Raises:
        ValueError: an unknown solver, a tolerance that is not positive, or a library that is missing.
    """

    def __init__(self, solver: Solver, rtol: float, atol: float) -> None:
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
        if not (rtol > 0 and atol > 0):
            raise ValueError(f"rtol and atol of an ODE solver must be positive, got {rtol} and {atol}")
        self.library = "scipy" if solver.startswith("scipy_") else "torchdiffeq"
        self.solver = solver.removeprefix("scipy_")
        if importlib.util.find_spec(self.library) is None:
            raise ValueError(f"solver {solver} needs {self.library}: pip install {self.library}, or choose dopri5")
        self.rtol, self.atol = rtol, atol

    def __call__(self, slope: Slope, y: Tensor, begin: float, end: float, watch: Watch | None = None) -> Tensor:
        """The state at ``end``.

        Args:
            slope: derivative, (B, N) float64 for a position and a state; only asked between ``begin`` and ``end``.
            y: state at ``begin``, (B, N) float64.
            begin: first position.
            end: last position, above or below.
            watch: called as watch(position, y) after each accepted step.

        Raises:
            FloatingPointError: if the state stops being finite, or steps become too small to go on.
        """
        low, high = sorted((begin, end))

        def inside(position: float, y: Tensor) -> Tensor:
            dy = slope(min(max(position, low), high), y)  # the search for a first step may look past the end
            if not dy.isfinite().all():  # scipy's solvers would go on for ever, or return what is no number
                raise _failed("a derivative is not finite")
            return dy

        run = self._torchdiffeq if self.library == "torchdiffeq" else self._scipy
        return run(inside, y, begin, end, watch)

    def _torchdiffeq(self, slope: Slope, y: Tensor, begin: float, end: float, watch: Watch | None) -> Tensor:
        from torchdiffeq import odeint

        class Function:
            def __call__(self, position: Tensor, y: Tensor) -> Tensor:
                return slope(float(position), y)

            def callback_accept_step(self, position: Tensor, y: Tensor, step: Tensor) -> None:
                if watch is not None and float(position) != begin:  # it tells where a step began
                    watch(float(position), y)

        ends = torch.tensor([begin, end], dtype=torch.float64, device=y.device)
        # Without step_t they step past the end and interpolate back.
        options = {"step_t": ends[1:], "norm": _worst}
        try:
            y = odeint(Function(), y, ends, rtol=self.rtol, atol=self.atol, method=self.solver, options=options)[-1]
        except AssertionError as error:
            raise _failed(str(error)) from error
        if watch is not None:
            watch(end, y)
        return y

    def _scipy(self, slope: Slope, y: Tensor, begin: float, end: float, watch: Watch | None) -> Tensor:
        from scipy.integrate import solve_ivp

        def state(values: Any) -> Tensor:
            return torch.tensor(values, device=y.device).view(y.shape)

        def function(position: float, values: Any) -> Any:
            return slope(position, state(values)).detach().cpu().flatten().numpy()

        start = y.detach().cpu().flatten().numpy()
        found = solve_ivp(function, (begin, end), start, method=self.solver, rtol=self.rtol, atol=self.atol)
        if not found.success:
            raise _failed(found.message)
        if watch is not None:
            for position, values in zip(found.t[1:], found.y.T[1:], strict=True):
                watch(float(position), state(values))
        return state(found.y[:, -1])


def _worst(y: Tensor) -> Tensor:
    """Largest root mean square of the rows of (B, N); without gradients, which a step's size is not to have."""
    return y.detach().square().mean(1).max().sqrt()


def _failed(message: str) -> FloatingPointError:
    return FloatingPointError(
        f"the ODE solver gave up ({message.splitlines()[0][:100]}): the model's answers are not finite or change too "
        "fast; train longer, or sample with a Sampler"
    )


class Course:
    """The way of the ODE between t_min and 1 in the coordinates above, for a process or several under one time.

    Args:
        process: or a dict of processes; positions are ln(u) of the first.
        t_min: the data's end, in [0, 1); None for the processes' own.

    Attributes:
        noisy: level of t = 1.
        clean: level of t_min.
        begin, end: positions of the two.

    Raises:
        ValueError: t_min is out of range, or no noise is left there.
    """

    def __init__(self, process: Processes, t_min: float | None) -> None:
        parts = list(process.values()) if isinstance(process, dict) else [process]
        t = max(part.t_min for part in parts) if t_min is None else t_min
        self.process = process
        self.noisy: Levels = level_at(process, as_time(1.0))
        self.clean: Levels = level_at(process, as_time(t))
        if not all(part.sigma(as_time(t)) > 0 for part in parts):
            raise ValueError(f"no noise is left at t_min = {t}, where the ODE has no end: choose t_min above 0")
        self.begin, self.end = _position(first(self.noisy)), _position(first(self.clean))

    def level(self, position: float) -> Levels:
        """Level at ln(u) = ``position``."""
        if position in (self.begin, self.end):
            return self.noisy if position == self.begin else self.clean
        t = first(self.process).t_from_ratio(math.exp(position) / -math.expm1(position))
        return level_at(self.process, t.clamp(first(self.clean).t, first(self.noisy).t))

    def slope(self, level: Levels, z: Any, x0: Any) -> Any:
        """dz / d ln(u) of every component for E[x_0 | x_t] = ``x0``, all like ``z``."""
        # How fast each component runs through its own ln(u) while the first runs through positions.
        speed = per_component(_speed, self.process, level) if isinstance(level, dict) else 1.0
        pace = first(speed)

        def one(level: Level, speed: Tensor | float, z: Tensor, x0: Tensor) -> Tensor:
            n = size(level)
            return speed / pace * (level.alpha + level.sigma) / n * (level.alpha / n * z - x0)

        return per_component(one, level, speed, z, x0)


def size(level: Level) -> Tensor:
    """n = sqrt(alpha^2 + sigma^2), scale of x = n z."""
    return torch.sqrt(level.alpha**2 + level.sigma**2)


def _position(level: Level) -> float:
    return float(torch.log(level.sigma) - torch.log(level.alpha + level.sigma))


def _speed(process: GaussianProcess, level: Level) -> Tensor:
    """d ln(u) / dt."""
    d_alpha, d_sigma = process.derivatives(level.t)
    return (d_sigma * level.alpha - d_alpha * level.sigma) / (level.sigma * (level.alpha + level.sigma))
