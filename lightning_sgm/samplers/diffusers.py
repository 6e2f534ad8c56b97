"""Schedulers of the diffusers library as rules, for every Gaussian process and on our own grids.

diffusers knows noise by the index of a training step. Here each scheduler is given a chain whose steps are exactly the
levels of the grid, in the coordinate that all processes share (y = x / alpha at noise sigma / alpha), so its timesteps
never have to be believed.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sgm.processes.gaussian import Level
from lightning_sgm.random import Draw, mix
from lightning_sgm.samplers.evaluation import Evaluation, Levels, Processes, is_clean
from lightning_sgm.samplers.rules import Rule, noise_estimate

_CHAIN = {
    *("num_train_timesteps", "trained_betas", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr"),
    *("prediction_type", "timestep_spacing", "steps_offset", "final_sigmas_type"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"),
}


class _Run(NamedTuple):
    """Memory of a run: the scheduler, the number of its next step, and the scale of its state."""

    scheduler: Any
    step: int
    exploding: bool


class DiffusersRule(Rule):
    """One of diffusers' schedulers with one evaluation a step: DPM-Solver++ (2M, 3M, SDE), UniPC, DEIS, DDIM, Euler...

    The SDE variants of DPMSolverMultistepScheduler take their noise from ``draw``. The other stochastic schedulers
    insist on a generator, which is seeded by ``draw``: a sample then depends on its batch, so a keyed ``draw`` is
    refused. UniPC and SA-Solver keep the last state themselves and do not go with hooks that change it.

    Args:
        scheduler: name of a class of diffusers, or the import path of any class with their face.
        options: its arguments, without those that describe the chain. Estimates are not clipped unless asked for here.
    """

    def __init__(self, scheduler: str = "DPMSolverMultistepScheduler", options: dict[str, Any] | None = None) -> None:
        self.scheduler = scheduler
        self.options = dict(options or {})
        ours = sorted(_CHAIN & set(self.options))
        if ours:
            raise ValueError(f"{', '.join(ours)} of {scheduler} follow from the process and the grid: leave them out")

    def start(self, process: Processes, levels: list[Levels]) -> _Run:
        """A new scheduler whose training steps are ``levels``."""
        noisy, last = [_plain(level) for level in levels[:-1]], _plain(levels[-1])
        if not noisy[0].alpha.any():
            raise ValueError(
                "diffusers' schedulers cannot start at alpha = 0: use a grid in sigma / alpha like LogUniform"
            )
        ratios = torch.stack([level.ratio for level in (*noisy, last)])
        kept = 1.0 / (1.0 + ratios**2)
        scheduler = self._build(kept[:-1].flip(0))
        scheduler.set_timesteps(len(noisy))
        if scheduler.timesteps.tolist() != list(range(len(noisy)))[::-1]:
            raise ValueError(
                f"{self.scheduler} does not make one evaluation at each level of the grid: choose another scheduler, "
                "or the rule Heun for a solver of two stages"
            )
        # Their tables went through float32 products; these are the exact ones.
        scheduler.alphas_cumprod = kept[:-1].flip(0)
        for name, value in (("sigmas", ratios.float()), ("final_alpha_cumprod", kept[-1]), ("one", kept[-1])):
            if hasattr(scheduler, name):
                setattr(scheduler, name, value)
        # Their Euler family has y itself as state and scales it for the network, all others have variance one.
        one = torch.ones(1)
        return _Run(scheduler, 0, not torch.equal(scheduler.scale_model_input(one, scheduler.timesteps[0]), one))

    def __call__(
        self, evaluate: Evaluation, x: Any, level: Levels, target: Levels, draw: Draw, memory: _Run
    ) -> tuple[Tensor, Tensor, _Run]:
        """One step of a copy of the scheduler in ``memory``, or x_0 where no noise is left; see :class:`Rule`."""
        if is_clean(target):
            # What all of them do that can; the others take logarithms of 0.
            x0 = evaluate(x, level)
            return x0, x0, memory
        scheduler, timestep = _copy(memory.scheduler), memory.scheduler.timesteps[memory.step]
        here, there = _plain(level), _plain(target)
        noise = noise_estimate(x, evaluate(x, level), here)
        state = x / _scale(here, memory.exploding)
        accepted = inspect.signature(scheduler.step).parameters
        if scheduler.config.get("algorithm_type", "").startswith("sde") and "variance_noise" in accepted:
            state = scheduler.step(noise, timestep, state, variance_noise=draw.normal(x.shape, x.dtype)).prev_sample
        elif "generator" in accepted:
            generator = torch.Generator().manual_seed(mix(draw.seed, memory.step))
            before = generator.get_state()
            state = scheduler.step(noise, timestep, state, generator=generator).prev_sample
            if draw.keys is not None and not torch.equal(before, generator.get_state()):
                raise ValueError(
                    f"{self.scheduler} draws noise for the whole batch, so samples cannot be exact one by one: "
                    "use a Draw without keys, or a rule of ours such as Ancestral"
                )
        else:
            state = scheduler.step(noise, timestep, state).prev_sample
        x = _scale(there, memory.exploding) * state
        return x, x, memory._replace(scheduler=scheduler, step=memory.step + 1)

    def _build(self, kept: Tensor) -> Any:
        """The scheduler of a chain with alpha-bar ``kept`` (N,), decreasing."""
        path = self.scheduler if "." in self.scheduler else f"diffusers.{self.scheduler}"
        module, _, name = path.rpartition(".")
        try:
            scheduler_class = getattr(importlib.import_module(module), name)
            accepted = inspect.signature(scheduler_class).parameters
        except (ImportError, AttributeError) as error:
            raise ValueError(f"there is no scheduler {path}: {error}") from error
        if not {"trained_betas", "timestep_spacing"} <= set(accepted):
            raise ValueError(f"{path} cannot be given a noise schedule: choose a scheduler with trained_betas")
        unknown = sorted(set(self.options) - set(accepted))
        if unknown:
            raise ValueError(f"{path} has no option {', '.join(unknown)}: its options are {', '.join(accepted)}")
        previous = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
        arguments = {
            "clip_sample": False,
            **self.options,
            "num_train_timesteps": len(kept),
            "trained_betas": (1.0 - kept / previous).tolist(),
            "prediction_type": "epsilon",
            "timestep_spacing": "trailing",
            "final_sigmas_type": "sigma_min",
        }
        return scheduler_class(**{name: value for name, value in arguments.items() if name in accepted})


def _plain(level: Levels) -> Level:
    if isinstance(level, dict):
        raise ValueError(
            "diffusers' schedulers work on single tensors: use one of our rules for states of several parts"
        )
    return level


def _scale(level: Level, exploding: bool) -> Tensor:
    """x = scale * (the scheduler's state)."""
    return level.alpha if exploding else torch.sqrt(level.alpha**2 + level.sigma**2)


def _copy(scheduler: Any) -> Any:
    """A scheduler that can step without changing this one: they replace tensors but change lists in place."""
    twin = copy.copy(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, list):
            setattr(twin, name, list(value))
    return twin
