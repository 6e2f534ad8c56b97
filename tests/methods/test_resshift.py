"""ResShift against closed forms: networks that know the answer, that say nothing, that see little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sgm.codecs import Codec, Identity, PixelUnshuffle
from lightning_sgm.denoiser import EDMPreconditioning
from lightning_sgm.methods import ResShift
from lightning_sgm.networks import SRResNet, SwinUNet, UNet
from lightning_sgm.objectives import DenoisingObjective, NoiseWeight
from lightning_sgm.processes import ResidualShift
from lightning_sgm.residual_denoiser import ResShiftPreconditioning
from lightning_sgm.samplers import ChainGrid, Euler, Sampler
from tests.methods.restoring import Knows, ancestral, awake, images, model, spec, tiny_vq

CODECS = {"Identity": Identity, "PixelUnshuffle": lambda: PixelUnshuffle(4), "Autoencoder": tiny_vq}
every_codec = pytest.mark.parametrize("codec", CODECS)


def bicubic(low, factor=4):
    return F.interpolate(low, scale_factor=factor, mode="bicubic", align_corners=False)


def there_and_back(codec: Codec, x):
    """What is left of images in the space of the model."""
    with torch.no_grad():
        return codec.decode(codec.encode(x)).clamp(-1, 1)


# Spaces.


@every_codec
def test_residuals_lie_around_the_enlarged_image_and_come_back(codec: str):
    module = model(codec=CODECS[codec]())
    x, low = images(), images(3, 4, 4, seed=1)
    x0, conditions = module.encode({"x": x, "low": low})
    assert x0.shape[1:] == module.codec.shape([3, 16, 16])
    with torch.no_grad():
        torch.testing.assert_close(x0 + conditions["origin"], module.codec.encode(x))
        torch.testing.assert_close(conditions["origin"], module.codec.encode(bicubic(low)))
        found = module.decode(x0, conditions)
    assert torch.equal(conditions["low"], low)
    torch.testing.assert_close(found, there_and_back(module.codec, x))
    if codec != "Autoencoder":
        torch.testing.assert_close(found, x)


def test_latents_are_quantised_on_the_way_back_only():
    module = model(codec=tiny_vq())
    x0, conditions = module.encode({"x": images(), "low": images(3, 4, 4)})
    z = x0 + conditions["origin"]
    codes = module.codec.model.quantize.embedding.weight
    nearest = codes[(z.movedim(1, -1).unsqueeze(-2) - codes).square().sum(-1).argmin(-1)].movedim(-1, 1)
    assert (z - nearest).abs().max() > 0.01
    with torch.no_grad():
        expected = module.codec.model.decode(nearest, force_not_quantize=True).sample.clamp(-1, 1)
        torch.testing.assert_close(module.decode(x0, conditions), expected)


def test_enlarging():
    low = images(2, 5, 3)
    module = model(spec(3, 15))
    torch.testing.assert_close(module.enlarge(low), bicubic(low, 3))
    assert torch.equal(module.enlarge(low, "nearest"), low.repeat_interleave(3, 2).repeat_interleave(3, 3))
    assert torch.equal(model(spec(1)).enlarge(low), low)


# Restoring.


@every_codec
@pytest.mark.parametrize("sampler", ["ancestral", "deterministic"])
def test_a_network_that_knows_the_image_restores_it(codec: str, sampler: str):
    made, x, low = CODECS[codec](), images(), images(3, 4, 4, seed=1)
    rule = ancestral(4) if sampler == "ancestral" else Sampler(rule=Euler(), steps=15, grid=ChainGrid())
    module = model(
        codec=made, network=Knows(made.encode(x)), preconditioning=ResShiftPreconditioning("xstart"), sampler=rule
    )
    with torch.no_grad():
        found = module.eval().restore(low, torch.arange(3))
    torch.testing.assert_close(found, there_and_back(made, x), rtol=0, atol=1e-5)


def test_an_untrained_network_of_residuals_enlarges():
    low = images(3, 4, 4, seed=1)
    with torch.no_grad():
        found = model().eval().restore(low, torch.arange(3))
    torch.testing.assert_close(found, bicubic(low).clamp(-1, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_restored_image_is_a_function_of_seed_and_number(monkeypatch: pytest.MonkeyPatch):
    module, low, numbers = awake(model()), images(5, 4, 4), torch.tensor([3, 0, 8, 2**31, 1])
    whole = module.restore(low, numbers)
    for rows in ([0], [4, 2], [1, 3, 0]):
        torch.testing.assert_close(module.restore(low[rows], numbers[rows]), whole[rows], rtol=0, atol=1e-5)
    assert (module.restore(low, numbers + 1) - whole).abs().amax((1, 2, 3)).min() > 1e-3
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert (module.restore(low, numbers) - whole).abs().amax((1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_tiles_of_a_local_network_are_the_whole_image():
    """One evaluation sees 6 pixels of ``low`` far, which is a quarter of the overlap; there is hardly any noise."""
    low = images(2, 96, 64)

    def restored(tile: int | None, overlap: int) -> Tensor:
        local: dict[str, Any] = {
            "codec": PixelUnshuffle(4),
            "process": ResidualShift(kappa=1e-4),
            "sampler": ancestral(1),
        }
        return awake(model(**local, tile=tile, overlap=overlap)).restore(low, torch.arange(2))

    whole = restored(None, 0)
    assert whole.shape == (2, 3, 384, 256)
    assert (whole - bicubic(low).clamp(-1, 1)).abs().max() > 0.1  # the network does something
    assert (restored(32, 24) - whole).abs().max() < 3e-3
    assert (restored(32, 0) - whole).abs().max() > 0.1


@torch.no_grad()
def test_tiles_have_noise_of_their_own():
    """Restored with much noise, the two tiles of one image are not copies of each other."""
    low = images(1, 16, 16).repeat(1, 1, 1, 2)
    module = awake(model(tile=16, overlap=0))
    left, right = module.restore(low, torch.arange(1)).chunk(2, 3)
    assert (left - right).abs().max() > 1e-2


def swin(about):
    return SwinUNet(about, channels=32, multipliers=[1, 2], blocks=1, swin_channels=32, window=4)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 16), (13, 19), (1, 3)])
def test_windows_and_odd_sizes(height: int, width: int):
    module = model(spec(4, 64), PixelUnshuffle(4), network=swin, tile=None).eval()
    torch.nn.init.normal_(module.network.out[2].weight, std=0.05)
    low, numbers = images(2, height, width), torch.arange(2)
    padded = low
    for dim in (2, 3):
        end, wanted = low.shape[dim] - 1, -(-low.shape[dim] // 8) * 8
        order = [i if i <= end else max(0, 2 * end - i) for i in range(wanted)]  # by reflection
        padded = padded.index_select(dim, torch.tensor(order))
    found = module.restore(low, numbers)
    assert found.shape == (2, 3, 4 * height, 4 * width)
    expected = module.restore(padded, numbers)[:, :, : 4 * height, : 4 * width]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - bicubic(padded)[:, :, : 4 * height, : 4 * width].clamp(-1, 1)).abs().max() > 1e-2


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("squares", [1, 2, 4])
@pytest.mark.parametrize("needs", [1, 6, 8])
def test_what_small_images_are_padded_to(factor: int, squares: int, needs: int):
    """The smallest side whose image has a side that codec and network take."""
    network: Any = Knows(torch.zeros(1))
    network.multiple = needs
    module = model(spec(factor, 48), PixelUnshuffle(squares), network=network)
    fitting = [side for side in range(1, 100) if side * factor % (squares * needs) == 0]
    assert module.multiple == fitting[0]
    assert module.tile == min(side for side in range(128, 200) if side % fitting[0] == 0)  # "auto"


# What does not fit is said at once.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": UNet}, "UNet does not see the degraded image: choose a network with the condition low"),
        ({"tile": 12}, "tile must be a multiple of 8 pixels of the small image.*got tile 12 and overlap 16"),
        ({"tile": 16}, "larger than the overlap.*got tile 16 and overlap 16"),
        ({"tile": 16, "overlap": -1}, "0 or more, got tile 16 and overlap -1"),
        ({"sampler": ancestral(16)}, "at most 15 steps"),
        ({"codec": PixelUnshuffle(5)}, "sides divisible by 5, got 64 x 64"),
        ({"codec": PixelUnshuffle(32)}, "multiples of 8.*got \\[2, 2\\]"),
    ],
)
def test_parts_that_do_not_fit(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        model(spec(4, 64), **{"codec": PixelUnshuffle(4), "network": swin, **arguments})


def test_other_data_and_losses_of_noise_do_not_fit():
    with pytest.raises(ValueError, match="ResShift needs 'factor' in the data's spec, but data of kind 'image'"):
        ResShift(SRResNet, {"kind": "image", "shape": [3, 8, 8]})
    with pytest.raises(ValueError, match="perceptual needs an objective that weighs the error of x_0"):
        model(perceptual=object(), objective=DenoisingObjective(weight=NoiseWeight()))
    with pytest.raises(ValueError, match=r"restores images, give it some: --data.path FOLDER"):
        model().sample(torch.arange(2))


def test_the_preconditioning_of_small_models_answers_hardly_more_than_the_enlarged_image():
    """Zero at first, the network leaves the Wiener estimate of the residual, of which little comes from noise."""
    low = images(3, 4, 4, seed=1)
    module = model(preconditioning=EDMPreconditioning(0.1), process=ResidualShift(kappa=0.3), sampler=ancestral(1))
    with torch.no_grad():
        found = module.eval().restore(low, torch.arange(3))
    assert (found - bicubic(low).clamp(-1, 1)).abs().max() < 0.01
