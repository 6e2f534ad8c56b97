"""Metrics of restored images: closed forms, other packages' values, released numbers where weights are present."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from datamodules import SuperResolutionDataModule
from datamodules.photographs import BACKGROUNDS
from lightning_sgm.metrics import LPIPS, STLPIPS, Fidelity, NoReference
from lightning_sgm.metrics.restoration import luma, similarity


def images(count, seed, shape=(3, 24, 20)):
    """8-bit images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator) / 127.5 - 1


def noisy(x, deviation, seed=9):
    return x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def fidelity(x, truth, **arguments):
    metric = Fidelity(**arguments)
    metric.update(x, truth)
    return {name: float(value) for name, value in metric.compute().items()}


# ---- PSNR and SSIM


def test_a_shift_by_some_levels():
    """d of 255 levels: 20 log10 (255 / d) decibels; luma moves by 219 / 255 of it."""
    truth = torch.full((2, 3, 16, 16), 0.0)
    values = fidelity(truth + 10 / 127.5, truth)
    assert values["psnr"] == pytest.approx(28.1308036, abs=1e-6)
    assert values["psnr_pooled"] == pytest.approx(28.1308036, abs=1e-6)
    assert values["psnr_y"] == pytest.approx(28.1308036 + 1.3217, abs=1e-3)
    mean = 128 / 255  # 127.5 is rounded to the even 128, 137.5 to 138
    expected = (2 * mean * (mean + 10 / 255) + 1e-4) / (mean**2 + (mean + 10 / 255) ** 2 + 1e-4)
    assert values["ssim"] == pytest.approx(expected, rel=1e-9)


def test_luma_of_pure_colours():
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).double()[:, :, None, None]
    assert (luma(colours).flatten() * 255).tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966])


