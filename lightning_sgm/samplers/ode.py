"""The probability-flow ODE as a sampler, and from data back to noise (Song et al. 2021, section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.processes.gaussian import CLEAN
from lightning_sgm.random import Draw
from lightning_sgm.samplers.evaluation import Evaluation, Processes, per_component
from lightning_sgm.samplers.integrators import Course, Integrator, Solver, size
from lightning_sgm.samplers.loop import Shape, start_noise


class ODESampler:
    """Solves the probability-flow ODE with an adaptive solver: samples, and a code for every example.

    It has the face of :class:`~lightning_sgm.samplers.Sampler`, for every process and denoiser. :meth:`encode` runs it
    from data to noise and :meth:`decode` back; under a perfect model the code depends on process and data alone. All
    samples of a batch take the same steps, so a sample depends on its batch within the tolerance. States are solved
    in float64 and shown to the model in the precision of its input. Gradients are left as the caller has them.

    Args:
        solver: "dopri5" (Dormand-Prince, order 5), "dopri8", "bosh3" and "adaptive_heun" by torchdiffeq, on the
            device; "scipy_RK45" (the paper's), "scipy_RK23", "scipy_DOP853" and "scipy_LSODA" on the CPU.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in units of the noisy data's size sqrt(alpha^2 + sigma^2).
        t_min: the data's end, in [0, 1); None for the process's own. The paper samples VP and sub-VP to 1e-3.
        finish: "clean": in the end x_0 of the state at t_min, by one more evaluation (Tweedie's formula). "state": that
            state itself.
        temperature: factor of the start noise, >= 0; below 1 samples are more typical and less diverse.

    Attributes:
        evaluations: network evaluations in the last call, per sample.
    """

    def __init__(
        self,
        solver: Solver = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        t_min: float | None = None,
        finish: Literal["clean", "state"] = "clean",
        temperature: float = 1.0,
    ) -> None:
        self.integrate = Integrator(solver, rtol, atol)
        if t_min is not None and not 0 <= t_min < 1:
            raise ValueError(f"t_min of an ODESampler must lie in [0, 1), got {t_min}")
        if finish not in ("clean", "state"):
            raise ValueError(f"finish of an ODESampler must be clean or state, got {finish!r}")
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        self.t_min, self.temperature = t_min, temperature
        self.finish: Literal["clean", "state"] = finish
        self.evaluations = 0

    def __call__(
        self,
        denoiser: BaseDenoiser,
        shape: Shape | None,
        draw: Draw,
        *,
        start: Any = None,
        on_step: Callable[[int, Any, Any], None] | None = None,
        **conditions: Tensor,
    ) -> Any:
        """Draw samples.

        Args:
            denoiser: the model; a dict of shapes or tensors needs one whose process is a dict too.
            shape: (B, *) of the samples, or a dict of shapes; may be None with ``start``.
            draw: source of the start noise; nothing else is random.
            start: state at t = 1 instead of noise, as :meth:`encode` gives it; the temperature does not touch it.
            on_step: called as on_step(step, level, state) with the state reached by each step of the solver, from 0.
            conditions: passed to the denoiser.

        Returns:
            Samples of ``shape``, float32 (or the dtype of ``start``).

        Raises:
            FloatingPointError: the model's answers are not finite or change too fast for the solver.
        """
        x = self.prior(denoiser.process, shape, draw) if start is None else start
        return self._solve(denoiser, x, conditions, on_step=on_step, clean=self.finish == "clean")

    def encode(self, denoiser: BaseDenoiser, x: Any, **conditions: Tensor) -> Any:
        """Latents at t = 1 of data ``x`` (B, *) or a dict of them, like ``x``.

        They are N(0, sigma(1)^2 I) for data like the model's. Data are taken as states at t_min.
        """
        return self._solve(denoiser, x, conditions, back=True)

    def decode(self, denoiser: BaseDenoiser, latents: Any, **conditions: Tensor) -> Any:
        """Inverse of :meth:`encode` within the tolerance, whatever ``finish`` is; scaled latents give a temperature."""
        return self._solve(denoiser, latents, conditions)

    def levels(self, process: Processes) -> list[Any]:
        """Levels of t = 1 and of t_min, between which the ODE runs."""
        course = Course(process, self.t_min)
        return [course.noisy, course.clean]

    def prior(self, process: Processes, shape: Shape | None, draw: Draw) -> Any:
        """Start noise of ``shape`` at t = 1, N(0, sigma^2 I) times the temperature."""
        noise = start_noise(self.levels(process)[0], shape, draw)
        return per_component(lambda part: self.temperature * part, noise)

    def _solve(
        self,
        denoiser: BaseDenoiser,
        x: Any,
        conditions: dict[str, Tensor],
        back: bool = False,
        clean: bool = False,
        on_step: Callable[[int, Any, Any], None] | None = None,
    ) -> Any:
        """The state at the other end of the course; ``back`` runs from data to noise."""
        course, evaluate = Course(denoiser.process, self.t_min), Evaluation(denoiser, conditions)
        steps = 0

        def state(position: float, flat: Tensor) -> tuple[Any, Any, Any]:
            level = course.level(position)
            z = _unpack(flat, x)
            return level, z, per_component(lambda part, level, like: (part * size(level)).to(like.dtype), z, level, x)

        def slope(position: float, flat: Tensor) -> Tensor:
            level, z, noisy = state(position, flat)
            return _pack(course.slope(level, z, evaluate(noisy, level)))

        def watch(position: float, flat: Tensor) -> None:
            nonlocal steps
            if on_step is not None:
                level, _, noisy = state(position, flat)
                on_step(steps, level, noisy)
            steps += 1

        begin, end = (course.end, course.begin) if back else (course.begin, course.end)
        scaled = per_component(lambda part, level: part.double() / size(level), x, course.level(begin))
        packed = _pack(scaled)
        with torch.autocast(packed.device.type, enabled=False):  # half precision would never meet the tolerance
            level, _, reached = state(end, self.integrate(slope, packed, begin, end, watch))
            reached = evaluate(reached, level) if clean else reached
        if clean and on_step is not None:
            on_step(steps, per_component(lambda part: CLEAN, course.process), reached)
        self.evaluations = evaluate.count
        return reached


def _pack(state: Any) -> Tensor:
    """All components side by side, (B, N) float64."""
    parts = state.values() if isinstance(state, dict) else [state]
    return torch.cat([part.flatten(1).double() for part in parts], 1)


def _unpack(flat: Tensor, like: Any) -> Any:
    """Components of (B, N) in the shapes of ``like``."""
    if not isinstance(like, dict):
        return flat.view_as(like)
    pieces = flat.split([part[0].numel() for part in like.values()], 1)
    return {name: piece.reshape(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def slerp(a: Tensor, b: Tensor, weights: Tensor | Sequence[float]) -> Tensor:
    """Spherical interpolation of latents, along the arc from ``a`` to ``b`` (Song et al. 2021, appendix D.4).

    Points on a straight line between two latents are too short to be noise; those on the arc have the norms of both.

    Args:
        a: (B, *).
        b: latents of the same shape.
        weights: W positions on the arc, 0 for ``a`` and 1 for ``b``.

    Returns:
        (W, B, *). Latents that point the same way, or opposite ways, are interpolated straight.
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp needs latents of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    weight = torch.as_tensor(weights, dtype=torch.float64, device=a.device).reshape(-1, 1)
    unit_a, unit_b = (torch.nn.functional.normalize(part.flatten(1).double(), dim=1) for part in (a, b))
    # Accurate for all angles, unlike the arc cosine.
    angle = 2.0 * torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1))
    straight = torch.sin(angle) < 1e-6
    angle = torch.where(straight, 1.0, angle)
    share_a, share_b = (
        torch.where(straight, share, torch.sin(share * angle) / torch.sin(angle)) for share in (1.0 - weight, weight)
    )
    shape = (len(weight), len(a), *(1,) * (a.ndim - 1))
    return share_a.view(shape).to(a.dtype) * a + share_b.view(shape).to(a.dtype) * b
