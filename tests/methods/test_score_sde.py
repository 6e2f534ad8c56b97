"""The method on data of any shape, against laws that are known."""

import pytest
import torch

from lightning_sgm.denoiser import EDMPreconditioning, GaussianMixtureDenoiser
from lightning_sgm.methods import ScoreSDE
from lightning_sgm.networks import MLP
from lightning_sgm.processes import EDM, VE, VP, Flow, SubVP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import ChainGrid, ODESampler, Sampler, slerp

SHAPES = {"vectors": [3], "sequences": [6, 2], "images": [1, 4, 4], "volumes": [1, 2, 3, 4]}


def method(shape, process, **arguments):
    spec = {"kind": "array", "shape": shape, "classes": 0, "mean": [0.0], "std": [1.0]}
    return ScoreSDE(MLP(spec, width=32), spec, process=process, preconditioning=EDMPreconditioning(0.5), **arguments)


@pytest.mark.parametrize("process", [VP(), SubVP(), VE(0.01, 50.0), EDM(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", SHAPES)
def test_losses_and_samples_of_any_shape(kind, process):
    model = method(SHAPES[kind], process)
    x = Draw(0).normal((8, *SHAPES[kind]))
    losses = model.losses({"x": x, "index": torch.arange(8)}, Draw(1))
    assert losses["loss"].shape == (8,)
    losses["loss"].mean().backward()
    assert all(p.grad is not None for p in model.network.last.parameters())
    samples = model.generate(5, batch_size=2)["x"]
    assert samples.shape == (5, *SHAPES[kind])
    assert samples.isfinite().all()
    torch.testing.assert_close(samples, model.generate(5, batch_size=5)["x"], rtol=1e-4, atol=1e-4)


def test_a_learnt_law():
    """A few hundred updates on N(m, s^2) in sequences, then its mean and standard deviation."""
    torch.manual_seed(0)
    model = method([4, 2], VP())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(400):
        x = 0.5 + 0.3 * Draw(step).normal((128, 4, 2))
        loss = model.losses({"x": x}, Draw(10000 + step))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    samples = model.generate(500)["x"]
    assert float(samples.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(samples.std()) == pytest.approx(0.3, rel=0.15)


def test_codes_interpolation_and_temperature_through_the_method():
    """Encode, walk on the arc between two codes, decode: what a Python user does with the ODE sampler."""
    process = VP()
    exact = GaussianMixtureDenoiser(process, torch.full((1, 3), 0.3), 0.16 * torch.eye(3)[None])
    sampler = ODESampler()
    model = method([3], process, sampler=sampler)
    model.denoiser = model.guided = exact
    x = 0.3 + 0.4 * Draw(0).normal((6, 3), torch.float64)
    codes = sampler.encode(model.denoiser, x)
    assert (sampler.decode(model.denoiser, codes) - x).abs().max() < 1e-3
    path = slerp(codes[:3], codes[3:], [0.0, 0.5, 1.0])
    ends = sampler.decode(model.denoiser, path[[0, 2]].flatten(0, 1))
    assert (ends - x).abs().max() < 1e-3
    model.sampler.temperature = 0.0
    assert model.generate(4)["x"].std(0).max() < 1e-5


def test_a_grid_that_does_not_fit_is_told_before_training():
    with pytest.raises(ValueError, match="ChainGrid needs a discrete chain, and SubVP is none"):
        method([3], SubVP(), sampler=Sampler(grid=ChainGrid()))
