"""Completion of images: what is known stays to the last digit, and the rest follows the exact posterior."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sgm.denoiser import BaseDenoiser, Denoiser, EDMPreconditioning, GaussianMixtureDenoiser
from lightning_sgm.guidance import Average, Mask, Matrix, PosteriorMatching
from lightning_sgm.methods import Colourise, Inpaint, Restore, ScoreSDE
from lightning_sgm.methods.tasks import Task
from lightning_sgm.networks import UNet
from lightning_sgm.processes import VE, VP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import DPMpp2M, LogUniform, ODESampler, Sampler

PIXELS = {"kind": "image", "shape": [1, 1, 2], "range": [-1.0, 1.0]}
DIGITS = {"kind": "image", "shape": [1, 8, 8], "classes": 0, "levels": 17, "range": [-1.0, 1.0]}
COLOURS = {**DIGITS, "shape": [3, 8, 8]}
FEW = Sampler(DPMpp2M(), steps=4, grid=LogUniform())


def two_pixels(process: Any = None) -> GaussianMixtureDenoiser:
    """Two pixels of variance 1/4 with correlation 0.9."""
    covariance = 0.25 * torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    return GaussianMixtureDenoiser(process or VP(), torch.zeros(1, 2), covariance[None])


def model(spec: dict[str, Any], task: Task, **arguments: Any) -> ScoreSDE:
    torch.manual_seed(0)
    module = ScoreSDE(
        lambda spec: UNet(spec, channels=[8, 8], **arguments),
        spec,
        preconditioning=EDMPreconditioning(0.5),
        sampler=FEW,
        task=task,
    )
    for parameter in module.parameters():
        if not parameter.any():  # new networks answer 0
            torch.nn.init.normal_(parameter, std=0.05)
    return module.eval()


@pytest.mark.parametrize("process", [VP(), VE(0.02, 20.0)])
@pytest.mark.parametrize("sampler", [Sampler(steps=50), Sampler(DPMpp2M(), steps=30, grid=LogUniform())])
def test_the_unknown_pixel_follows_the_exact_posterior(process, sampler):
    """N(0.9 y, 0.25 (1 - 0.81)) beside a pixel known to be y = 0.6."""
    image = torch.tensor([0.6, -5.0]).view(1, 1, 1, 2)  # what is unknown is not looked at
    task = Inpaint(image, torch.tensor([[1, 0]]))
    count = torch.arange(4000)
    found = task.solve(two_pixels(process), sampler, PIXELS, count, Draw(0, keys=count))
    assert torch.equal(found["x"][..., 0], image[..., 0].expand(4000, 1, 1))
    unknown = found["x"][..., 1]
    assert unknown.mean() == pytest.approx(0.54, abs=0.015)
    assert unknown.std() == pytest.approx((0.25 * 0.19) ** 0.5, rel=0.05)
    assert torch.equal(found["before"][0], torch.tensor([[[0.6, 0.0]]]))
    assert torch.equal(found["truth"][0], image[0])


def test_noise_in_measurements_widens_the_posterior():
    """One pixel seen with noise 0.5: mean y / 2 and variance 1/8 for a prior N(0, 1/4)."""
    y = torch.tensor([[0.8]])
    task = Restore(y, Matrix([[1.0, 0.0]], [1, 1, 2]), noise=0.5)
    count = torch.arange(4000)
    x = task.solve(two_pixels(), Sampler(steps=50), PIXELS, count, Draw(0, keys=count))["x"]
    assert x[..., 0].mean() == pytest.approx(0.4, abs=0.025)
    assert x[..., 0].std() == pytest.approx(0.125**0.5, rel=0.05)


def test_noise_is_added_to_whole_images_only():
    whole, count = torch.full((1, 1, 1, 2), 0.5), torch.arange(3000)
    task = Restore(whole, Matrix([[1.0, 0.0]], [1, 1, 2]), noise=0.5)
    found = task.solve(two_pixels(), Sampler(steps=2), PIXELS, count, Draw(0, keys=count))
    assert found["before"][..., 0].std() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(found["truth"], whole.expand_as(found["truth"]))


@pytest.mark.parametrize(
    ("name", "known"),
    [("left", 32), ("right", 32), ("top", 32), ("bottom", 32), ("center", 64 - 36)],
)
def test_named_masks(name: str, known: int):
    mask = Inpaint("unread", name).operator((5, 1, 8, 8), torch.arange(5), Draw(0))
    assert isinstance(mask, Mask)
    assert int(mask.known.sum()) == known
    corner = {"left": (0, 0), "right": (0, 7), "top": (0, 0), "bottom": (7, 0), "center": (0, 0)}[name]
    assert mask.known[corner]
    assert not mask.known[7 - corner[0], 7 - corner[1]] or name == "center"
    assert name != "center" or not mask.known[3:5, 3:5].any()


def test_random_masks_know_their_share_and_differ():
    count = torch.arange(200)
    mask = Inpaint("unread", "random", share=0.3).operator((200, 3, 8, 8), count, Draw(0, keys=count))
    assert isinstance(mask, Mask)
    assert mask.known.shape == (200, 1, 8, 8)
    assert mask.known.float().mean() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(mask.known[0], mask.known[1])


@pytest.mark.parametrize("method", ["posterior", "replacement"])
@pytest.mark.parametrize("mask", ["left", "random"])
def test_a_sample_does_not_depend_on_its_batch(method: Any, mask: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    # Rounding differs with the batch; further conjugate gradients on an untrained network would amplify it.
    module = model(DIGITS, Inpaint(images, mask, method=method, iterations=1))
    whole = module.generate(6)
    for name, part in module.generate(6, batch_size=2).items():
        torch.testing.assert_close(part, whole[name], atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        alone = module.sample(torch.tensor([4]))
    torch.testing.assert_close(alone["x"], whole["x"][4:5], atol=2e-5, rtol=1e-4)
    assert torch.equal(alone["truth"], images[1:2])
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not torch.allclose(module.generate(6)["x"], whole["x"])


@pytest.mark.parametrize("method", ["posterior", "replacement"])
def test_known_pixels_are_kept_bit_by_bit(method: Any):
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    found = model(DIGITS, Inpaint(images, "top", method=method)).generate(2)
    assert torch.equal(found["x"][:, :, :4], images[:, :, :4])
    assert not torch.equal(found["x"][:, :, 4:], images[:, :, 4:])
    assert (found["before"][:, :, 4:] == 0).all()


@pytest.mark.parametrize("method", ["posterior", "replacement"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colourised_pictures_have_the_gray_that_was_given(method: Any, channels: int):
    images = torch.rand(2, channels, 8, 8) * 2 - 1
    found = model(COLOURS, Colourise(images, method=method)).generate(2)
    gray = images.mean(1, keepdim=True)
    torch.testing.assert_close(found["x"].mean(1, keepdim=True), gray, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(found["before"], gray.expand(-1, 3, -1, -1), atol=1e-6, rtol=1e-5)
    assert (found["x"].std(1) > 1e-3).any()
    assert ("truth" in found) == (channels == 3)


@pytest.mark.parametrize("method", ["posterior", "replacement"])
@pytest.mark.parametrize("side", [4, 8])
def test_restored_pictures_have_the_measurement_that_was_given(method: Any, side: int):
    images = torch.rand(2, 1, side, side) * 2 - 1
    found = model(DIGITS, Restore(images, Average(2), method=method)).generate(2)
    small = images if side == 4 else Average(2).measure(images)
    torch.testing.assert_close(Average(2).measure(found["x"]), small, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found["before"], small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert ("truth" in found) == (side == 8)


def test_a_class_and_a_task_together():
    module = model({**DIGITS, "classes": 10}, Inpaint(torch.zeros(1, 1, 8, 8), "left"), conditional=True)
    found = module.generate(12)
    assert torch.equal(found["label"], torch.arange(12) % 10)
    assert not torch.allclose(found["x"][0], found["x"][1])


def test_checkpoints_and_training_pictures_know_nothing_of_the_task():
    module = model(DIGITS, Inpaint(torch.zeros(1, 1, 8, 8), "left"))
    assert "task" not in module.hparams
    assert "label" in module.hparams


class _NoCovariance(BaseDenoiser):
    """Answers with a Jacobian that turns by nearly a right angle, which no covariance does."""

    def x0(self, x, t, **conditions):
        return x @ torch.tensor([[1e-4, 1.0], [-1.0, 1e-4]])


def test_learned_jacobians_that_are_no_covariances_make_no_wild_steps():
    """Two measurements, three iterations: without a bound the answer would be thousands of times the residual."""
    operator = Matrix([[1.0, 0.0]])
    guided = PosteriorMatching(_NoCovariance(VP()), operator, torch.ones(1, 1), iterations=3)
    x0 = guided.x0(torch.zeros(1, 2), torch.tensor(0.5, dtype=torch.float64))
    assert x0.abs().max() < 10


def test_unusable_tasks_are_refused():
    with pytest.raises(ValueError, match="posterior or replacement"):
        Inpaint("x", method="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iterations >= 1"):
        Inpaint("x", iterations=0)
    with pytest.raises(ValueError, match="share"):
        Inpaint("x", share=1.0)
    with pytest.raises(ValueError, match="noise to 0"):
        Restore("x", Average(2), noise=0.1, method="replacement")
    image = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"a mask of shape \(4, 4\)"):
        model(DIGITS, Inpaint(image, torch.ones(4, 4))).generate(1)
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\), got \(2, 1, 6, 8\)"):
        model(DIGITS, Inpaint(torch.zeros(2, 1, 6, 8))).generate(1)
    with pytest.raises(ValueError, match="at least 2 channels"):
        model(DIGITS, Colourise(image)).generate(1)
    with pytest.raises(ValueError, match="whose sides 3 divides"):
        model(DIGITS, Restore(image, Average(3))).generate(1)
    with pytest.raises(FileNotFoundError, match="no mask laft"):
        model(DIGITS, Inpaint(image, "laft")).generate(1)
    module = model(DIGITS, Inpaint(image, method="replacement"))
    module.sampler = ODESampler()
    with pytest.raises(ValueError, match="set method to posterior"):
        module.generate(1)


def test_solvers_without_steps_serve_the_posterior():
    module = model(DIGITS, Inpaint(torch.rand(1, 1, 8, 8), "left"))
    assert isinstance(module.guided, Denoiser)
    module.sampler = ODESampler(rtol=1e-1, atol=1e-1)
    assert module.generate(1)["x"].isfinite().all()


def test_masks_of_their_own_follow_the_sample_numbers():
    images = torch.arange(12.0).view(6, 1, 1, 2) / 10
    masks = torch.tensor([[1, 0], [0, 1], [1, 1]]).view(3, 1, 1, 2)
    task = Inpaint(images, masks)

    def before(numbers):
        index = torch.tensor(numbers)
        return task.solve(two_pixels(), Sampler(steps=2), PIXELS, index, Draw(0, keys=index))["before"]

    everything = before([0, 1, 2, 3, 4, 5])
    assert torch.equal(before([1, 3, 5]), everything[1::2])
    assert torch.equal(everything, torch.where(masks.repeat(2, 1, 1, 1) != 0, images, 0.0))


def test_images_in_bytes_are_refused():
    with pytest.raises(ValueError, match="floats in the range"):
        Inpaint(torch.zeros(1, 1, 1, 2, dtype=torch.uint8)).solve(
            two_pixels(), Sampler(), PIXELS, torch.arange(1), Draw(0, keys=torch.arange(1))
        )
