import logging
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.multiprocessing.spawn import spawn

from lightning_sgm.metrics import ClassifierTwoSample, DiscriminativeAccuracy, PredictiveScore
from lightning_sgm.metrics.recurrent import RecurrentNetworks, distinct, sequences, train
from lightning_sgm.metrics.two_sample import features
from lightning_sgm.random import Draw
from tests.metrics.test_series import needs_stocks, sines, stocks

CPU = torch.device("cpu")


def judged(metric, real, generated):
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return {key: float(value) for key, value in metric.compute().items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class TestNetworks:
    def test_cell_is_tensorflows(self):
        """h' = u h + (1 - u) tanh([x, r h] V + d), [r, u] = sigmoid([x, h] W + b), one network and step at a time."""
        networks = RecurrentNetworks(3, 4, 2, Draw(0), CPU)
        with torch.no_grad():
            for parameter, noise in zip(networks.parameters, map(torch.randn_like, networks.parameters), strict=True):
                parameter += 0.3 * noise
        windows = torch.rand(9, 5, 4)
        rows = torch.tensor([[0, 1], [5, 8], [2, 2]])
        states = networks.states(sequences(windows, rows))
        outputs = networks.outputs(states)
        assert states.shape == (5, 3, 2, 2)
        assert outputs.shape == (5, 3, 2)
        for network in range(3):
            w, b, v, d, out, out_bias = (p[network].detach().double().numpy() for p in networks.parameters)
            for place, row in enumerate(rows[network].tolist()):
                h = np.zeros(2)
                for time, x in enumerate(windows[row].double().numpy()):
                    r, u = np.split(sigmoid(np.concatenate([x, h]) @ w + b[0]), 2)
                    h = u * h + (1 - u) * np.tanh(np.concatenate([x, r * h]) @ v + d[0])
                    np.testing.assert_allclose(states[time, network, :, place].detach(), h, atol=1e-6)
                    expected = h @ out + out_bias[0]
                    np.testing.assert_allclose(outputs[time, network, place].detach(), expected[0], atol=1e-6)

    def test_initial_values(self):
        networks = RecurrentNetworks(50, 6, 3, Draw(0), CPU)
        gate, gate_bias, candidate, candidate_bias, out, out_bias = networks.parameters
        for kernel, limit in ((gate, 6 / (9 + 6)), (candidate, 6 / (9 + 3)), (out, 6 / (3 + 1))):
            assert float(kernel.detach().abs().max()) == pytest.approx(limit**0.5, rel=0.03)
            assert float(kernel.detach().var()) == pytest.approx(limit / 3, rel=0.1)
        assert gate_bias.eq(1).all()
        assert candidate_bias.eq(0).all()
        assert out_bias.eq(0).all()

    def test_networks_learn_as_if_alone(self):
        """Together or one by one: the same batches and initial values give the same parameters."""
        windows = torch.rand(50, 6, 3)
        together = RecurrentNetworks(2, 3, 2, Draw(0), CPU)
        alone = RecurrentNetworks(1, 3, 2, Draw(1), CPU)
        with torch.no_grad():
            for one, both in zip(alone.parameters, together.parameters, strict=True):
                one.copy_(both[1:])

        def loss_of(networks):
            return lambda rows: (
                networks.outputs(networks.states(sequences(windows, rows[0]))[-1]).square().mean(1).sum()
            )

        pools = [torch.arange(30), torch.arange(30, 37)]
        # The second pool is smaller than a batch, so that each batch is all of it, in some order.
        train(together.parameters, loss_of(together), [pools], 20, Draw(2), "test")
        train(alone.parameters, loss_of(alone), [pools[1:]], 20, Draw(3), "test")
        for one, both in zip(alone.parameters, together.parameters, strict=True):
            torch.testing.assert_close(one[0], both[1], rtol=0, atol=2e-5)

    def test_training_says_how_far_it_is(self, monkeypatch, caplog):
        monkeypatch.setattr("lightning_sgm.metrics.recurrent._SECONDS", 0.0)
        networks = RecurrentNetworks(1, 2, 1, Draw(0), CPU)
        windows = torch.rand(9, 3, 2)
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            train(
                networks.parameters,
                lambda rows: networks.states(sequences(windows, rows[0])).sum(),
                [[torch.arange(9)]],
                250,
                Draw(0),
                "score",
            )
        assert "score: 100 of 250 iterations, about" in caplog.text


@pytest.mark.parametrize(("high", "count"), [(7, 3), (5, 5), (40, 4)])
def test_distinct_choices_are_uniform(high, count):
    found = distinct(Draw(0), high, count, 20000)
    assert found.shape == (20000, count)
    assert all(len(set(row)) == count for row in found[:500].tolist())
    for column in found.T:
        counts = torch.bincount(column, minlength=high)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    if high == 7:  # and so are pairs
        pair = found[:, 0] * 7 + found[:, 1]
        counts = torch.bincount(pair, minlength=49).view(7, 7)
        assert counts.diagonal().eq(0).all()
        assert stats.chisquare(counts[~torch.eye(7, dtype=torch.bool)].numpy()).pvalue > 1e-4


QUICK = [
    lambda **options: DiscriminativeAccuracy(iterations=30, **options),
    lambda **options: PredictiveScore(iterations=30, **options),
]


@pytest.mark.parametrize("make", QUICK)
class TestBothScores:
    @pytest.mark.parametrize("repeats", [2, 3, 7])
    def test_interval(self, make, repeats):
        """Mean and Student's t interval of the repeats' scores, as scipy has them."""
        metric = make(repeats=repeats)
        scores = torch.rand(2, repeats)
        metric.scores = lambda windows, duels: scores
        found = judged(metric, sines(40, 0), sines(30, 1))
        values, name = scores[0].double().numpy(), metric.name
        assert found[name] == pytest.approx(values.mean())
        assert found[f"{name}_standard_error"] == pytest.approx(stats.sem(values))
        low, high = stats.t.interval(0.95, repeats - 1, loc=values.mean(), scale=stats.sem(values))
        assert found[f"{name}_interval"] == pytest.approx((high - low) / 2)
        assert found["halves"] == pytest.approx(float(scores[1].mean()))

    def test_who_is_judged_against_whom(self, make):
        """Real windows against samples, and a half of the real ones against the other."""
        metric = make()
        seen: list[list[torch.Tensor]] = []

        def scores(windows, duels):
            seen.extend([windows[rows] for rows in duel] for duel in duels)
            return torch.zeros(2, 5)

        metric.scores = scores
        real, generated = sines(40, 0), sines(30, 1)
        judged(metric, real, generated)

        def rows(windows):
            return sorted(map(tuple, windows.flatten(1).tolist()))

        unit = [((part + 1) / 2).float() for part in (real, generated)]
        assert [rows(part) for part in seen[0]] == [rows(part) for part in unit]
        assert rows(torch.cat(seen[1])) == rows(unit[0])
        assert min(map(len, seen[1])) > 10

    def test_one_repeat_has_no_error(self, make):
        metric = make(repeats=1)
        found = judged(metric, sines(30, 0), sines(30, 1))
        assert math.isfinite(found[metric.name])
        assert math.isfinite(found["halves"])
        assert math.isnan(found[f"{metric.name}_standard_error"])

    def test_reproducible_whatever_the_batches(self, make):
        real, generated = sines(30, 0), sines(30, 1)
        expected = judged(make(), real, generated)
        metric = make()
        for batch in real.flip(0).split(7):
            metric.update(batch, real=True)
        for batch in generated[torch.randperm(30)].split(9):
            metric.update(batch, real=False)
        torch.manual_seed(5)
        with torch.inference_mode():  # as in test
            assert {key: float(value) for key, value in metric.compute().items()} == expected
        assert judged(make(seed=1), real, generated) != expected

    def test_under_inference_mode(self, make):
        real, generated = sines(30, 0), sines(30, 1)
        expected = judged(make(), real, generated)
        with torch.inference_mode():
            metric = make()
            assert judged(metric, real, generated) == expected
            metric.reset()
        with torch.no_grad():
            assert judged(metric, real, generated) == expected

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_few_dimensions(self, make, dims):
        found = judged(make(), sines(30, 0, dims=dims), sines(30, 1, dims=dims))
        assert all(math.isfinite(value) for value in found.values())

    def test_nan_among_samples_shows(self, make):
        metric = make()
        generated = sines(30, 1)
        generated[3, 4, 0] = math.inf
        assert math.isnan(judged(metric, sines(30, 0), generated)[metric.name])

    def test_too_few(self, make):
        with pytest.raises(ValueError, match="needs at least 10 real and 10 generated windows, got 30 and 9"):
            judged(make(), sines(30, 0), sines(9, 1))
        with pytest.raises(ValueError, match="needs 20 real windows to halve them, got 12: set halves to false"):
            judged(make(), sines(12, 0), sines(12, 1))
        with pytest.raises(ValueError, match="at least 1 repeat and 1 iteration, got 0 and 30"):
            make(repeats=0)


class TestDiscriminative:
    def test_unequal_counts_do_not_help(self):
        """A blind classifier has accuracy 1/2 whatever the share of samples."""
        real = sines(400, 0)
        found = judged(DiscriminativeAccuracy(iterations=1, halves=False), real, sines(60, 1))
        assert found["discriminative"] < 0.15

    def test_other_laws_are_seen(self):
        found = judged(DiscriminativeAccuracy(iterations=400), sines(400, 0), torch.randn(400, 24, 5) * 0.3)
        assert found["discriminative"] > 0.45
        assert found["halves"] < 0.1


class TestPredictive:
    def test_a_constant_last_dimension_is_predicted(self):
        real = sines(40, 0, length=5)
        real[:, :, -1] = 0.2
        found = judged(PredictiveScore(iterations=800, repeats=2), real, real.flip(1))
        assert found["predictive"] < 0.05
        assert found["halves"] < 0.05
        generated = real.clone()
        generated[:, :, -1] = -0.6  # 0.2 in place of 0.6 in [0, 1]
        found = judged(PredictiveScore(iterations=800, repeats=2, halves=False), real, generated)
        assert found["predictive"] == pytest.approx(0.4, abs=0.05)

    def test_needs_two_time_steps(self):
        with pytest.raises(ValueError, match="predictive predicts the next time step, and these windows have one"):
            PredictiveScore().update(torch.zeros(3, 1, 2), real=True)


class TestTwoSample:
    def test_equal_laws(self):
        found = judged(ClassifierTwoSample(), sines(300, 0), sines(300, 1))
        error = found["two_sample_standard_error"]
        assert error == pytest.approx((0.25 / 600) ** 0.5, rel=0.01)
        assert found["two_sample"] < 4 * error
        assert found["halves"] < 4 * (0.25 / 280) ** 0.5

    @pytest.mark.parametrize("deviation", [0.001, 0.03])
    def test_noise_that_recurrent_networks_miss(self, deviation):
        generated = sines(200, 1) + 2 * deviation * torch.randn(200, 24, 5)
        assert judged(ClassifierTwoSample(halves=False), sines(200, 0), generated)["two_sample"] > 0.49

    def test_balanced_and_limited(self):
        """Of unequal sides as many are used as of the smaller one, and at most the limit."""
        for limit, count in ((2000, 60), (50, 50)):
            found = judged(ClassifierTwoSample(limit, halves=False), sines(200, 0), sines(60, 1))
            accuracy = [0.5 + sign * found["two_sample"] for sign in (1, -1)]
            expected = [(share * (1 - share) / (2 * count)) ** 0.5 for share in accuracy]
            assert found["two_sample_standard_error"] == pytest.approx(expected[0])

    def test_features(self):
        x = torch.randn(4, 24, 3, dtype=torch.float64)
        found = features(x)
        assert found.shape == (4, 2 * 3 + 3 * (3 + 3 + 4))
        torch.testing.assert_close(found[:, 6:9], x.mean(1))
        assert features(torch.randn(4, 3, 1)).shape == (4, 3 + 3 + 2)
        assert features(torch.randn(2, 5, 30)).shape == (2, 2 * 150 + 30 * (3 + 3 + 3))
        with pytest.raises(ValueError, match="at least 3 time steps, got 2"):
            features(torch.zeros(4, 2, 3))

    def test_nan_shows_and_bad_input(self):
        generated = sines(30, 1)
        generated[0, 0, 0] = math.nan
        assert math.isnan(judged(ClassifierTwoSample(), sines(30, 0), generated)["two_sample"])
        with pytest.raises(ValueError, match="limit of two_sample must be at least 10, got 3"):
            ClassifierTwoSample(3)


def _process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metric = DiscriminativeAccuracy(iterations=20)
    metric.update(sines(40, 0)[rank::2], real=True)
    if rank == 0:  # the other one has no sample
        metric.update(sines(30, 1), real=False)
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_one_without_samples(tmp_path):
    spawn(_process, (str(tmp_path),), nprocs=2)
    expected = judged(DiscriminativeAccuracy(iterations=20), sines(40, 0), sines(30, 1))
    for rank in (0, 1):
        found = {key: float(value) for key, value in torch.load(tmp_path / f"{rank}.pt").items()}
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
@needs_stocks
def test_scores_of_stocks():
    """Section 6 of the specification: the reference's TensorFlow code gave 0.0363, and 0.032 and 0.007 for redraws."""
    windows = stocks()
    real, redrawn = windows[:1024], windows[torch.randint(len(windows), (1024,))]
    assert judged(PredictiveScore(repeats=2, halves=False), real, redrawn)["predictive"] == pytest.approx(
        0.0363, abs=2e-3
    )
    assert judged(DiscriminativeAccuracy(halves=False), real, redrawn)["discriminative"] < 0.06
    coarse = redrawn + 0.3 * torch.randn(redrawn.shape)
    assert judged(DiscriminativeAccuracy(repeats=2, halves=False), real, coarse)["discriminative"] > 0.3