def test_means_and_pooled_values_against_torchmetrics():
    truth = images(4, 0)
    x = torch.cat([noisy(truth[i : i + 1], 0.02 * 3**i) for i in range(4)])
    values = fidelity(x, truth, rounded=False)
    found, wanted = ((side.double().clamp(-1, 1) + 1) / 2 for side in (x, truth))
    for ending, one, other in (("", found, wanted), ("_y", luma(found), luma(wanted))):
        each = peak_signal_noise_ratio(one, other, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
        assert values[f"psnr{ending}"] == pytest.approx(float(each), abs=1e-5)
        pooled = peak_signal_noise_ratio(one, other, data_range=1.0)
        assert values[f"psnr{ending}_pooled"] == pytest.approx(float(pooled), abs=1e-5)
        whole = structural_similarity_index_measure(one, other, data_range=1.0, return_full_image=True)[1]
        assert values[f"ssim{ending}"] == pytest.approx(float(whole[..., 5:-5, 5:-5].mean()), abs=1e-9)
    assert values["psnr"] > values["psnr_pooled"] + 3


@given(seed=st.integers(0, 1000), deviation=st.floats(0, 1))
def test_similarity_is_symmetric_and_at_most_one(seed, deviation):
    x = (images(2, seed, (1, 12, 15)).double() + 1) / 2
    y = noisy(x, deviation).clamp(0, 1)
    assert torch.allclose(similarity(x, y), similarity(y, x))
    assert similarity(x, y).max() <= 1 + 1e-12
    assert torch.allclose(similarity(x, x), torch.ones(2).double())
    assert torch.allclose(similarity(x.flip(-1).mT, y.flip(-1).mT), similarity(x, y))


def test_images_are_judged_as_files_would_hold_them():
    truth = images(2, 1)
    assert fidelity(truth + 0.4 / 127.5, truth)["psnr"] == 100
    assert 55 < fidelity(truth + 0.4 / 127.5, truth, rounded=False)["psnr"] < 57
    assert fidelity(5 * truth.sign(), truth.sign())["psnr"] == 100
    assert fidelity(truth, truth, most=60.0)["psnr_pooled"] == 60


def test_gray_images_have_no_luma():
    gray, coloured = [(images(3, i, (c, 11, 11)), images(3, i + 1, (c, 11, 11))) for i, c in ((0, 1), (5, 3))]
    assert set(fidelity(*gray)) == {"psnr", "ssim", "psnr_pooled"}
    metric = Fidelity()
    metric.update(*gray)
    metric.update(*coloured)
    mixed = metric.compute()
    assert float(mixed["ssim_y"]) == pytest.approx(fidelity(*coloured)["ssim_y"], rel=1e-12)
    expected = (fidelity(*coloured)["psnr"] + fidelity(*gray)["psnr"]) / 2
    assert float(mixed["psnr"]) == pytest.approx(expected, rel=1e-12)


def test_processes_and_batches_of_other_sizes_merge_to_the_result_of_one():
    sides = [(images(count, count), images(count, count + 50)) for count in (1, 2, 5)]
    sides.append((images(1, 3, (3, 40, 12)), images(1, 4, (3, 40, 12))))
    one, parts = Fidelity(), [Fidelity().to(torch.bfloat16), Fidelity()]
    for place, (x, truth) in enumerate(sides):
        one.update(x, truth, real=False)
        parts[place % 2].update(x, truth)
    parts[0].merge_state(parts[1])
    for name, value in one.compute().items():
        assert float(parts[0].compute()[name]) == pytest.approx(float(value), rel=1e-12)
    one.reset()
    with pytest.warns(UserWarning, match="before"), pytest.raises(ValueError, match="fidelity has seen no image"):
        one.compute()


def test_what_paired_metrics_say_of_themselves():
    for metric in (Fidelity, STLPIPS, LPIPS):
        assert (metric.inputs, metric.paired, metric.floor) == (("x", "truth"), True, False)
    assert NoReference.inputs == ("x",)
    assert not NoReference.paired


@pytest.mark.parametrize(
    ("x", "truth", "message"),
    [
        (images(2, 0), images(1, 0), r"\(2, 3, 24, 20\) and true ones \(1, 3, 24, 20\)"),
        (images(2, 0, (2, 24, 20)), images(2, 0, (2, 24, 20)), r"\(B, 1 or 3, H, W\)"),
        (images(2, 0, (3, 10, 20)), images(2, 0, (3, 10, 20)), "at least 11 x 11 pixels"),
    ],
)
def test_shapes_are_checked(x, truth, message):
    with pytest.raises(ValueError, match=message):
        Fidelity().update(x, truth)


# ---- baselines of tad_sr.md section 10


def baseline(data, mode, *metrics):
    data.setup()
    for batch in data.val_dataloader():
        enlarged = functional.interpolate(batch["low"], scale_factor=4, mode=mode)
        for metric in metrics:
            metric.update(enlarged, batch["x"])
    return [metric.compute() for metric in metrics]


def test_bicubic_on_the_photographs_of_packages():
    """The specification has the mean of china and coffee, 23.512, 24.933 and .7015; this is china's share."""
    (values,) = baseline(SuperResolutionDataModule(eval_crops=None), "bicubic", Fidelity())
    found = [float(values[name]) for name in ("psnr", "psnr_y", "ssim_y")]
    assert found == pytest.approx([21.137, 22.493, 0.640], abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not BACKGROUNDS.is_dir(), reason="budgie-backgrounds is not installed")
@pytest.mark.parametrize(
    ("mode", "expected"), [("bicubic", [29.096, 30.618, 0.8337]), ("nearest", [27.572, 29.157, 0.7994])]
)
def test_baselines_on_budgie(mode, expected):
    data = SuperResolutionDataModule("budgie", long_side=1024, eval_crops=None)
    (values,) = baseline(data, mode, Fidelity())
    found = [float(values[name]) for name in ("psnr", "psnr_y", "ssim_y")]
    assert found == pytest.approx(expected, abs=1e-3)  # the specification's SSIM reflects borders


@pytest.mark.skipif(not find_spec("stlpips_pytorch"), reason="stlpips-pytorch is not installed")
@pytest.mark.parametrize(
    ("net", "expected"), [("alex", [0.4335, 0.3256]), pytest.param("vgg", [0.5397, 0.4133], marks=pytest.mark.slow)]
)
def test_st_lpips_prefers_blocks_with_the_released_weights(net, expected):
    """Measured with the package's own code on china, for bicubic and for nearest."""
    data = SuperResolutionDataModule(eval_crops=None)
    values = [float(baseline(data, mode, STLPIPS(net))[0]) for mode in ("bicubic", "nearest")]
    assert values == pytest.approx(expected, abs=1e-3)


# ---- networks that must be downloaded


def test_lpips_without_weights_says_so(monkeypatch):
    from torchmetrics.image import lpip

    def fail(**_):
        raise OSError("no network")

    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", fail)
    with pytest.raises(ValueError, match=r"weights of vgg, which are not in .* or use STLPIPS"):
        LPIPS("vgg")


class Brightness(nn.Module):
    """Stands for a network of pyiqa: images in [0, 1] to (B, 1)."""

    def forward(self, x):
        assert x.shape[1] == 3
        return x.mean((1, 2, 3))[:, None]


def test_quality_without_reference(monkeypatch):
    package = ModuleType("pyiqa")
    monkeypatch.setattr(package, "create_metric", lambda name: Brightness(), raising=False)
    monkeypatch.setitem(sys.modules, "pyiqa", package)
    metric = NoReference("niqe")
    x = images(5, 0, (1, 8, 8))
    metric.update(x[:2], real=False)
    metric.update(x[2:], real=False)
    metric.update(-torch.ones(3, 3, 8, 8), real=True)  # data do not count
    assert metric.name == "niqe"
    assert float(metric.compute()) == pytest.approx(float((x + 1).mean() / 2), abs=1e-6)


def test_quality_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ValueError, match=r"musiq needs pyiqa: pip install 'lightning_sgm\[quality\]'"):
        NoReference("musiq")
