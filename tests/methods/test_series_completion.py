"""Errors of completions: closed forms, brute force, numpy, and independence of batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.scaling import Scaling
from lightning_sgm.denoiser import EDMPreconditioning
from lightning_sgm.methods import Forecast, Impute
from lightning_sgm.methods.series_completion import CompletionTest, band, completed, crps, interpolated
from lightning_sgm.processes import VP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import Sampler
from tests.methods.series_models import D, L, model, named, scaled, spec, values

NAMES = {
    *(f"completion/{name}" for name in ("mae", "rmse", "crps", "coverage_80")),
    *(f"interpolation/{name}" for name in ("mae", "rmse")),
}


class Perfect(Impute):
    """Knows the truth."""

    def complete(self, denoiser, sampler, x, known, draw):
        return x


class Noisy(Impute):
    """The truth and noise of deviation 0.1, of each sample its own."""

    def complete(self, denoiser, sampler, x, known, draw):
        return torch.where(known, x, x + 0.1 * draw.normal(x.shape))


def stand_in(of: dict[str, Any] | None = None) -> Any:
    of = of or spec()
    return SimpleNamespace(
        spec=of,
        scaling=Scaling(of["scaling"]),
        device=torch.device("cpu"),
        denoiser=None,
        sampler=None,
        sample_draw=lambda keys: Draw(7, keys),
    )


def batch(of, count=10, seed=0):
    return {"x": scaled(of, count, seed), "index": torch.arange(count)}


def judged(task, of, parts):
    test, whole = CompletionTest(task), batch(of)
    for part in whole["index"].split(parts):
        test.update(stand_in(of), {name: value[part] for name, value in whole.items()})
    return test.compute()


# The score.


@settings(max_examples=25)
@given(st.integers(2, 7), st.integers(0, 100))
def test_crps_is_that_of_all_pairs(count, seed):
    draw = Draw(seed)
    samples, truth = draw.normal((3, count, 4), torch.float64), draw.normal((3, 4), torch.float64)
    samples[0] = samples[0].round()  # ties
    error = sum((samples[:, i] - truth).abs() for i in range(count)) / count
    pairs = [(samples[:, i] - samples[:, j]).abs() for i in range(count) for j in range(count) if i != j]
    torch.testing.assert_close(crps(samples, truth), error - sum(pairs) / len(pairs) / 2)


def test_crps_of_a_single_sample_is_its_error():
    samples, truth = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[3.0, 0.5]])
    assert crps(samples, truth).tolist() == [[2.0, 2.5]]


def test_crps_of_normal_samples_has_its_closed_form():
    """For N(0, 1) about y: y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi) (Gneiting and Raftery 2007, eq. 5)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    y = torch.tensor([-1.5, 0.0, 0.7], dtype=torch.float64)
    found = crps(Draw(0).normal((20000, 3, 3), torch.float64), y.expand(20000, 3))
    expected = y * (2 * normal.cdf(y) - 1) + 2 * normal.log_prob(y).exp() - torch.pi**-0.5
    error = found.std(0) / 20000**0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert error.max() < 0.01


@pytest.mark.parametrize(("count", "expected"), [(20, 0.8), (9, 0.8), (4, 3 / 5), (1, 0.0)])
def test_a_band_holds_as_many_further_samples_as_it_says(count, expected):
    """Of any continuous law where places are whole, and of uniform numbers everywhere."""
    draws = Draw(1).uniform((40000, count + 1), torch.float64)
    low, high = band(draws[:, :count], 0.1)
    inside = (low <= draws[:, count]) & (draws[:, count] <= high)
    assert float(inside.double().mean()) == pytest.approx(expected, abs=0.008)


def test_a_band_by_hand():
    samples = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 11, 12, 13, 14, 15, 16, 17, 18]]).T[None]
    low, high = band(samples, 0.1)
    assert (low.tolist(), high.tolist()) == ([[1.0]], [[17.0]])
    low, high = band(torch.arange(20.0).view(1, 20, 1), 0.1)
    assert low.item() == pytest.approx(1.1)
    assert high.item() == pytest.approx(17.9)


# Straight lines.


@settings(max_examples=30)
@given(st.integers(1, 9), st.floats(0.05, 0.95), st.integers(0, 100))
def test_interpolation_is_numpys(length, share, seed):
    draw = Draw(seed)
    x, known = draw.normal((4, length, 3), torch.float64), draw.uniform((4, length, 3)) < share
    found = interpolated(x, known)
    for window in range(4):
        for place in range(3):
            mask = known[window, :, place].numpy()
            if not mask.any():
                assert (found[window, :, place] == 0.5).all()
                continue
            steps = np.arange(length)
            expected = np.interp(steps, steps[mask], x[window, mask, place].numpy())
            np.testing.assert_allclose(found[window, :, place].numpy(), expected, rtol=1e-12, atol=1e-12)


