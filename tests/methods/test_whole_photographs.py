"""Evaluation on whole photographs of any size, by networks that take sides of some sizes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_sgm.codecs import PixelUnshuffle
from lightning_sgm.methods import Distillation
from lightning_sgm.metrics import Fidelity
from lightning_sgm.networks import SwinUNet
from lightning_sgm.objectives import Regression
from tests.methods.restoring import images, model, pictures, ready, spec, trainer


def swin(about: dict[str, Any]) -> SwinUNet:
    """Of squares of 4 x 4 pixels, whose sides must be multiples of 8."""
    return SwinUNet(about, channels=32, multipliers=[1, 2], blocks=1, swin_channels=32, window=4)


def restorer(**more: Any) -> Any:
    about = spec(4, 32)
    module = model(about, PixelUnshuffle(4), network=swin, metrics=[Fidelity()], test_samples=2, **more)
    torch.nn.init.normal_(module.network.out[2].weight, std=0.05)
    return module


def distilled() -> Distillation:
    return Distillation([Regression()], spec(4, 32), teacher=restorer(), metrics=[Fidelity()], warmup=0)


@pytest.mark.parametrize("make", [restorer, distilled])
def test_training_and_evaluation_on_whole_photographs(make: Any, tmp_path: Path):
    """Their sides, 13 and 15 in low resolution, are none that the network takes."""
    folder = pictures(tmp_path / "pictures", 3, 52, 60)
    data = ready(path=str(folder), crop=32, eval_crops=None, crops_per_image=2, batch_size=2)
    module = make()
    run = trainer(tmp_path, max_steps=1, val_check_interval=1, num_sanity_val_steps=1)
    run.fit(module, data)
    assert torch.isfinite(run.callback_metrics["val/loss"])
    (found,) = trainer(tmp_path).test(module.eval(), data, verbose=False)
    assert found["test/loss"] > 0
    assert found["test/samples/fidelity/psnr"] > 5  # of all pixels


def grid(height: int, width: int) -> torch.Tensor:
    """(1, 3, height, width) of places in [-1, 1]: rows, columns and both."""
    rows = torch.linspace(-0.9, 0.9, height)[:, None].expand(height, width)
    columns = torch.linspace(-0.9, 0.9, width).expand(height, width)
    return torch.stack([rows, columns, (rows + columns) / 2])[None]


@pytest.mark.parametrize(("height", "width", "kept"), [(13, 19, (8, 16)), (8, 8, (8, 8)), (41, 17, (24, 16))])
def test_the_middle_of_both(height: int, width: int, kept: tuple[int, int]):
    """Low pixels are the means of 4 x 4 of the high ones; the larger side is that of a tile."""
    module = restorer(tile=24, overlap=8)
    x = grid(4 * height, 4 * width)
    low = F.avg_pool2d(x, 4)
    x0, conditions = module.encode({"x": x, "low": low})
    assert conditions["low"].shape[2:] == kept
    high = module.codec.decode(x0 + conditions["origin"])
    torch.testing.assert_close(F.avg_pool2d(high, 4), conditions["low"], rtol=0, atol=1e-5)
    top, left = ((size - side) // 2 for size, side in zip((height, width), kept, strict=True))
    expected = x[..., 4 * top : 4 * (top + kept[0]), 4 * left : 4 * (left + kept[1])]
    torch.testing.assert_close(high, expected, rtol=0, atol=1e-5)


def test_what_is_smaller_than_the_network_takes_is_refused():
    module, low = restorer(), images(1, 7, 9)
    batch = {"x": images(1, 28, 36), "low": low}
    assert module.encode(batch).conditions["low"].shape[2:] == (7, 8)
    with pytest.raises(ValueError, match="sides are multiples of 8"):
        module.losses(batch, module.sample_draw(torch.arange(1)))


@pytest.mark.parametrize("of", ["model", "teacher"])
def test_training_squares_are_whole_also_where_tiles_are_smaller(of: str):
    large = spec(4, 96)
    if of == "model":
        module = model(large, PixelUnshuffle(4), network=swin, tile=8, overlap=0)
    else:  # which was trained on smaller squares than it teaches
        taught = model(spec(4, 32), PixelUnshuffle(4), network=swin, tile=8, overlap=0)
        module = Distillation([Regression()], large, teacher=taught).teacher
    x, low = images(2, 96, 96), images(2, 24, 24)
    x0, conditions = module.encode({"x": x, "low": low})
    assert torch.equal(conditions["low"], low)
    torch.testing.assert_close(module.codec.decode(x0 + conditions["origin"]), x, rtol=0, atol=1e-5)
