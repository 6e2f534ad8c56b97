"""Completion of series: known values stay bit by bit, unknown ones follow the exact conditional law."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sgm.denoiser import GaussianMixtureDenoiser
from lightning_sgm.linear_denoiser import LinearDenoiser, LinearPreconditioning
from lightning_sgm.methods import Forecast, Impute
from lightning_sgm.methods.series_tasks import SeriesTask
from lightning_sgm.networks.base import Network
from lightning_sgm.processes import VP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import DPMpp2M, LogUniform, Sampler
from tests.methods.series_models import moments

L, D = 4, 2
COLUMNS = ["a", "b", "c"]
# A stationary autoregressive process x_t = M + A (x_{t-1} - M) + noise of two dimensions, of variances 1 and 1/4.
CORRELATION = torch.tensor([[1.0, 0.3], [0.3, 0.25]], dtype=torch.float64)
STEP = torch.tensor([[0.8, 0.1], [-0.1, 0.6]], dtype=torch.float64)
MEAN = torch.tensor([0.2, -0.1], dtype=torch.float64)


def law():
    """Mean and covariance (8, 8) of windows of four steps: Cov(x_s, x_t) = A^(s - t) C for s >= t."""
    covariance = torch.zeros(L, D, L, D, dtype=torch.float64)
    for s in range(L):
        for t in range(s + 1):
            part = torch.linalg.matrix_power(STEP, s - t) @ CORRELATION
            covariance[s, :, t, :], covariance[t, :, s, :] = part, part.T
    return MEAN.repeat(L), covariance.reshape(L * D, L * D)


def windows(count, seed=0):
    mean, covariance = law()
    return (mean + Draw(seed).normal((count, L * D), torch.float64) @ torch.linalg.cholesky(covariance).T).view(
        count, L, D
    )


class Silent(Network):
    """Answers 0: under LinearPreconditioning the best linear estimate is left."""

    def forward(self, x, label, /):
        return torch.zeros_like(x)


def model_of(kind):
    """The exact denoiser of the process, or a network that corrects nothing."""
    mean, covariance = law()
    if kind == "exact":
        return GaussianMixtureDenoiser(VP(), mean[None], covariance[None])
    variances, basis = torch.linalg.eigh(covariance)
    return LinearDenoiser(Silent(), VP(), LinearPreconditioning(), moments(mean, basis, variances, (L, D)))


def conditional(x, known):
    """Mean and covariance of the unknown values of a window, given the others."""
    mean, covariance = law()
    known, x = known.flatten(), x.flatten()
    cross = covariance[~known][:, known]
    gain = cross @ torch.linalg.inv(covariance[known][:, known])
    return mean[~known] + gain @ (x[known] - mean[known]), covariance[~known][:, ~known] - gain @ cross.T


def check(found, x, known):
    """Samples (n, 4, 2) have the conditional law."""
    count = len(found)
    assert torch.equal(found[:, known], x[known].expand(count, -1))
    mean, covariance = conditional(x.double(), known)
    unknown = found[:, ~known].double()
    # Four standard errors, and 1 % of discretisation.
    deviation = covariance.diagonal().sqrt()
    assert ((unknown.mean(0) - mean).abs() < 4 * deviation / count**0.5 + 0.01 * deviation).all()
    error = (torch.cov(unknown.T) - covariance).abs() / torch.outer(deviation, deviation)
    assert error.max() < 4 * (2 / count) ** 0.5 + 0.02


@pytest.mark.parametrize("kind", ["exact", "linear"])
def test_forecasts_follow_the_exact_conditional_law(kind):
    denoiser = model_of(kind)
    task, count = Forecast(1, iterations=L * D), 3000
    x = windows(1, seed=3).float().expand(count, L, D)
    known = task.known(tuple(x.shape), Draw(0), COLUMNS[:D])
    hidden = torch.where(known, x, 99.0)  # what is unknown is not looked at
    sampler = Sampler(DPMpp2M(), steps=30, grid=LogUniform())
    found = task.complete(denoiser, sampler, hidden, known, Draw(1, torch.arange(count)))
    assert found.dtype == torch.float32
    check(found, x[0], known[0])


@pytest.mark.parametrize("kind", ["exact", "linear"])
def test_gaps_are_filled_by_the_exact_conditional_law_each_window_by_its_own(kind):
    denoiser = model_of(kind)
    task, count = Impute(iterations=L * D), 1500
    masks = torch.tensor([[[1, 0], [0, 0], [1, 1], [0, 1]], [[0, 1], [1, 1], [0, 0], [1, 0]]], dtype=torch.bool)
    masks = torch.stack([masks[0], masks[1], torch.zeros(L, D, dtype=torch.bool)])
    which = torch.arange(3 * count) % 3
    x = windows(3, seed=4).float()
    sampler = Sampler(DPMpp2M(), steps=30, grid=LogUniform())
    found = task.complete(denoiser, sampler, x[which], masks[which], Draw(1, torch.arange(3 * count)))
    for number in range(3):  # the third window has nothing that is known: samples of the process
        check(found[which == number], x[number], masks[number])


@pytest.mark.parametrize("kind", ["exact", "linear"])
def test_replacement_keeps_what_is_known(kind):
    denoiser = model_of(kind)
    task = Forecast(2, method="replacement")
    x = windows(5, seed=3).float()
    known = task.known(tuple(x.shape), Draw(0), COLUMNS[:D])
    sampler = Sampler(steps=10)
    found = task.complete(denoiser, sampler, x, known, Draw(1, torch.arange(5)))
    assert torch.equal(found[known], x[known])
    assert found.isfinite().all()
    assert (found[:, 2:] != x[:, 2:]).any()
    assert sampler.evaluations == 19
    assert not sampler.before  # the model's own sampler is left as it was
    # It is drawn towards what is known, and to all of it where noise has gone.
    far = task.complete(denoiser, sampler, x + 3, known, Draw(1, torch.arange(5)))
    assert ((far - found)[:, 2, 0] > 0.3).all()


# What is known.


def test_a_forecast_knows_all_but_the_last_steps():
    known = Forecast(3).known((5, 8, 2), Draw(0), COLUMNS[:2])
    assert known.shape == (5, 8, 2)
    assert known[:, :5].all()
    assert not known[:, 5:].any()
    assert Forecast(3).horizon == 3
    assert Impute().horizon == 0
    with pytest.raises(ValueError, match="horizon 8 of Forecast leaves nothing known of windows of 8 steps"):
        Forecast(8).known((5, 8, 2), Draw(0), COLUMNS)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("pattern", ["points", "steps", "blocks"])
def test_gaps_have_their_pattern_and_share(pattern: Any, share: float):
    shape = (400, 20, 3)
    known = Impute(share, pattern).known(shape, Draw(0, torch.arange(400)), COLUMNS)
    assert known.shape == shape
    assert float((~known).double().mean()) == pytest.approx(share, abs=0.03)
    assert not torch.equal(known[0], known[1])
    alike = bool((known == known[..., :1]).all())
    assert alike == (pattern == "steps")
    if pattern == "blocks":
        assert ((~known).sum(1) == round(share * 20)).all()
        # One run: it begins once.
        begins = ~known & torch.cat([torch.ones_like(known[:, :1]), known[:, :-1]], 1)
        assert (begins.sum(1) == 1).all()
        # Everywhere: the first and the last step are in some runs.
        assert (~known[:, 0]).any()
        assert (~known[:, -1]).any()


@pytest.mark.parametrize("pattern", ["points", "steps", "blocks"])
def test_gaps_of_a_window_do_not_depend_on_its_batch_and_keep_to_columns(pattern: Any):
    task = Impute(0.5, pattern, columns=["c", "a"])
    whole = task.known((8, 6, 3), Draw(0, torch.arange(8)), COLUMNS)
    index = torch.tensor([6, 1])
    assert torch.equal(task.known((2, 6, 3), Draw(0, index), COLUMNS), whole[index])
    assert whole[..., 1].all()
    assert not whole[..., 0].all()
    assert not whole[..., 2].all()
    with pytest.raises(ValueError, match="Impute names the column 'd', but the series have a, b, c"):
        Impute(columns=["a", "d"]).known((2, 6, 3), Draw(0), COLUMNS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Forecast(0), "horizon of Forecast must be at least 1 step, got 0"),
        (lambda: Forecast(samples=0), "samples >= 1 and iterations >= 1, got 0 and 3"),
        (lambda: Impute(iterations=0), "iterations >= 1"),
        (lambda: Impute(method="magic"), "must be posterior or replacement, got 'magic'"),  # type: ignore[arg-type]
        (lambda: Impute(share=1.0), "strictly between 0 and 1, got 1.0"),
        (lambda: Impute(share=0.0), "strictly between 0 and 1"),
        (lambda: Impute(pattern="holes"), "points, steps or blocks, got 'holes'"),  # type: ignore[arg-type]
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_base_promises_only():
    with pytest.raises(NotImplementedError):
        SeriesTask().known((1, 2, 3), Draw(0), COLUMNS)