# The test.


def test_who_knows_the_truth_makes_no_error():
    found = judged(Perfect(samples=3), spec(), 10)
    assert found.keys() == NAMES
    for name, value in found.items():
        if name.startswith("completion"):
            assert float(value) == pytest.approx(float("coverage" in name), abs=1e-12), name
        else:
            assert float(value) > 0.01


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_errors_do_not_depend_on_batches(parts):
    of = spec(log=True)
    whole, found = (judged(Noisy(samples=5), of, size) for size in (10, parts))
    assert found.keys() == whole.keys() == NAMES
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=named(name))


@pytest.mark.parametrize("log", [False, True])
def test_errors_are_in_units_of_the_range_over_what_was_missing(log):
    of, task = spec(log=log), Noisy(samples=5)
    found = judged(task, of, 10)
    given_ = batch(of)
    answer = completed(stand_in(of), task, given_)
    low, high = (torch.tensor(of["scaling"][name]) for name in ("low", "high"))
    scaling = Scaling(of["scaling"])
    samples = ((scaling.unscale(answer["x"]) - low) / (high - low)).view(10, 5, L, D)
    truth = (values(10) - low) / (high - low)
    missing = answer["before"].view(10, 5, L, D)[:, 0].isnan()
    expected = {
        "completion/mae": (samples.median(1).values - truth)[missing].abs().mean(),
        "completion/rmse": (samples.mean(1) - truth)[missing].square().mean().sqrt(),
        "completion/crps": crps(samples, truth)[missing].mean(),
        "interpolation/mae": (interpolated(truth, ~missing) - truth)[missing].abs().mean(),
        "interpolation/rmse": (interpolated(truth, ~missing) - truth)[missing].square().mean().sqrt(),
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_process_without_windows_computes_too():
    assert CompletionTest(Forecast(2)).compute().keys() == NAMES


# Completions as batches.


@pytest.mark.parametrize("pattern", ["points", "steps", "blocks"])
def test_completions_are_a_batch_for_a_writer(pattern: Any):
    of, task = spec(), Noisy(samples=4, pattern=pattern)
    given_ = {"x": scaled(of, 3), "index": torch.tensor([5, 2, 9])}
    found = completed(stand_in(of), task, given_)
    assert found["group"].tolist() == [5] * 4 + [2] * 4 + [9] * 4
    assert found["index"].tolist() == [*range(20, 24), *range(8, 12), *range(36, 40)]
    x = given_["x"].repeat_interleave(4, 0)
    known = ~found["before"].isnan()
    assert torch.equal(found["truth"], x)
    assert torch.equal(found["before"][known], x[known])
    assert torch.equal(found["x"][known], x[known])
    assert not torch.equal(found["x"][0], found["x"][1])
    assert torch.equal(known[0], known[3])
    # A window's gaps and samples are its own, whatever its batch.
    alone = completed(stand_in(of), task, {name: value[1:2] for name, value in given_.items()})
    for name, value in alone.items():
        torch.testing.assert_close(value, found[name][4:8], equal_nan=True, msg=named(name))


def test_files_have_gaps_of_their_own_and_no_truth():
    of = spec()
    known = torch.zeros(2, L, D, dtype=torch.bool)
    known[:, 1:] = True
    found = completed(stand_in(of), Noisy(samples=2), {**batch(of, 2), "known": known})
    assert "truth" not in found
    assert torch.equal(~found["before"].isnan(), known.repeat_interleave(2, 0))


def test_many_completions_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch):
    of, task = spec(), Noisy(samples=4)
    whole = completed(stand_in(of), task, batch(of, 5))
    monkeypatch.setitem(completed.__globals__, "_AT_ONCE", 7)
    parts = completed(stand_in(of), task, batch(of, 5))
    torch.testing.assert_close(parts, whole, equal_nan=True)


@pytest.mark.parametrize("method", ["posterior", "replacement"])
@pytest.mark.parametrize("task", [Forecast(2, samples=3), Impute(samples=3)])
def test_models_complete_in_inference_mode(task: Any, method: Any):
    """As ``predict`` runs them; the known is kept bit by bit."""
    task.method = method
    module = model(process=VP(), sampler=Sampler(steps=3), preconditioning=EDMPreconditioning(0.5)).eval()
    with torch.inference_mode():
        found = completed(module, task, batch(module.spec, 2))
    known = ~found["before"].isnan()
    assert torch.equal(found["x"][known], found["truth"][known])
    assert found["x"].isfinite().all()
    assert not torch.equal(found["x"][0][~known[0]], found["x"][1][~known[1]])


def test_windows_scaled_by_themselves_are_refused():
    of = spec("window")
    with pytest.raises(ValueError, match=r"train with data\.scaling minmax, standard or quantile"):
        completed(stand_in(of), Forecast(2), batch(of, 2))
