"""Exponential moving average of the weights: what validation, samples and checkpoints use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sgm.callbacks.clock import updates


class EMA(Callback):
    """Keeps an average of the trained weights and puts it in place wherever the model is judged or saved.

    After update n = 1, 2, ... the average moves by ``a <- d a + (1 - d) w`` with ``d = min(decay, (1 + n) / (10 + n))``
    (the ramp of TensorFlow's ExponentialMovingAverage and of score_sde's), so that the initial weights are forgotten
    at once. Averaged are the floating-point parameters that require a gradient at the start of
    ``fit``, in the parts named by the module's ``ema_parts``; buffers and frozen parts are used as they are. The
    average is kept in float32 or better, since ``1 - decay`` vanishes in half precision.

    The module holds the average during validation, inside :meth:`averaged`, and from the end of ``fit`` on; the
    next ``fit`` of the same module goes on from the raw weights. Checkpoints hold the average in ``state_dict``, also
    those with weights only, so that loading one needs no EMA; the raw weights of the averaged parts are in
    ``raw_state``, with which resuming is exact.

    Args:
        decay: limit of d, in [0, 1); 0 switches averaging off.
        ramp: whether d rises from 2/11 as above; otherwise it is ``decay`` from the start.
    """

    def __init__(self, decay: float = 0.9999, ramp: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the decay of the EMA must be in [0, 1), got {decay}")
        self.decay = decay
        self.ramp = ramp
        self._module: LightningModule | None = None
        self._strategy: Strategy | None = None
        self._weights: list[Tensor] = []
        self._names: dict[str, int] = {}
        self._average: list[Tensor] = []
        self._low_precision = False
        self._raw: list[Tensor] | None = None
        self._loaded: dict[str, Tensor] = {}
        self._count = 0
        self._seen = 0

    def decay_at(self, n: int) -> float:
        """The factor d of the n-th update, n = 1, 2, ..."""
        return min(self.decay, (1 + n) / (10 + n)) if self.ramp else self.decay

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """The average in place of the weights inside the block; nothing changes where it already is."""
        swapped = self._put_in(pl_module)
        try:
            yield
        finally:
            if swapped:
                self._take_out()

    # Training.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See to it that files hold the average."""
        # Lightning asks callbacks nothing when it saves weights only; the strategy is asked in every case.
        strategy = trainer.strategy
        if stage == "fit" and self._strategy is not strategy:
            original = strategy.lightning_module_state_dict

            def with_average() -> dict[str, Any]:
                state = original()
                if strategy.lightning_module is self._module:
                    state.update({name: self._average[i] for name, i in self._names.items() if name in state})
                return state

            strategy.lightning_module_state_dict = with_average  # type: ignore[method-assign]
            self._strategy = strategy

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the average at the weights, or where the checkpoint or the fit before left it."""
        names, weights = _trained(pl_module)
        if not self._continues(pl_module, weights):
            self._average = [w.detach().clone().to(_averaging_dtype(w)) for w in weights]
            self._raw = None
            if not self._loaded:
                self._count = 0
        self._module, self._names, self._weights = pl_module, names, weights
        self._take_out()
        self._average = [a.to(w.device) for a, w in zip(self._average, weights, strict=True)]
        self._low_precision = any(a.dtype != w.dtype for a, w in zip(self._average, weights, strict=True))
        for name, value in self._loaded.items():
            if name in names:
                self._average[names[name]].copy_(value)
        self._loaded = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting where a resumed run is."""
        self._seen = updates(trainer, pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average once per update since the last batch (none while gradients accumulate)."""
        now = updates(trainer, pl_module)
        kept = 1.0
        for n in range(self._count + 1, self._count + 1 + now - self._seen):
            kept *= self.decay_at(n)
        if kept < 1.0 and self._average:
            weights = self._weights
            if self._low_precision:
                weights = [w.to(a.dtype) for w, a in zip(weights, self._average, strict=True)]
            torch._foreach_lerp_(self._average, weights, 1.0 - kept)
        self._count, self._seen = self._count + now - self._seen, now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The trained model is the average."""
        self._put_in(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the weights in the module, in case validation was interrupted; this allocates nothing."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._take_out()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follow the weights to the device where the strategy left them."""
        if pl_module is self._module:
            self._average = [a.to(w.device) for a, w in zip(self._average, self._weights, strict=True)]
            if self._raw is not None:
                self._raw = [r.to(w.device) for r, w in zip(self._raw, self._weights, strict=True)]

    # Evaluation. Outside fit the average stays, which only matters after a fit that failed.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the average."""
        self._put_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the raw weights further."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._take_out()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the average."""
        self._put_in(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample from the average."""
        self._put_in(pl_module)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Number of updates averaged."""
        return {"updates": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved by :meth:`state_dict`."""
        self._count = int(state_dict["updates"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the raw weights; the average is in ``state_dict`` already."""
        if pl_module is self._module:
            raw = self._weights if self._raw is None else self._raw
            checkpoint["raw_state"] = {name: raw[i].detach() for name, i in self._names.items()}

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """For ``fit``, put the raw weights into the module and remember the average.

        Otherwise the average has just been loaded into the module, and what this callback knew is outdated.
        """
        self._module, self._raw, self._loaded = None, None, {}
        if trainer.state.fn != TrainerFn.FITTING or "raw_state" not in checkpoint:
            return
        parameters = dict(pl_module.named_parameters(remove_duplicate=False))
        for name, value in checkpoint["raw_state"].items():
            if name in parameters:
                parameters[name].copy_(value)
                self._loaded[name] = checkpoint["state_dict"][name].clone()
        if trainer.strategy.restore_checkpoint_after_setup:
            self.on_fit_start(trainer, pl_module)

    # The swap. Between any two lines an exception (Ctrl-C) leaves a state that on_exception or a file recovers from.

    def _put_in(self, pl_module: LightningModule) -> bool:
        """Average into the module; whether that was needed."""
        if pl_module is not self._module or self._raw is not None or not self._average:
            return False
        with torch.no_grad():
            self._raw = [w.detach().clone() for w in self._weights]
            torch._foreach_copy_(self._weights, self._average)
        return True

    def _take_out(self) -> None:
        """Raw weights into the module."""
        if self._raw is not None:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._raw)
            self._raw = None

    def _continues(self, pl_module: LightningModule, weights: list[Tensor]) -> bool:
        """Whether this is the module of the fit before, and nobody has loaded other weights into it since."""
        if pl_module is not self._module or len(weights) != len(self._weights):
            return False
        if any(w is not known for w, known in zip(weights, self._weights, strict=True)):
            return False
        if self._raw is None:
            return True
        return all(torch.equal(w, a.to(w)) for w, a in zip(weights, self._average, strict=True))


def _trained(pl_module: LightningModule) -> tuple[dict[str, int], list[Tensor]]:
    """The parameters to average, and the position of each name among them (tied ones have several names)."""
    chosen: dict[int, Tensor] = {}
    for part in getattr(pl_module, "ema_parts", ()):
        try:
            found = pl_module.get_submodule(part)
        except AttributeError as error:
            raise ValueError(f"`ema_parts` names {part!r}, but {type(pl_module).__name__} has no such part") from error
        for parameter in found.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                chosen[id(parameter)] = parameter
    position = {key: i for i, key in enumerate(chosen)}
    named = pl_module.named_parameters(remove_duplicate=False)
    return {name: position[id(p)] for name, p in named if id(p) in position}, list(chosen.values())


def _averaging_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
