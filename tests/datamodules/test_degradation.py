"""Real-ESRGAN's degradation: kernels with closed forms, noise with known moments, shares of a table, one seed each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from datamodules import degradation
from datamodules.degradation import FIRST, SECOND, blur_kernel, blurred, degrade, noisy, sinc_kernel, smallest_side


def smooth_images(count, height, width, seed=0):
    """Coloured clouds, (count, 3, height, width) uint8."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    fine = functional.interpolate(coarse, (height, width), mode="bicubic")
    return (fine.clamp(0.05, 0.95) * 255).byte()


def seeds(*numbers):
    return np.array(numbers, dtype=np.uint64)


# ---- kernels


@settings(max_examples=30)
@given(
    width=st.sampled_from(range(3, 22, 2)),
    sigma=st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)),
    angle=st.floats(-math.pi, math.pi),
    exponent=st.floats(0.5, 4),
    plateau=st.booleans(),
)
def test_blur_kernels_are_averages_without_a_shift(width, sigma, angle, exponent, plateau):
    kernel = blur_kernel(width, sigma, angle, exponent, plateau)
    assert kernel.shape == (width, width)
    assert kernel.min() >= 0
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-7)
    assert kernel.argmax() == width * width // 2


def test_a_gaussian_kernel_has_the_covariance_asked_for():
    kernel = blur_kernel(41, (3.0, 1.5), 0.6, 1.0, plateau=False).double()
    offset = torch.arange(41, dtype=torch.float64) - 20
    place = torch.stack(torch.meshgrid(offset, offset, indexing="ij")[::-1])  # x, y
    found = torch.einsum("ihw,jhw,hw->ij", place, place, kernel)
    axes = torch.tensor([[math.cos(0.6), math.sin(0.6)], [-math.sin(0.6), math.cos(0.6)]], dtype=torch.float64)
    assert torch.allclose(found, axes.T @ torch.diag(torch.tensor([9.0, 2.25]).double()) @ axes, atol=1e-3)
    row = torch.exp(-(offset**2) / 8)
    assert torch.allclose(blur_kernel(41, (2, 2), 1.1, 1.0, False).double(), torch.outer(row, row) / row.sum() ** 2)


def test_other_shapes():
    # 2, 1 and no pixels from the middle with sigma 1: d = 4, 1, 0.
    general = blur_kernel(7, (1, 1), 0, 2.0, plateau=False)[3, 1:4]
    assert (general / general[2]).tolist() == pytest.approx([math.exp(-8), math.exp(-0.5), 1], rel=1e-5)
    plateau = blur_kernel(7, (1, 1), 0, 2.0, plateau=True)[3, 1:4]
    assert (plateau / plateau[2]).tolist() == pytest.approx([1 / 17, 1 / 2, 1], rel=1e-5)


@pytest.mark.parametrize("cutoff", [math.pi / 3, 2.0])
def test_the_sinc_kernel_passes_low_frequencies_of_all_directions_and_no_others(cutoff):
    kernel = sinc_kernel(121, cutoff)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(kernel, kernel.T)
    response = torch.fft.fft2(kernel, (240, 240)).abs()
    frequency = torch.fft.fftfreq(240) * 2 * math.pi
    radius = torch.hypot(frequency[:, None], frequency)
    assert (response[radius < 0.8 * cutoff] - 1).abs().max() < 0.06
    assert response[(radius > 1.15 * cutoff) & (radius < 3)].max() < 0.05
    assert sinc_kernel(9, cutoff).min() < 0


