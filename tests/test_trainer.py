"""predict on files: shares of the processes, names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.methods.image_files import Pictures
from lightning_sgm.tiles import restore_tiled
from lightning_sgm.trainer import Trainer

IMAGE = {"kind": "image", "shape": [3, 8, 8], "classes": 0, "levels": 256, "range": [-1.0, 1.0]}


class Sampling(GenerativeModule):
    """Gray samples; completes nothing."""

    def __init__(self) -> None:
        super().__init__(spec=IMAGE, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.network = nn.Linear(1, 1)

    def sample(self, indices: Tensor, **conditions: Any) -> dict[str, Tensor]:
        return {"x": torch.zeros(len(indices), 3, 8, 8)}


class Enlarging(Sampling):
    """Repeats every pixel twice, in tiles."""

    def inputs(self, path: str) -> Pictures:
        return Pictures(path)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        def twice(low: Tensor, numbers: Tensor) -> Tensor:
            return low.repeat_interleave(2, 2).repeat_interleave(2, 3)

        restored = restore_tiled(twice, batch["low"], 2, multiple=4, tile=8, overlap=2, on_tile=self.on_part)
        return {"x": restored, "before": batch["low"], "index": batch["index"], "name": batch["name"]}


def photographs(folder: Path, count: int) -> dict[str, np.ndarray]:
    """Of different sizes, in two folders."""
    random, found = np.random.default_rng(0), {}
    for i in range(count):
        name = f"{'more/' if i % 2 else ''}p{i}"
        found[name] = random.integers(0, 256, (5 + 9 * i, 30 - 3 * i, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(found[name]).save(folder / f"{name}.png")
    return found


def predict(folder: Path, module: GenerativeModule, processes: int = 1, **options: Any) -> None:
    two: Any = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
    trainer = Trainer(run_dir=str(folder), accelerator="cpu", logger=False, enable_checkpointing=False, **two)
    trainer.predict(module, **options)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_is_completed_by_all_processes(tmp_path: Path, capfd: Any, count: int, processes: int):
    """Two processes, with one picture or two for the first and none or one for the second."""
    pixels = photographs(tmp_path / "in", count)
    predict(tmp_path / "run", Enlarging(), processes, path=str(tmp_path / "in"))
    folder = tmp_path / "run/restored"
    files = {file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.png")}
    assert files == {"samples", *pixels, *(f"panels/{name}" for name in pixels)}
    for name, expected in pixels.items():
        with Image.open(folder / f"{name}.png") as image:
            assert np.array_equal(np.asarray(image), expected.repeat(2, 0).repeat(2, 1))
    out = capfd.readouterr().out
    assert f"{count} samples are in {folder}" in out
    assert f"file {count}/{count} (100.0%)" in out


@pytest.mark.parametrize("processes", [1, 2])
def test_fewer_samples_than_processes(tmp_path: Path, capfd: Any, processes: int):
    predict(tmp_path, Sampling(), processes, num_samples=1)
    assert sorted(file.name for file in (tmp_path / "predictions").iterdir()) == ["000000.png", "samples.png"]
    assert "sample 1/1 (100.0%)" in capfd.readouterr().out


def test_progress_of_two_processes_ends_at_all(tmp_path: Path, capfd: Any):
    predict(tmp_path, Sampling(), 2, num_samples=3)
    assert "sample 3/3 (100.0%)" in capfd.readouterr().out


def test_what_cannot_be_completed_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Sampling completes no files: leave out --data\.path"):
        predict(tmp_path, Sampling(), path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        predict(tmp_path, Enlarging(), path="nowhere")
    with pytest.raises(ValueError, match="leave out num_samples and dataloaders"):
        predict(tmp_path, Enlarging(), path=str(tmp_path), num_samples=3)
