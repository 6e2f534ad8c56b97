"""A trained model for the tests that need one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sgm.__main__ import main
from tests.conftest import TINY


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a tiny ResShift."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SGM_RUN_DIR", "")  # restored, with the folder, at the end
        assert main(["fit", "--config", "resshift", *TINY["resshift"]]) == 0
    return folder / "runs/resshift/version_0/checkpoints/last.ckpt"
