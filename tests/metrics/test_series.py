import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from torch.multiprocessing.spawn import spawn

from datamodules.scaling import Scaling
from lightning_sgm.metrics import AutocorrelationDistance, CorrelationDistance, ValueDistance
from lightning_sgm.metrics.binned import VARIANCES, Grid
from lightning_sgm.metrics.correlations import correlations, pairs
from lightning_sgm.metrics.series import autocorrelations
from lightning_sgm.metrics.windows import first_half
from tests.conftest import SHARED

STOCKS = SHARED / "data" / "time_series" / "stock_data.csv"
needs_stocks = pytest.mark.skipif(not STOCKS.is_file(), reason="no shared data")
ALL: list[Any] = [ValueDistance, CorrelationDistance, AutocorrelationDistance]
UNIT = Grid(-1.0, 1.0, 2.0 / 2044)


def sines(count, seed, length=24, dims=5):
    """Windows in [-1, 1] of section 5 of the specification."""
    draws = np.random.default_rng(seed).uniform(0, 0.1, (count, 1, dims, 2))
    return torch.from_numpy(np.sin(draws[..., 0] * np.arange(length)[:, None] + draws[..., 1]))


def stocks():
    """All windows in [-1, 1], in a fixed random order."""
    rows = np.loadtxt(STOCKS, delimiter=",", skiprows=1)
    rows = 2 * (rows - rows.min(0)) / (rows.max(0) - rows.min(0)) - 1
    windows = torch.from_numpy(rows).unfold(0, 24, 1).mT
    return windows[torch.from_numpy(np.random.default_rng(0).permutation(len(windows)))]


def judged(metric, real, generated, size=1000):
    for windows, is_real in ((real, True), (generated, False)):
        for batch in windows.split(size):
            metric.update(batch, real=is_real)
    return {key: float(value) for key, value in metric.compute().items()}


def dense(u, v, variances=VARIANCES, unbiased=False):
    """Squared MMD over all pairs."""

    def total(a, b):
        square = (a[:, None] - b) ** 2
        return sum((-square / (2 * s)).exp() for s in variances)

    def own(a):
        kernel = total(a, a)
        return (kernel.sum() - kernel.trace()) / (len(a) * (len(a) - 1)) if unbiased else kernel.mean()

    return float(own(u) + own(v) - 2 * total(u, v).mean())


def binned(u, v, grid=UNIT):
    histograms = torch.zeros(2, grid.size, dtype=torch.float64)
    for row, numbers in zip(histograms, (u, v), strict=True):
        grid.add(row[None], numbers[:, None])
    return histograms[:1], histograms[1:]


numbers = st.lists(st.floats(-1, 1), min_size=2, max_size=30).map(lambda x: torch.tensor(x, dtype=torch.float64))


class TestBinnedMMD:
    @given(u=numbers, v=numbers)
    def test_equals_all_pairs(self, u, v):
        p, q = binned(u, v)
        assert float(UNIT.mmd(p, q)) == pytest.approx(dense(u, v), rel=1e-6, abs=1e-8)
        assert float(UNIT.unbiased(p, q)) == pytest.approx(dense(u, v, unbiased=True), rel=1e-6, abs=1e-7)

    @given(u=numbers, v=numbers)
    def test_symmetric_bounded_and_blind_to_order(self, u, v):
        value = float(UNIT.mmd(*binned(u, v)))
        assert 0 <= value <= 18
        assert float(UNIT.mmd(*binned(v, u))) == pytest.approx(value, abs=1e-12)
        assert float(UNIT.mmd(*binned(u.flip(0), v))) == pytest.approx(value, abs=1e-12)
        assert float(UNIT.mmd(*binned(u, u))) == 0

    @pytest.mark.parametrize("distance", [0.0, 1e-4, 0.013, 0.5, 2.0])
    def test_two_point_masses(self, distance):
        """2 (K(0) - K(d))."""
        place = torch.full((3,), -0.9 if distance < 1.9 else -1.0, dtype=torch.float64)
        expected = 2 * sum(1 - math.exp(-(distance**2) / (2 * a)) for a in VARIANCES)
        assert float(UNIT.mmd(*binned(place, place[:1] + distance))) == pytest.approx(expected, rel=1e-5, abs=1e-9)

    def test_every_number_of_a_large_sample_counts(self):
        u, v = torch.randn(900, dtype=torch.float64) / 4, torch.randn(700, dtype=torch.float64) / 3 + 0.01
        grid = Grid(-8.0, 9.0)
        p, q = binned(u, v, grid)
        assert float(p.sum()) == pytest.approx(900, rel=1e-12)
        assert float(grid.mmd(p, q)) == pytest.approx(dense(u, v), rel=1e-6)

    def test_ends_and_beyond(self):
        far = torch.tensor([-1e30, -math.inf, 1.0, 5.0, math.inf], dtype=torch.float64)
        near = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
        assert float(UNIT.mmd(*binned(far, near))) == pytest.approx(0, abs=1e-12)

    def test_nan_is_not_hidden_and_stays_in_its_row(self):
        histograms = torch.zeros(2, UNIT.size, dtype=torch.float64)
        UNIT.add(histograms, torch.tensor([[0.1, math.nan], [0.2, 0.3]]))
        found = UNIT.mmd(histograms, torch.ones_like(histograms))
        assert found.isnan().tolist() == [False, True]


