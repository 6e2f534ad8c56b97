import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from datamodules.scaling import KINDS, Scaling, difference

every_kind = pytest.mark.parametrize("kind", KINDS)


def walks(windows=200, length=12, dims=3, seed=0):
    """Positive windows whose dimensions differ in scale by orders of magnitude."""
    steps = np.random.default_rng(seed).standard_normal((windows, length, dims))
    return np.exp(0.1 * steps.cumsum(1)) * 10.0 ** np.arange(dims)


@every_kind
@pytest.mark.parametrize("log", [False, True, [True, False, True]])
def test_windows_come_back_exactly_and_in_float32_nearly(kind, log):
    values = torch.from_numpy(walks())
    scaling = Scaling.fit(values.numpy(), kind, log)
    x = scaling.scale(values)
    assert x.dtype == torch.float64
    assert x.shape == (200, 12 + scaling.extra, 3)
    torch.testing.assert_close(scaling.unscale(x), values, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaling.unscale(x.float()), values, rtol=1e-5, atol=0)


@every_kind
@given(
    values=arrays(
        np.float64, (5, 4, 2), elements=st.floats(-1e6, 1e6, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -3.0])
    )
)
def test_any_windows_come_back(kind, values):
    scaling = Scaling.fit(values, kind)
    back = scaling.unscale(scaling.scale(torch.from_numpy(values)))
    size = torch.from_numpy(np.ptp(values, axis=(0, 1)) + 1e-3 * np.abs(values).max((0, 1)))
    assert ((back - torch.from_numpy(values)).abs() <= 1e-6 * size + 1e-90).all()


@every_kind
def test_unseen_windows_come_back(kind):
    scaling = Scaling.fit(walks(), kind, log=True)
    values = torch.from_numpy(walks(seed=1) * 5.0)
    torch.testing.assert_close(scaling.unscale(scaling.scale(values)), values, rtol=1e-12, atol=0)


@every_kind
@pytest.mark.parametrize("log", [False, True])
def test_unit_has_low_at_0_and_high_at_1_in_original_units(kind, log):
    values = walks()
    scaling = Scaling.fit(values, kind, log)
    low, high = values.min((0, 1)), values.max((0, 1))
    assert scaling.spec["low"] == low.tolist()
    assert scaling.spec["high"] == high.tolist()
    unit = scaling.unit(scaling.scale(torch.from_numpy(values))).numpy()
    np.testing.assert_allclose(unit, (values - low) / (high - low), atol=1e-12)


def test_minmax_spans_minus_one_to_one():
    values = walks()
    x = Scaling.fit(values, "minmax").scale(torch.from_numpy(values))
    assert x.amin((0, 1)).tolist() == pytest.approx([-1.0] * 3)
    assert x.amax((0, 1)).tolist() == pytest.approx([1.0] * 3)
    low, high = values.min((0, 1)), values.max((0, 1))
    np.testing.assert_allclose(x.numpy(), 2 * (values - low) / (high - low) - 1, atol=1e-12)


def test_standard_has_mean_0_and_deviation_1_after_the_logarithm():
    values = walks()
    x = Scaling.fit(values, "standard", log=[True, False, False]).scale(torch.from_numpy(values)).reshape(-1, 3).numpy()
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-12)
    logs = np.log(values[..., 0]).ravel()
    np.testing.assert_allclose(x[:, 0], (logs - logs.mean()) / logs.std(), atol=1e-10)


def test_quantile_makes_heavy_tails_normal_and_is_monotone():
    values = np.random.default_rng(0).standard_cauchy((5000, 2)) ** 3
    scaling = Scaling.fit(values, "quantile")
    assert all(2 <= len(knots) <= 256 for knots in scaling.spec["knots"])
    x = scaling.scale(torch.from_numpy(values)[None])[0]
    normal = torch.distributions.Normal(0.0, 1.0)
    for column in x.T:
        ranks = (torch.arange(5000) + 0.5) / 5000
        assert (normal.cdf(column.sort().values) - ranks).abs().max() < 0.01
    grid = torch.linspace(-10, 10, 4001).double()[None, :, None].expand(1, 4001, 2)
    assert (scaling.scale(grid).diff(dim=1) > 0).all()
    assert (scaling.unscale(grid).diff(dim=1) > 0).all()


