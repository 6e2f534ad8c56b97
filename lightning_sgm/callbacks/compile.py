"""torch.compile as an option of any run."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn


class Compile(Callback):
    """Compiles parts of the module in place with ``torch.compile``; names in checkpoints stay the same.

    Off by default: on a CPU it costs minutes and gains nothing; on a GPU it usually pays after some hundred steps.
    Every new batch shape compiles again (``drop_last`` in the loader spares one).

    Args:
        enabled: whether anything is compiled.
        parts: names of submodules; by default the trained ones, the module's ``ema_parts``.
        backend: as for ``torch.compile``; "aot_eager" and "eager" are for finding faults.
        mode: as for ``torch.compile`` with the backend "inductor".
    """

    def __init__(
        self,
        enabled: bool = False,
        parts: list[str] | None = None,
        backend: str = "inductor",
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None,
    ) -> None:
        self.enabled = enabled
        self.parts = parts
        self.backend = backend
        self.mode = mode
        self._compiled: list[nn.Module] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile before fit and before any evaluation, each part once."""
        if not self.enabled:
            return
        names: list[str] = self.parts or [*getattr(pl_module, "ema_parts", ())]
        for name in names:
            try:
                part = pl_module.get_submodule(name)
            except AttributeError as error:
                raise ValueError(f"cannot compile {name!r}: {type(pl_module).__name__} has no such part") from error
            if not any(part is known for known in self._compiled):
                part.compile(backend=self.backend, mode=self.mode)
                self._compiled.append(part)