class TestCorrelations:
    def test_are_pearsons_in_the_order_of_pairs(self):
        x = torch.randn(7, 24, 5, dtype=torch.float64)
        row, column = pairs(5)
        assert list(zip(row.tolist(), column.tolist(), strict=True))[:4] == [(1, 0), (2, 0), (2, 1), (3, 0)]
        expected = torch.stack([torch.corrcoef(window.T)[row, column] for window in x])
        torch.testing.assert_close(correlations(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(correlations(x.float()), expected.float(), rtol=0, atol=1e-6)

    @given(scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
    def test_affine_changes_and_signs(self, scale, shift):
        x = torch.randn(3, 10, 3, dtype=torch.float64)
        changed = torch.stack([x[:, :, 0] * scale + shift, -x[:, :, 1], x[:, :, 2]], 2)
        expected = correlations(x) * torch.tensor([-1.0, 1.0, -1.0])
        torch.testing.assert_close(correlations(changed), expected, rtol=0, atol=1e-8)

    def test_equal_dimensions_and_two_time_steps(self):
        x = torch.randn(50, 24, 1)
        torch.testing.assert_close(correlations(torch.cat([x, x, -x], 2)), torch.tensor([[1.0, -1, -1]]).expand(50, 3))
        torch.testing.assert_close(correlations(torch.randn(50, 2, 3)).abs(), torch.ones(50, 3))
        assert correlations(x).shape == (50, 0)

    @pytest.mark.parametrize("constant", [0.0, 0.1, -1.7, 1000.3])
    def test_constant_dimensions(self, constant):
        x = torch.randn(4, 24, 3)
        x[:, :, 1] = constant
        x[1] = constant
        x.requires_grad_(True)
        found = correlations(x)
        assert found[:, [0, 2]].eq(0).all()
        assert found[1].eq(0).all()
        found.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad[:, :, 1].eq(0).all()
        assert x.grad[0, :, 0].ne(0).any()

    def test_rounding_is_no_variation(self):
        x = torch.randn(4, 24, 2)
        x[:, :, 1] = 0.3
        x[:, ::2, 1] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))
        assert correlations(x).eq(0).all()
        narrow = torch.randn(4, 24, 2, dtype=torch.float64)
        torch.testing.assert_close(correlations(1 + 1e-6 * narrow), correlations(narrow), rtol=0, atol=1e-7)

    def test_gradient(self):
        x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(correlations, (x,))

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"windows \(B, L, D\), got the shape \(3, 4\)"):
            correlations(torch.zeros(3, 4))