def test_quantile_of_ties_takes_middle_ranks():
    values = np.repeat([0.0, 1.0, 5.0], [60, 20, 20])[:, None]
    scaling = Scaling.fit(values, "quantile")
    expected = torch.special.ndtri(torch.tensor([0.3, 0.7, 0.9]).double())
    torch.testing.assert_close(torch.tensor(scaling.spec["normal"][0]).double(), expected)
    x = scaling.scale(torch.tensor([0.0, 1.0, 5.0, 9.0]).double()[None, :, None])
    torch.testing.assert_close(x[0, :3, 0], expected)
    slope = (expected[2] - expected[1]) / 4
    torch.testing.assert_close(x[0, 3, 0], expected[2] + 4 * slope)


def test_window_rows_are_shape_level_and_spread():
    values = walks()
    x = Scaling.fit(values, "window").scale(torch.from_numpy(values))
    shape, rows = x[:, :-2], x[:, -2:]
    torch.testing.assert_close(shape.mean(1), torch.zeros(200, 3).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(shape.std(1, correction=0), torch.ones(200, 3).double(), atol=1e-2, rtol=0)
    torch.testing.assert_close(rows.mean(0), torch.zeros(2, 3).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(2, 3).double(), atol=1e-10, rtol=0)


def test_window_takes_level_and_spread_from_their_rows_whatever_the_shape():
    values = torch.from_numpy(walks())
    scaling = Scaling.fit(values.numpy(), "window")
    x = scaling.scale(values)
    bent = torch.cat([3.0 * x[:, :-2] + 5.0, x[:, -2:]], dim=1)
    torch.testing.assert_close(scaling.unscale(bent), values, rtol=1e-10, atol=0)


def test_window_keeps_flat_and_nearly_flat_windows():
    values = walks()
    values[0] = 2.0
    values[1] = 2.0 + 1e-7 * np.arange(12)[:, None]
    scaling = Scaling.fit(values, "window")
    x = scaling.scale(torch.from_numpy(values)).requires_grad_()
    back = scaling.unscale(x)
    scale = values.std((0, 1))
    assert (np.abs(back.detach().numpy() - values).max((0, 1)) < 1e-9 * scale).all()
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert gradient.isfinite().all()


@every_kind
@pytest.mark.parametrize("log", [False, True])
def test_a_constant_dimension_is_0_and_comes_back_without_nan(kind, log):
    values = walks()
    values[..., 1] = 0.1
    scaling = Scaling.fit(values, kind, log)
    x = scaling.scale(torch.from_numpy(values))
    assert (x[..., 1] == 0).all()
    for start in (x, torch.zeros_like(x), 50.0 * torch.ones_like(x)):
        x = start.clone().requires_grad_()
        back, unit = scaling.unscale(x), scaling.unit(x)
        assert (back[..., 1] == 0.1).all()
        assert (unit[..., 1] == 0).all()
        (gradient,) = torch.autograd.grad(back.sum() + unit.sum(), x)
        assert gradient.isfinite().all()
        assert (gradient[..., 1] == 0).all()


@every_kind
@pytest.mark.parametrize("log", [False, True])
def test_the_way_back_has_the_right_gradient(kind, log):
    values = torch.from_numpy(walks(windows=4, length=5, dims=2))
    scaling = Scaling.fit(walks(dims=2), kind, log)
    x = scaling.scale(values).requires_grad_()
    assert torch.autograd.gradcheck(scaling.unscale, x, eps=1e-7, atol=1e-4)
    assert torch.autograd.gradcheck(scaling.unit, x, eps=1e-7, atol=1e-4)


@every_kind
def test_wild_samples_stay_finite(kind):
    scaling = Scaling.fit(walks(), kind, log=True)
    x = torch.tensor([-1e4, 1e4]).reshape(2, 1, 1).expand(2, 12 + scaling.extra, 3).clone().requires_grad_()
    back = scaling.unscale(x)
    assert back.isfinite().all()
    (gradient,) = torch.autograd.grad(back.log().sum(), x)
    assert gradient.isfinite().all()


@every_kind
def test_the_spec_survives_a_safe_checkpoint(kind):
    values = torch.from_numpy(walks())
    scaling = Scaling.fit(values.numpy(), kind, log=[True, True, False])
    file = io.BytesIO()
    torch.save({"scaling": scaling.spec}, file)
    file.seek(0)
    again = Scaling(torch.load(file, weights_only=True)["scaling"])
    assert again.spec == scaling.spec
    assert torch.equal(again.scale(values), scaling.scale(values))


@every_kind
def test_pieces_are_as_good_as_the_whole(kind, monkeypatch):
    monkeypatch.setattr("datamodules.scaling._CHUNK", 100)
    values = walks()
    pieces = Scaling.fit([values[:50], torch.from_numpy(values[50:])], kind, log=True).spec
    monkeypatch.undo()
    whole = Scaling.fit(values, kind, log=True).spec
    for name in whole:
        if name != "kind":
            np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-10, atol=1e-12)


