import math

import numpy as np
import pytest
import torch

from lightning_sgm.metrics import EnergyDistance


def filled(real, generated):
    metric = EnergyDistance()
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric


def test_formula():
    a, b = torch.randn(6, 3), torch.randn(4, 3)

    def mean(x, y, same):
        pairs = [float((p - q).norm()) for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)]
        return np.mean(pairs)

    square = 2 * mean(a, b, False) - mean(a, a, True) - mean(b, b, True)
    assert float(filled(a, b).compute()) == pytest.approx(math.copysign(abs(square) ** 0.5, square), rel=1e-5)


def test_two_normal_laws():
    """In one dimension E|X - Y| of normals is known: 2 s / sqrt(pi) for equal ones, s^2 = (variance of X - Y) / 2."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 1, generator=generator)
    b = 2.0 * torch.randn(4000, 1, generator=generator)
    expected = 2 * math.sqrt(2 * 5 / math.pi) - 2 / math.sqrt(math.pi) - 4 / math.sqrt(math.pi)
    assert float(filled(a, b).compute()) ** 2 == pytest.approx(expected, abs=0.02)
    assert abs(float(filled(a, torch.randn(4000, 1, generator=generator)).compute())) < 0.06


def test_batches_make_no_difference_and_shapes_are_flattened():
    a, b = torch.randn(50, 2, 3), torch.randn(40, 2, 3) + 1
    metric = EnergyDistance()
    for piece in a.split(7):
        metric.update(piece, real=True)
    for piece in b.split(11):
        metric.update(piece, real=False)
    assert float(metric.compute()) == pytest.approx(float(filled(a.flatten(1), b.flatten(1)).compute()), rel=1e-6)
    metric.reset()
    with pytest.raises(ValueError, match="needs 2 to 20000 real and generated examples, got 0 and 0"):
        metric.compute()


def test_other_sizes_are_refused():
    metric = filled(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="began with 2 values per example and now got 3"):
        metric.update(torch.randn(3, 3), real=False)
