from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import ImageDataModule
from lightning_sgm.denoiser import EDMPreconditioning, GaussianMixtureDenoiser
from lightning_sgm.methods import ScoreSDE
from lightning_sgm.methods.pictures import denoising_strips, loss_curve
from lightning_sgm.networks import MLP
from lightning_sgm.processes import VP, Flow
from lightning_sgm.trainer import Trainer

SPEC = {"kind": "image", "shape": [1, 8, 8], "classes": 0, "levels": 17, "range": [-1.0, 1.0]}


class Data(ImageDataModule):
    """Normal noise of standard deviation 1/2 in place of images."""

    def examples(self, split, count):
        x = 0.5 * torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return {"x": x, "index": torch.arange(len(x))}


@pytest.fixture(params=[VP(), Flow()], ids=["VP", "Flow"])
def model(request: Any, tmp_path: Path) -> Any:
    module: Any = ScoreSDE(MLP(SPEC), SPEC, process=request.param, preconditioning=EDMPreconditioning(0.5))
    exact: Any = GaussianMixtureDenoiser(request.param, torch.zeros(1, 64), 0.25 * torch.eye(64)[None])
    exact.network = module.network
    module.denoiser = module.guided = exact
    module.trainer = Trainer(run_dir=str(tmp_path), logger=False, accelerator="cpu")
    module.trainer.datamodule = Data()
    return module.eval()


def test_the_loss_over_the_levels_is_that_of_the_exact_denoiser(model):
    """Noise error per dimension of data N(0, s^2): alpha^2 s^2 / (alpha^2 s^2 + sigma^2)."""
    curve = loss_curve(model)
    assert curve is not None
    expected = 0.25 / (0.25 + curve.x**2)
    assert curve.log_x
    assert curve.y.double() == pytest.approx(expected.numpy(), abs=0.01)


def test_no_data_no_curve(model):
    model.trainer.datamodule = None
    assert loss_curve(model) is None
    assert list(model.pictures()) == ["denoising"]


def test_strips_go_from_noise_to_the_samples(model):
    strips = denoising_strips(model)["x"]
    assert strips.shape[:2] == (1, 1)
    assert strips.shape[2] == 6 * 68
    frames = strips.shape[3] // 68
    assert 5 <= frames <= 10
    pixels = strips[0, 0].unflatten(0, (6, 68)).unflatten(2, (frames, 68))[:, 6:-2:8, :, 6:-2:8]  # an 8x8 tile each
    samples = model.generate(6)["x"][:, 0]
    assert pixels[:, :, -1] == pytest.approx(samples.numpy(), abs=1e-5)
    assert pixels[:, :, 0].std() == pytest.approx(1.0, abs=0.15)  # noise, scaled
