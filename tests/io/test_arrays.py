from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_sgm.io.arrays import ArrayWriter
from lightning_sgm.io.writers import writer_for

SPEC = {"kind": "array", "shape": [2], "mean": [1.0, -2.0], "std": [0.5, 3.0]}


def test_samples_come_back_in_their_own_units(tmp_path):
    writer = writer_for(SPEC)
    x = torch.randn(7, 2)
    array, picture = writer.save({"x": x}, tmp_path / "a_0.5")
    assert (array.name, picture.name) == ("a_0.5.npy", "a_0.5.png")
    expected = x.numpy() * [0.5, 3.0] + [1.0, -2.0]
    assert np.load(array, allow_pickle=False) == pytest.approx(expected, abs=1e-5)
    assert Image.open(picture).size[0] > 100


def test_parts_of_batches_and_processes_are_joined_in_order(tmp_path):
    writer, x = ArrayWriter(), torch.arange(12.0).view(6, 2)
    files: dict[int, Path] = {}
    for rows in ([4, 1], [0, 2], [5, 3]):
        index = torch.tensor(rows)
        batch = {"x": x[index], "index": index, "label": index % 2}
        files |= dict(zip(rows, writer.save_each(batch, tmp_path), strict=True))
    array, _ = writer.collect([files[i] for i in range(6)], tmp_path / "samples")
    assert np.load(array).tolist() == x.tolist()


@pytest.mark.parametrize("shape", [(1,), (2,), (9, 2), (1, 4, 4), (2, 3, 3, 3)])
def test_every_shape_has_a_picture_in_tensorboard(tmp_path, shape):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    ArrayWriter().log(logger, "samples", {"x": torch.randn(5, *shape)}, 3)
    logger.finalize("success")
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("samples")
    assert event.step == 3
    assert event.width > 100


def test_values_that_are_not_finite_can_be_looked_at(tmp_path):
    x = torch.randn(5, 1, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    ArrayWriter().save({"x": x}, tmp_path / "a")
    assert np.isnan(np.load(tmp_path / "a.npy")[0, 0, 0, 0])
