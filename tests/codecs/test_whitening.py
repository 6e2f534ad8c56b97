"""Whitening: a symmetric linear map, learnt once, exact both ways and kept in float64 and in checkpoints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgm.codecs import Whitening
from lightning_sgm.random import Draw

L, D = 4, 3


def walks(count=500, constant=False, seed=0):
    """Windows (count, 4, 3) float64 of correlated random walks of scales 1, 10 and 0.01 about 5."""
    x = Draw(seed).normal((count, L, D), torch.float64)
    x[..., 1] += 3 * x[..., 0]
    x = 5 + x.cumsum(1) * torch.tensor([1.0, 10.0, 0.01], dtype=torch.float64)
    if constant:
        x[..., 2] = 7.0
    return x


def ready(x, **arguments):
    codec = Whitening(**arguments)
    codec.fit(x)
    return codec


def covariance(z):
    return torch.cov(z.flatten(1).T)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_way_back_is_exact(power, constant):
    x = walks(constant=constant)
    codec = ready(x, power=power)
    z = codec.encode(x)
    assert (z - x).abs().max() > 1
    torch.testing.assert_close(codec.decode(z), x, rtol=0, atol=1e-9)
    # Also of windows unlike those it learnt from, in single precision of z.
    other = walks(20, seed=1) * 3
    torch.testing.assert_close(codec.decode(codec.encode(other)), other, rtol=0, atol=1e-8)
    single = codec.encode(other.float())
    assert single.dtype == torch.float32
    assert codec.decode(single).dtype == torch.float64
    torch.testing.assert_close(codec.decode(single), other, rtol=1e-5, atol=1e-3)


def test_power_1_gives_unit_covariance_and_mean_0():
    x = walks()
    z = ready(x, floor=1e-14).encode(x)
    torch.testing.assert_close(covariance(z), torch.eye(L * D, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.mean(0), torch.zeros(L, D, dtype=torch.float64), rtol=0, atol=1e-9)


def test_directions_that_the_data_lack_stay_small_and_the_others_share_one_variance():
    x = walks(constant=True)
    codec = ready(x, floor=1e-12)
    variances = torch.linalg.eigvalsh(covariance(codec.encode(x)))
    torch.testing.assert_close(variances[:L], torch.zeros(L, dtype=torch.float64), rtol=0, atol=1e-9)
    # The average over all of them is 1.
    expected = torch.full((L * (D - 1),), D / (D - 1), dtype=torch.float64)
    torch.testing.assert_close(variances[L:], expected, rtol=1e-6, atol=0)


@settings(max_examples=20)
@given(st.floats(0.05, 1.0), st.floats(1e-8, 1e-2), st.booleans())
def test_the_map_is_the_symmetric_root_and_the_average_variance_is_1(power, floor, constant):
    x = walks(60, constant)
    codec = ready(x, power=power, floor=floor)
    for one in (codec.forward_map, codec.backward_map):
        torch.testing.assert_close(one, one.T, rtol=1e-10, atol=1e-10 * float(one.abs().max()))
    found = covariance(codec.encode(x))
    assert float(found.diagonal().mean()) == pytest.approx(1, rel=1e-9)
    # By the singular values of the data instead of the eigenvectors of their covariance.
    centred = (x - x.mean(0)).flatten(1)
    _, singular, basis = torch.linalg.svd(centred, full_matrices=False)
    variances = singular**2 / (len(x) - 1)
    powers = basis.T @ torch.diag((variances + floor * variances.mean()) ** (-power / 2)) @ basis
    scale = torch.sqrt(covariance(centred @ powers).diagonal().mean())
    expected = powers / scale
    torch.testing.assert_close(codec.forward_map, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_lower_power_keeps_large_directions_larger():
    x = walks()
    spreads = []
    for power in (1.0, 0.5, 0.1):
        variances = torch.linalg.eigvalsh(covariance(ready(x, power=power, floor=1e-14).encode(x)))
        spreads.append(float(variances[-1] / variances[0]))
    assert spreads[0] == pytest.approx(1, rel=1e-5)
    assert spreads[0] < spreads[1] < spreads[2]


def test_fitting_is_deterministic_and_replaces_what_was_known():
    x = walks()
    one, other = ready(x, power=0.5), ready(walks(seed=5), power=0.5)
    assert not torch.equal(one.forward_map, other.forward_map)
    other.fit(x)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()])
def test_other_precisions_leave_the_map_alone(change):
    x = walks()
    codec = ready(x)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    change(torch.nn.Sequential(codec))
    for name, value in codec.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, before[name])
    assert codec.encode(x.to(torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, rtol=0, atol=1e-9)


def test_a_fresh_codec_takes_the_state_of_another():
    x = walks()
    codec, fresh = ready(x, power=0.5), Whitening(power=0.5)
    assert fresh.shape([L, D]) == (L, D)
    assert not fresh.fitted
    fresh.load_state_dict(codec.state_dict(), strict=True)
    assert fresh.fitted
    assert torch.equal(fresh.encode(x), codec.encode(x))
    assert fresh.shape([L, D]) == (L, D)  # asked again, it forgets nothing
    assert fresh.fitted
    wrong = Whitening()
    wrong.shape([L + 1, D])
    with pytest.raises(RuntimeError, match="size mismatch"):
        wrong.load_state_dict(codec.state_dict())


def test_before_it_has_learnt_it_refuses():
    codec = Whitening()
    with pytest.raises(RuntimeError, match="does not know the data yet: fit first"):
        codec.encode(walks(2))
    codec.fit(walks())
    assert codec.fitted
    codec.shape([L, D + 1])  # for other data it knows nothing
    assert not codec.fitted
    with pytest.raises(RuntimeError, match="does not know the data yet"):
        codec.encode(torch.zeros(1, L, D + 1))


@pytest.mark.parametrize("shape", [(6,), (1,), (1, 1), (6, 1)])
def test_any_shape(shape):
    x = 2 + 3 * Draw(1).normal((50, *shape), torch.float64)
    codec = ready(x, floor=1e-12)
    size = x[0].numel()
    z = codec.encode(x)
    assert z.shape == x.shape
    torch.testing.assert_close(
        covariance(z).reshape(size, size), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(codec.decode(z), x, rtol=0, atol=1e-9)


def test_gradients_pass_both_ways():
    codec = ready(walks())
    x = walks(2).requires_grad_()
    assert torch.autograd.gradcheck(codec.encode, (x,))
    assert torch.autograd.gradcheck(codec.decode, (x,))
    assert not list(codec.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Whitening(power=0.0), r"power in \(0, 1\] and a floor > 0, got 0.0"),
        (lambda: Whitening(power=1.5), r"power in \(0, 1\]"),
        (lambda: Whitening(floor=0.0), "floor > 0, got 1.0 and 0.0"),
        (lambda: ready(walks(1)), "finite examples that vary, got 1"),
        (lambda: ready(torch.ones(5, L, D)), "finite examples that vary, got 5"),
        (lambda: ready(walks().index_fill(0, torch.tensor([3]), torch.nan)), "finite examples that vary"),
        (lambda: ready(walks().index_fill(0, torch.tensor([3]), torch.inf)), "finite examples that vary"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
