"""Distillation on the command line: pieces of large pictures, and teachers and parts of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lightning_sgm
from tests.conftest import TINY


@pytest.fixture
def student(cli: Any, teacher: Path, tmp_path: Path) -> Path:
    """Checkpoint of a tiny student."""
    code, _, err = cli("fit", "--config", "tad_sr", *TINY["tad_sr"], f"--model.teacher={teacher}")
    assert code == 0, err
    return tmp_path / "runs/tad_sr/version_0/checkpoints/last.ckpt"


def opened(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_predict_in_tiles_of_student_and_teacher(cli: Any, student: Path):
    """As `predict` of the teacher; its part of the panel changes with the pieces too."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 17, 3), dtype=np.uint8)).save("a.png")
    given = ("predict", "--ckpt_path", student, "--data.path=a.png")
    tiled = ("--model.student.tile=8", "--model.student.overlap=4")
    for name, options in {"whole": (), "tiles": tiled}.items():
        code, _, err = cli(*given, f"--trainer.run_dir={name}", *options)
        assert code == 0, err
    whole, tiles = (opened(f"{name}/restored/panels/a.png") for name in ("whole", "tiles"))
    assert whole.shape == tiles.shape
    before, bicubic, teacher, model = (np.abs(part).mean() for part in np.array_split(whole - tiles, 4, axis=1))
    assert before == bicubic == 0
    assert 0 < teacher < 20  # other noise
    assert 0 < model < 20
    assert not np.array_equal(opened("whole/restored/a.png"), opened("tiles/restored/a.png"))


def test_a_teacher_with_a_network_of_the_users(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recipe that names its module, or --allow, lets the teacher be loaded; nothing stays allowed."""
    (tmp_path / "my_networks.py").write_text(
        "from lightning_sgm.networks import SRResNet\n\n\nclass Mine(SRResNet):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = ("--model.network=my_networks.Mine", "--trainer.run_dir=mine")
    options = [option for option in TINY["resshift"] if not option.startswith("--model.network")]
    code, _, err = cli("fit", "--config", "resshift", *mine, *options)
    assert code == 0, err
    distil = ("fit", "--config", "tad_sr", *TINY["tad_sr"], "--model.teacher=mine/checkpoints/last.ckpt")
    code, _, err = cli(*distil, "--trainer.run_dir=refused")
    assert code != 0
    assert "my_networks" in err
    code, _, err = cli(*distil, "--allow", "my_networks", "--trainer.run_dir=distilled")
    assert code == 0, err
    last = ("--ckpt_path=distilled/checkpoints/last.ckpt", "--data.eval_crops=1", "--data.eval_size=32")
    assert "--allow my_networks" in cli("test", *last, "--trainer.run_dir=no")[2]
    code, out, err = cli("test", *last, "--allow=my_networks", "--trainer.run_dir=yes")
    assert code == 0, err
    assert "test/teacher/fidelity/psnr" in out
    with pytest.raises(ValueError, match="may not import"):
        lightning_sgm.load(Path("distilled/checkpoints/last.ckpt"))
