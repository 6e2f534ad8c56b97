"""Moments of data: exact in pieces, and finite where the examples are few."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_sgm.linear_denoiser import LinearDenoiser, LinearPreconditioning, Moments
from lightning_sgm.networks.base import Network
from lightning_sgm.processes import CosineChain
from lightning_sgm.random import Draw

SHAPE, SIZE = (5, 2), 10
CHAIN = CosineChain()


class Constant(Network):
    """Answers 1 everywhere."""

    def forward(self, x, label, /):
        return torch.ones_like(x)


def examples(count, dtype=torch.float64, seed=0, offset=3.0):
    """(count, 5, 2), correlated, with deviations from 1 to 1 / 1000 and means that are larger."""
    draw = Draw(seed)
    mixed = draw.normal((count, SIZE), torch.float64) @ draw.normal((SIZE, SIZE), torch.float64)
    return (offset + mixed * torch.logspace(-3, 0, SIZE, dtype=torch.float64)).view(count, *SHAPE).to(dtype)


def learnt(x):
    """Moments and the covariance that they say."""
    known = Moments(x.shape[1:])
    known.fit(x)
    return known, known.basis @ torch.diag(known.variances) @ known.basis.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("count", "piece"), [(40, 1024), (1500, 1024), (2048, 1024), (41, 7), (40, 1)])
def test_pieces_give_the_covariance_of_the_whole(count, piece, dtype, monkeypatch):
    monkeypatch.setattr("lightning_sgm.linear_denoiser._AT_ONCE", piece)
    x = examples(count, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known, found = learnt(x)
    rows = x.flatten(1).double()
    torch.testing.assert_close(known.mean, rows.mean(0), rtol=1e-14, atol=1e-14)
    expected = torch.cov(rows.T)
    assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert (known.variances.diff() >= 0).all()


@pytest.mark.parametrize("count", [2, 3, 7, SIZE])
def test_of_few_examples_all_directions_live_and_all_is_finite(count):
    x = examples(count)
    with pytest.warns(UserWarning, match=rf"{count} examples of 10 values do not show their covariance") as said:
        known, found = learnt(x)
    assert len([warning for warning in said if "do not show" in str(warning.message)]) == 1
    assert (known.variances > 0).all()
    for value in known.state_dict().values():
        assert value.isfinite().all()
    torch.testing.assert_close(known.basis.T @ known.basis, torch.eye(SIZE).double())
    # Where they do show it, it is theirs; elsewhere it is the least that they show, never more.
    own = torch.cov(x.flatten(1).T)
    shown = torch.linalg.eigvalsh(own)[1 - count :]
    torch.testing.assert_close(known.variances[1 - count :], shown, rtol=1e-8, atol=0)
    torch.testing.assert_close(known.variances[: 1 - count], shown[:1].expand(SIZE - count + 1), rtol=1e-8, atol=0)
    centred = x.flatten(1) - x.flatten(1).mean(0)
    torch.testing.assert_close(centred @ found, centred @ own, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*do not show their covariance")
@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("constant", [False, True])
def test_a_denoiser_of_few_examples_is_finite_and_corrects_all_that_varies(count, constant):
    x = examples(count)
    if constant:
        x[..., 1] = 0.7
    known, _ = learnt(x)
    denoiser = LinearDenoiser(Constant(), CHAIN, LinearPreconditioning(), known)
    noisy = Draw(9).normal((count, *SHAPE), torch.float64).requires_grad_()
    for t in (1 / 250, 0.5, 1.0):
        answer = denoiser.x0(noisy, t)
        (gradient,) = torch.autograd.grad(answer.sum(), noisy)
        assert answer.isfinite().all()
        assert gradient.isfinite().all()
        level = CHAIN.level(torch.full((count,), t, dtype=torch.float64))
        assert denoiser.in_output(answer.detach() - x, level).isfinite().all()
        if constant:
            assert (answer[..., 1] == 0.7).all()
            assert not gradient[..., 1].any()
        assert (answer[..., 0] != known.mean.view(SHAPE)[:, 0]).all()


def test_as_many_examples_as_needed_are_not_complained_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known, _ = learnt(examples(SIZE + 1))
        # A constant value is no lack of examples.
        x = examples(50)
        x[:, 2, 1] = -4.25
        flat, _ = learnt(x)
    assert (known.variances > 0).all()
    assert (flat.variances > 0).sum() == SIZE - 1
    assert flat.mean[5] == -4.25