def test_window_takes_its_statistics_over_all_windows_within_runs(monkeypatch):
    runs = walks(windows=3, length=50)
    windows = np.stack([run[i : i + 12] for run in runs for i in range(39)])
    found, expected = Scaling.fit(runs, "window", length=12).spec, Scaling.fit(windows, "window").spec
    assert found["low"] == expected["low"]
    for name in ("level_mean", "level_std", "spread_mean", "spread_std"):
        # The floor is a share of the deviation of rows, each counted once.
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3)
    monkeypatch.setattr("datamodules.scaling._WINDOWS", 60)
    fewer = Scaling.fit(runs, "window", length=12).spec
    assert fewer["level_mean"] != found["level_mean"]
    np.testing.assert_allclose(fewer["level_mean"], found["level_mean"], rtol=0.05)


def test_quantile_of_very_many_values_takes_every_so_many(monkeypatch):
    monkeypatch.setattr("datamodules.scaling._SORTED", 1000)
    values = np.random.default_rng(0).standard_normal((50000, 1))
    scaling = Scaling.fit(values, "quantile")
    assert scaling.spec["low"] == [values.min()]
    x = scaling.scale(torch.linspace(-1.5, 1.5, 31).double()[None, :, None])[0, :, 0]
    assert (x - torch.linspace(-1.5, 1.5, 31)).abs().max() < 0.15


def test_what_is_refused():
    values = walks()
    with pytest.raises(ValueError, match="no scaling 'robust'"):
        Scaling.fit(values, "robust")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no scaling None"):
        Scaling({})
    with pytest.raises(ValueError, match="lacks mean, std"):
        Scaling({"kind": "standard", "log": [False], "low": [0.0], "high": [1.0]})
    with pytest.raises(ValueError, match="2 of high"):
        Scaling({"kind": "minmax", "log": [False], "low": [0.0], "high": [1.0, 2.0]})
    with pytest.raises(ValueError, match="no values"):
        Scaling.fit([], "minmax")
    with pytest.raises(ValueError, match="fitted to windows"):
        Scaling.fit(values[0], "window")
    with pytest.raises(ValueError, match="log has 2 entries for 3"):
        Scaling.fit(values, "minmax", log=[True, False])
    with pytest.raises(ValueError, match=r"3 dimensions, but the values are of \(2, 5, 4\)"):
        Scaling.fit(values, "minmax").scale(torch.zeros(2, 5, 4))
    values[3, 4, 1] = -2.0
    with pytest.raises(ValueError, match="logarithm of column 'b' is asked for, but its smallest value is -2"):
        Scaling.fit(values, "minmax", log=True, columns=["a", "b", "c"])
    values[3, 4, 1] = np.inf
    with pytest.raises(ValueError, match="column 'b' holds values that are not finite"):
        Scaling.fit(values, "minmax", columns=["a", "b", "c"])
    said = r"dimension 1 \(counted from 0\) has values that are not positive, .*: mend .* data\.log false"
    with pytest.raises(ValueError, match=said):
        Scaling.fit(walks(), "minmax", log=True).scale(torch.tensor([1.0, 0.0, 1.0]).expand(2, 5, 3))


