"""Estimates kept in range; those of residuals are tested with their denoiser."""

import pytest
import torch

from lightning_sgm.denoiser import BaseDenoiser
from lightning_sgm.guidance import InRange
from lightning_sgm.processes import VP

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Wild(BaseDenoiser):
    """Answers 3 x + label."""

    conditions = ("label",)
    classes = 5
    cost = 2

    def x0(self, x, t, **conditions):
        return 3.0 * x + conditions["label"][:, None]


def test_everything_follows_from_the_clipped_estimate():
    inner, label = Wild(VP()), torch.tensor([0, 1, -1])
    denoiser = InRange(inner, -1.0, 1.5)
    assert (denoiser.conditions, denoiser.classes) == (("label",), 5)
    for t in (0.01, torch.tensor([0.2, 0.5, 1.0])):
        level = VP().level(t)
        alpha, sigma = (value.reshape(-1, 1) for value in (level.alpha, level.sigma))
        x0 = (3.0 * X + label[:, None]).clamp(-1.0, 1.5)
        noise = (X - alpha * x0) / sigma
        d_alpha, d_sigma = (value.reshape(-1, 1) for value in VP().derivatives(level.t))
        assert torch.equal(denoiser.x0(X, t, label=label), x0)
        torch.testing.assert_close(denoiser.noise(X, t, label=label), noise)
        torch.testing.assert_close(denoiser.score(X, t, label=label), -noise / sigma)
        torch.testing.assert_close(denoiser.velocity(X, t, label=label), d_alpha * x0 + d_sigma * noise)
    assert denoiser.cost == 2


def test_range_must_be_one():
    with pytest.raises(ValueError, match=r"InRange needs low < high, got 1\.0 and 1\.0"):
        InRange(Wild(VP()), 1.0, 1.0)