@pytest.mark.parametrize("kind", ALL)
class TestAll:
    def test_batches_order_and_copies_make_no_difference(self, kind):
        real, generated = sines(60, 0), 0.8 * sines(40, 1)
        expected = judged(kind(), real, generated)
        metric = kind()
        copied = copy.deepcopy(metric)
        assert judged(metric, real.flip(0), generated[torch.randperm(40)], 7) == pytest.approx(expected, abs=1e-12)
        metric.reset()
        assert judged(metric, real, generated, 13) == pytest.approx(expected, abs=1e-12)
        assert judged(copied, real, generated) == pytest.approx(expected, abs=1e-12)

    def test_the_same_windows_have_no_distance(self, kind):
        real = sines(60, 0)
        found = judged(kind(), real, real.flip(0), 11)
        assert found[kind.name] == pytest.approx(0, abs=1e-12)
        assert found["halves"] > 1e-6

    def test_under_inference_mode_and_after_it(self, kind):
        real, generated = sines(20, 0), sines(20, 1)
        expected = judged(kind(), real, generated)
        metric = kind()
        with torch.inference_mode():
            assert judged(metric, real, generated) == pytest.approx(expected, abs=1e-12)
            metric.reset()
        assert judged(metric, real, generated) == pytest.approx(expected, abs=1e-12)
        assert not metric.state_dict()

    def test_nan_among_samples_shows(self, kind):
        real, generated = sines(20, 0), sines(20, 1)
        generated[3, 4, 0] = math.nan
        assert math.isnan(judged(kind(), real, generated)[kind.name])

    def test_bad_input(self, kind):
        metric = kind()
        with pytest.raises(ValueError, match=r"take windows \(B, L, D\), got the shape \(3, 4\)"):
            metric.update(torch.zeros(3, 4), real=True)
        metric.update(sines(3, 0), real=True)
        with pytest.raises(ValueError, match=r"windows of L x D = 24 x 4, but the data's are \(24, 5\)"):
            metric.update(sines(3, 0, dims=4), real=True)
        with pytest.raises(ValueError, match="got 3 and 0"):
            metric.compute()

    @pytest.mark.parametrize("scaling", ["minmax", "standard", "quantile", "window"])
    def test_scaling_is_undone(self, kind, scaling):
        """Windows in any model space give the distances of those in the range's units."""
        real, generated = (torch.exp(sines(30, seed) + torch.arange(5.0)) for seed in (0, 1))
        fitted = Scaling.fit(real, scaling, [True, False, False, True, False])
        spec = {"scaling": fitted.spec, "length": 24, "columns": list("abcde")}
        metric = kind()
        metric.prepare(SimpleNamespace(spec=spec))
        low, high = real.amin((0, 1)), real.amax((0, 1))
        expected = judged(kind(), *(2 * (part - low) / (high - low) - 1 for part in (real, generated)))
        found = judged(metric, fitted.scale(real), fitted.scale(generated))
        # Halves are drawn by the values in float32, which rounding may change.
        assert found[kind.name] == pytest.approx(expected[kind.name], rel=1e-6, abs=1e-9)


def test_halves_are_fair_disjoint_and_belong_to_the_window():
    windows = torch.rand(4000, 6, 2)
    first = first_half(windows, 0)
    assert abs(int(first.sum()) - 2000) < 5 * math.sqrt(1000)
    order = torch.randperm(4000)
    assert torch.equal(first_half(windows[order], 0), first[order])
    assert 0.4 < float((first == first_half(windows, 1)).double().mean()) < 0.6


def test_vds_and_fdds_are_means_over_dimensions_and_pairs():
    real, generated = sines(30, 0, dims=3), sines(25, 1, dims=3) * torch.tensor([1.0, 0.9, 0.5])
    unit = [(part + 1) / 2 for part in (real, generated)]
    each = [dense(*(part[:, :, d].flatten() for part in unit)) for d in range(3)]
    metric = ValueDistance()
    metric.prepare(SimpleNamespace(spec={"columns": ["a", "b", "c"], "length": 24}))
    found = judged(metric, real, generated)
    assert found["vds"] == pytest.approx(np.mean(each), rel=1e-6)
    assert found["worst"] == pytest.approx(max(each), rel=1e-6)
    assert metric.worst == "c"
    torch.testing.assert_close(metric.by_statistic(), torch.tensor(each, dtype=torch.float64), rtol=1e-6, atol=1e-9)

    generated[:, ::2, 1] += 0.3
    each = [dense(*(correlations(part)[:, p] for part in (real, generated))) for p in range(3)]
    other = CorrelationDistance()
    other.prepare(SimpleNamespace(spec={"columns": ["a", "b", "c"], "length": 24}))
    found = judged(other, real, generated)
    assert found["fdds"] == pytest.approx(np.mean(each), rel=1e-6)
    assert other.worst == ["b/a", "c/a", "c/b"][int(np.argmax(each))]


def test_halves_are_the_distance_of_the_halves():
    real = sines(50, 0)
    first = first_half((real + 1) / 2, 3)
    for kind in ALL:
        found = judged(kind(seed=3), real, sines(9, 1))["halves"]
        assert found == pytest.approx(judged(kind(), real[first], real[~first])[kind.name], rel=1e-9)


def test_one_dimension():
    assert judged(ValueDistance(), sines(9, 0, dims=1), sines(9, 1, dims=1))["vds"] > 0
    with pytest.raises(ValueError, match="fdds compares correlations between dimensions, and these data have one"):
        CorrelationDistance().update(sines(3, 0, dims=1), real=True)
    with pytest.raises(ValueError, match="these data have one"):
        CorrelationDistance().prepare(SimpleNamespace(spec={"columns": ["a"], "length": 24}))