# Two scalings.


@every_kind
def test_there_is_no_difference_to_itself(kind):
    spec = Scaling.fit(walks(), kind, log=True).spec
    assert difference(spec, Scaling.fit(walks(), kind, log=True).spec, ["a", "b", "c"]) == ""


def test_the_first_difference_is_named():
    columns = ["a", "b", "c"]
    one = Scaling.fit(walks(), "minmax").spec
    fewer = Scaling.fit(walks(dims=2), "standard").spec
    assert difference(one, fewer, ["a", "b"]) == "3 dimensions in the model, 2 in the data"
    other = Scaling.fit(walks(), "standard", log=True).spec
    assert difference(one, other, columns) == "kind minmax in the model, standard in the data"
    other = Scaling.fit(walks(), "minmax", log=[False, True, False]).spec
    assert difference(one, other, columns) == (
        "log [False, False, False] in the model, [False, True, False] in the data"
    )


@every_kind
@pytest.mark.parametrize("end", ["low", "high"])
def test_another_range_is_told_with_its_column_and_both_ranges(kind, end):
    values = walks()
    one = Scaling.fit(values, kind).spec
    ranges = [[values[..., 1].min(), values[..., 1].max()] for _ in range(2)]
    beyond = ranges[1][end == "high"] = {"low": 0.25, "high": 987.5}[end]
    place = np.unravel_index(getattr(values[..., 1], {"low": "argmin", "high": "argmax"}[end])(), values.shape[:2])
    values[(*place, 1)] = beyond
    said = difference(one, Scaling.fit(values, kind).spec, ["a", "b", "c"])
    (low, high), (other_low, other_high) = ranges
    assert said == f"column 'b' from {low:g} to {high:g} in the model, from {other_low:g} to {other_high:g} in the data"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "minmax"])
def test_statistics_may_be_all_that_differs(kind):
    values = walks()
    one = Scaling.fit(values, kind).spec
    place = np.unravel_index(np.argsort(values[..., 1], axis=None)[1000], values.shape[:2])
    values[(*place, 1)] *= 1.5
    other = Scaling.fit(values, kind).spec
    assert (one["low"], one["high"]) == (other["low"], other["high"])
    assert difference(one, other, ["a", "b", "c"]) == f"the statistics of the scaling {kind} differ"


# Devices.


@every_kind
@pytest.mark.parametrize("log", [False, True])
def test_numbers_go_to_a_device_once(kind, log, monkeypatch):
    """Every further step finds them there: it neither makes nor sends one."""
    values = torch.from_numpy(walks())
    scaling, fresh = (Scaling.fit(values.numpy(), kind, log) for _ in range(2))
    x = scaling.scale(values)
    first = [scaling.scale(values), scaling.unscale(x), scaling.unit(x)]
    kept = dict(scaling._kept)
    assert kept
    assert {device for _, device in kept} == {values.device}
    made = []
    monkeypatch.setattr("datamodules.scaling.torch.tensor", lambda *a, **k: made.append(a))
    again = [scaling.scale(values), scaling.unscale(x), scaling.unit(x)]
    monkeypatch.undo()
    assert not made
    assert scaling._kept.keys() == kept.keys()
    assert all(scaling._kept[key] is value for key, value in kept.items())
    untouched = [fresh.scale(values), fresh.unscale(x), fresh.unit(x)]
    for one, two, three in zip(first, again, untouched, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_each_device_has_its_own_numbers():
    scaling = Scaling.fit(walks(), "standard")
    there = torch.device("meta")  # stands for an accelerator
    here = scaling._on("mean", torch.device("cpu"))
    assert scaling._on("mean", there).device == there
    assert scaling._on("mean", there) is scaling._on("mean", there)
    assert scaling._on("mean", torch.device("cpu")) is here
    assert here.tolist() == scaling.spec["mean"]
