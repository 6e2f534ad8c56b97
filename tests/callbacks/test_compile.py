"""Compilation in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_sgm.callbacks import Compile
from tests.callbacks.tiny import Data, Tiny, module, trainer


class Net(torch.nn.Module):
    """Counts how often Python runs its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
        return self.inner(x)


class WithNet(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.network = Net()  # type: ignore[assignment]


def test_off_by_default_and_in_place_when_on(tmp_path: Path):
    results = {}
    for enabled in (False, True):
        model = module(WithNet)
        keys = list(model.state_dict())
        callback = Compile(enabled=True, backend="eager") if enabled else Compile()
        run = trainer(tmp_path, callback, max_steps=4)
        run.fit(model, Data())
        run.test(model, Data(), verbose=False)
        assert list(model.state_dict()) == keys
        assert (model.network.calls == 0) == enabled
        results[enabled] = model.state_dict()
    torch.testing.assert_close(results[True], results[False])


def test_unknown_part_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="decoder"):
        trainer(tmp_path, Compile(enabled=True, parts=["decoder"]), max_steps=1).fit(module(), Data())