@pytest.mark.parametrize(("height", "width", "size"), [(40, 40, 19), (13, 31, 7), (10, 10, 19)])
def test_blurring_is_the_convolution_with_reflected_borders(height, width, size):
    x = torch.rand(3, height, width)
    kernel = blur_kernel(size, (2.5, 0.7), 0.4, 1.3, plateau=False)
    padded = functional.pad(x[:, None], [size // 2] * 4, mode="reflect")
    assert torch.allclose(blurred(x, kernel), functional.conv2d(padded, kernel[None, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize(("numbers", "widest"), [(FIRST, 19), (SECOND, 13)])
def test_kernels_are_drawn_from_the_table(numbers, widest):
    rng = np.random.default_rng(0)
    kernels = [degradation.random_kernel(numbers, rng) for _ in range(3000)]
    widths = np.array([len(kernel) for kernel in kernels])
    assert sorted(set(widths)) == list(range(3, widest + 1, 2))
    counts = np.bincount(widths)[3::2]
    assert np.abs(counts / 3000 - 1 / len(counts)).max() < 0.03
    # Only sinc kernels have negative lobes, and the wide ones all have.
    negative = [bool(kernel.min() < -1e-6) for kernel in kernels if len(kernel) >= 7]
    assert np.mean(negative) == pytest.approx(0.1, abs=0.025)
    # Symmetric in x and y: one width, .9 (.45 + .12 + .12) = .62, and sinc, .1.
    equal = [torch.allclose(kernel, kernel.T, atol=1e-7) for kernel in kernels if len(kernel) >= 7]
    assert np.mean(equal) == pytest.approx(0.721, abs=0.04)


# ---- sizes and noise


def test_the_numbers_are_those_of_the_table():
    """tad_sr.md section 5, from ResShift's configuration."""
    assert FIRST._asdict() == {
        "width": 21,
        "sigma": (0.2, 3),
        "resize": (0.2, 0.7, 0.1),
        "scale": (0.15, 1.5),
        "gaussian": (1, 30),
        "poisson": (0.05, 3),
    }
    assert SECOND._asdict() == {
        "width": 15,
        "sigma": (0.2, 1.5),
        "resize": (0.3, 0.4, 0.3),
        "scale": (0.3, 1.2),
        "gaussian": (1, 25),
        "poisson": (0.05, 2.5),
    }
    shares = {(circular, shape): share for share, circular, shape in degradation._BLURS}
    assert shares == {
        (True, "gauss"): 0.45,
        (False, "gauss"): 0.25,
        (True, "general"): 0.12,
        (False, "general"): 0.03,
        (True, "plateau"): 0.12,
        (False, "plateau"): 0.03,
    }


@pytest.mark.parametrize("numbers", [FIRST, SECOND])
def test_scales_are_drawn_from_the_table(numbers):
    rng = np.random.default_rng(0)
    scales = np.array([degradation.random_scale(numbers, rng) for _ in range(4000)])
    shares = [np.mean(scales > 1), np.mean(scales < 1), np.mean(scales == 1)]
    assert shares == pytest.approx(numbers.resize, abs=0.03)
    low, high = numbers.scale
    assert low <= scales.min() < low + 0.02
    assert high - 0.02 < scales.max() <= high
    assert scales[scales < 1].mean() == pytest.approx((low + 1) / 2, abs=0.02)


@pytest.mark.parametrize("numbers", [FIRST, SECOND])
def test_noise_is_drawn_from_the_table(numbers):
    rng = np.random.default_rng(1)
    x = torch.full((3, 24, 24), 0.5)  # one level: Poisson counts with mean 1/2, that is with deviation .71 and more
    noises = [noisy(x, numbers, rng) - x for _ in range(600)]
    gray = np.array([torch.allclose(noise[0], noise[1], atol=1e-6) for noise in noises])
    assert gray.mean() == pytest.approx(0.4, abs=0.07)
    values = [noise.abs().unique().numel() for noise in noises]
    gaussian = np.array(values) > 300  # Poisson counts are few
    assert gaussian.mean() == pytest.approx(0.5, abs=0.07)
    deviations = 255 * np.array([float(noise.std()) for noise in noises])[gaussian]
    assert deviations.min() > 0.9
    assert numbers.gaussian[1] * 0.9 < deviations.max() < numbers.gaussian[1] * 1.1
    assert deviations.mean() == pytest.approx(sum(numbers.gaussian) / 2, abs=1.5)


def test_shot_noise_has_the_variance_of_counts():
    """With 256 levels in use: mean 0, variance brightness / 256."""
    x = (torch.arange(256) / 255).view(1, 256, 1).expand(3, 256, 400)
    noise = degradation._shot_noise(x, np.random.default_rng(0))
    assert noise.mean((0, 2)).abs().max() < 0.007
    assert torch.allclose(noise.var((0, 2)), x[0, :, 0] / 256, rtol=0.2, atol=1e-9)
    few = degradation._shot_noise((x * 255 / 64).floor() / 4, np.random.default_rng(0))  # four levels: counts of 4
    assert float(few[:, 192:].var()) == pytest.approx(0.75 / 4, rel=0.02)


def test_noise_stays_in_range():
    for seed in range(20):
        x = noisy(torch.rand(3, 8, 8).round(), FIRST, np.random.default_rng(seed))
        assert (float(x.min()), float(x.max())) == (0, 1)


# ---- the whole


@pytest.mark.parametrize(("factor", "height", "width"), [(1, 60, 80), (2, 80, 64), (3, 63, 96), (4, 64, 64)])
def test_results_are_small_images_much_like_the_large_ones(factor, height, width):
    images = smooth_images(30, height, width)
    low = degrade(images, factor, np.arange(30, dtype=np.uint64))
    assert low.shape == (30, 3, height // factor, width // factor)
    assert low.dtype == torch.uint8
    truth = functional.adaptive_avg_pool2d(images.float(), low.shape[-2:])
    error = (low - truth).flatten(1).square().mean(1).sqrt()
    assert 4 < error.median() < 40
    coarse = [functional.adaptive_avg_pool2d(x.float(), 4).flatten() for x in (low, truth)]
    assert np.corrcoef(torch.stack(coarse).numpy())[0, 1] > 0.9


def test_an_example_depends_on_its_image_and_its_seed_alone():
    images = smooth_images(6, 64, 64)
    together = degrade(images, 4, seeds(5, 6, 7, 8, 2**64 - 1, 10))
    assert torch.equal(degrade(images[3:5], 4, seeds(8, 2**64 - 1)), together[3:5])
    again = degrade(images[:1].expand(8, -1, -1, -1), 4, np.arange(8, dtype=np.uint64))
    assert len({tuple(image.flatten().tolist()) for image in again}) == 8
    assert torch.equal(images, smooth_images(6, 64, 64))


@pytest.mark.parametrize("factor", [1, 4, 8])
def test_smallest_images(factor):
    side = -(-smallest_side(factor) // factor) * factor
    low = degrade(smooth_images(1, side, side).expand(150, -1, -1, -1), factor, np.arange(150, dtype=np.uint64))
    assert low.shape[-1] == side // factor


def test_jpeg_comes_twice_and_before_or_after_the_last_resizing(monkeypatch):
    seen = []

    def jpeg(x, quality):
        seen.append((quality, x.shape[-1]))
        return x

    monkeypatch.setattr("torchvision.transforms.v2.functional.jpeg", jpeg)
    degrade(smooth_images(1, 64, 64).expand(600, -1, -1, -1), 4, np.arange(600, dtype=np.uint64))
    qualities = [quality for quality, _ in seen]
    assert len(seen) == 1200
    assert (min(qualities), max(qualities)) == (30, 95)
    assert np.mean(qualities) == pytest.approx(62.5, abs=2)
    last = [width == 16 for _, width in seen[1::2]]
    # Half of them after it; before it, one of two second rounds keeps the size in 3 of 10 cases.
    assert np.mean(last) == pytest.approx(0.5 + 0.5 * 0.5 * 0.3, abs=0.07)
    # Second rounds leave at most 1.2 times the small size, and 12 of 100 first ones do.
    small = [width <= 19 for _, width in seen[1::2]]
    assert np.mean(small) == pytest.approx(0.5 + 0.25 + 0.25 * 0.12, abs=0.06)