class TestAutocorrelation:
    def test_formula(self):
        x = torch.randn(3, 9, 2, dtype=torch.float64)
        x[1, :, 1] = 0.3
        found = autocorrelations(x)
        centred = x - x.mean(1, keepdim=True)
        for lag in range(1, 9):
            expected = (centred[:, lag:] * centred[:, :-lag]).sum(1) / centred.square().sum(1)
            expected[1, 1] = 0
            torch.testing.assert_close(found[:, lag - 1], expected, rtol=0, atol=1e-12)

    def test_distance(self):
        """Alternating signs have r_k = (-1)^k (L - k) / L; two constant halves are correlated at short lags."""
        length = 8
        fast = ((-1.0) ** torch.arange(length))[None, :, None].expand(5, length, 1)
        other = torch.zeros(4, length, 1)
        lags = torch.arange(1, length)
        expected = float(((length - lags) / length).mean())
        found = judged(AutocorrelationDistance(), fast, other)
        assert found["autocorrelation"] == pytest.approx(expected, rel=1e-6)

    def test_needs_two_time_steps(self):
        with pytest.raises(ValueError, match="at least 2 time steps, got 1"):
            AutocorrelationDistance().update(torch.zeros(2, 1, 3), real=True)


class TestFloors:
    """Section 6 of the specification gives ranges over 8 draws, which the median of a few must be in."""

    def test_sines(self):
        pairs_of_sets = [(sines(10000, seed), sines(10000, seed + 10)) for seed in range(3)]
        vds = [judged(ValueDistance(), *sets)["vds"] for sets in pairs_of_sets]
        fdds = [judged(CorrelationDistance(), *sets) for sets in pairs_of_sets]
        assert 3e-5 < np.median(vds) < 3.2e-4
        assert 3e-5 < np.median([found["fdds"] for found in fdds]) < 9e-5
        assert abs(np.median([found["unbiased"] for found in fdds])) < 5e-5
        # Half as many windows: twice the bias.
        assert 6e-5 < np.median([found["halves"] for found in fdds]) < 2e-4

    @needs_stocks
    def test_stocks(self):
        windows, found = stocks(), []
        for _ in range(7):
            parts = windows[torch.randperm(len(windows))].split(1024)
            found.append([judged(kind(), *parts[:2])[kind.name] for kind in (ValueDistance, CorrelationDistance)])
        vds, fdds = np.median(found, axis=0)
        assert 5.9e-4 < vds < 5.3e-3
        assert 8.3e-4 < fdds < 4.6e-3

    @needs_stocks
    def test_halves_are_as_random_ones(self):
        windows, ours, expected = stocks()[:1024], [], []
        for seed in range(60):
            a, b = windows[torch.randperm(1024)].chunk(2)
            expected.append(judged(CorrelationDistance(), a, b)["fdds"])
            ours.append(judged(CorrelationDistance(seed), windows, a)["halves"])
        assert mannwhitneyu(ours, expected).pvalue > 1e-3

    @needs_stocks
    @pytest.mark.parametrize(("deviation", "expected"), [(0.001, 0.028), (0.003, 0.56), (0.01, 3.1)])
    def test_fdds_sees_small_noise_on_stocks(self, deviation, expected):
        windows = stocks()
        noise = 2 * deviation * torch.randn(windows.shape, generator=torch.Generator().manual_seed(0))
        assert judged(CorrelationDistance(), windows, windows + noise)["fdds"] == pytest.approx(expected, rel=0.05)


def _process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    real, generated = sines(40, 0), sines(30, 1)
    for kind in ALL:
        metric = kind()
        # One process has no real windows at all.
        for windows, is_real in ((real if rank else real[:0], True), (generated[rank::2], False)):
            metric.update(windows, real=is_real)
        torch.save(metric.compute(), f"{folder}/{kind.name}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    spawn(_process, (str(tmp_path),), nprocs=2)
    for kind in ALL:
        expected = judged(kind(), sines(40, 0), sines(30, 1))
        for rank in (0, 1):
            found = {key: float(value) for key, value in torch.load(tmp_path / f"{kind.name}{rank}.pt").items()}
            assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_sums_of_two_processes_add_up(kind):
    real, generated = sines(40, 0), sines(30, 1)
    parts = [kind(), kind()]
    for rank, metric in enumerate(parts):
        metric.update(real[rank::2], real=True)
        metric.update(generated[rank::2], real=False)
    whole = kind()
    whole.update(real[:0], real=True)
    for name in whole._defaults:
        setattr(whole, name, getattr(parts[0], name) + getattr(parts[1], name))
    expected = judged(kind(), real, generated)
    assert {key: float(value) for key, value in whole.compute().items()} == pytest.approx(expected, abs=1e-12)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_fdds_is_bounded(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(20, 2, 4, generator=generator), torch.randn(20, 12, 4, generator=generator)
    found = judged(CorrelationDistance(), a, a.flip(0).sign())["fdds"]
    assert 0 <= found <= 18
    assert judged(CorrelationDistance(), b, b)["fdds"] == pytest.approx(0, abs=1e-12)
