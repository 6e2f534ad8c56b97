"""The absorbing process against closed forms, and the law of its masks."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from lightning_sgm.processes.absorbing import AbsorbingProcess, Cosine, CosineSquared, Geometric, Loglinear, Schedule
from lightning_sgm.random import Draw

EPS = 1e-3
SCHEDULES = [Loglinear(), Geometric(), Geometric(1e-4, 20.0), Cosine(), CosineSquared(), Loglinear(0.2), Cosine(0.05)]
IDS = ["loglinear", "geometric", "geometric20", "cosine", "cosine2", "loglinear.2", "cosine.05"]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
times = st.floats(1e-6, 1.0)

# Table 2.1 of radd.md: schedule, share of visible tokens, rate.
TABLE = [
    (Loglinear(), lambda t: 1 - (1 - EPS) * t, lambda t: (1 - EPS) / (1 - (1 - EPS) * t)),
    (
        Geometric(1e-4, 20.0),
        lambda t: math.exp(-(1e-4 ** (1 - t)) * 20.0**t),
        lambda t: 1e-4 ** (1 - t) * 20.0**t * math.log(20.0 / 1e-4),
    ),
    (
        Cosine(),
        lambda t: EPS + (1 - EPS) * math.cos(math.pi * t / 2),
        lambda t: (1 - EPS) * math.pi / 2 * math.sin(math.pi * t / 2) / (EPS + (1 - EPS) * math.cos(math.pi * t / 2)),
    ),
    (
        CosineSquared(),
        lambda t: EPS + (1 - EPS) * math.cos(math.pi * t / 2) ** 2,
        lambda t: (1 - EPS) * math.pi / 2 * math.sin(math.pi * t) / (EPS + (1 - EPS) * math.cos(math.pi * t / 2) ** 2),
    ),
]


@pytest.mark.parametrize(("schedule", "visible", "rate"), TABLE, ids=["loglinear", "geometric", "cosine", "cosine2"])
@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 0.9, 1.0])
def test_schedules_are_those_of_the_table(schedule, visible, rate, t):
    process = AbsorbingProcess(schedule)
    assert process.integral(t).dtype == process.rate(t).dtype == torch.float64
    assert process.integral(t).item() == pytest.approx(-math.log(visible(t)), rel=1e-9)
    assert process.rate(t).item() == pytest.approx(rate(t), rel=1e-9)
    assert process.mask_probability(t).item() == pytest.approx(1 - visible(t), rel=1e-9)


def test_defaults_are_those_of_the_reference():
    assert isinstance(AbsorbingProcess().schedule, Loglinear)
    assert AbsorbingProcess().mask_probability(1.0).item() == pytest.approx(0.999)
    assert Geometric().integral(0.0).item() == pytest.approx(1e-3)
    assert Geometric().integral(1.0).item() == pytest.approx(1.0)


@each_schedule
def test_rate_is_the_derivative_of_the_integral(schedule):
    t = torch.linspace(1e-3, 1.0, 200, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.integral(t).sum(), t)
    torch.testing.assert_close(schedule.rate(t), slope, rtol=1e-10, atol=0.0)


@each_schedule
@given(t=times, s=times, r=times)
def test_revealing_in_two_steps_is_revealing_in_one(schedule, t, s, r):
    r, s, t = sorted((r, s, t))
    process = AbsorbingProcess(schedule)
    kept = (1 - process.reveal_probability(t, s)) * (1 - process.reveal_probability(s, r))
    assert kept.item() == pytest.approx(1 - process.reveal_probability(t, r).item(), abs=1e-12)
    assert 0 <= process.reveal_probability(t, r) <= 1


@each_schedule
@given(t=times, share=st.floats(0.0, 0.99))
def test_reveal_probability_is_the_lost_share_of_masks(schedule, t, share):
    process = AbsorbingProcess(schedule)
    masked_t, masked_s = process.mask_probability(t).item(), process.mask_probability(share * t).item()
    psi = process.reveal_probability(t, share * t).item()
    assert psi == pytest.approx((masked_t - masked_s) / masked_t, rel=1e-9, abs=1e-12)


@each_schedule
@given(t=st.floats(1e-2, 1.0))
def test_reveal_rate_is_the_limit_of_short_steps(schedule, t):
    process, dt = AbsorbingProcess(schedule), 1e-6
    slope = process.reveal_probability(t, t - dt).item() / dt
    assert process.reveal_rate(t).item() == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_reveal_rate_of_loglinear_is_one_over_t():
    t = torch.tensor([1e-6, 0.1, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(AbsorbingProcess().reveal_rate(t), 1 / t, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("schedule", "small"),
    [
        (Loglinear(), lambda t: (1 - EPS) * t),
        (Cosine(), lambda t: (1 - EPS) * (math.pi * t / 2) ** 2 / 2),
        (CosineSquared(), lambda t: (1 - EPS) * (math.pi * t / 2) ** 2),
    ],
)
def test_nothing_cancels_near_zero(schedule, small):
    assert AbsorbingProcess(schedule).mask_probability(1e-9).item() == pytest.approx(small(1e-9), rel=1e-8, abs=0.0)


def test_nothing_overflows_under_a_steep_schedule():
    process = AbsorbingProcess(Geometric(1e-4, 5000.0))
    psi = process.reveal_probability(torch.linspace(1e-3, 1, 50), torch.linspace(0, 0.99, 50))
    assert torch.isfinite(psi).all()
    assert process.reveal_rate(1.0).item() == 0.0


def test_half_precision_times_are_computed_in_float64():
    t = torch.tensor(0.5, dtype=torch.float16)
    assert AbsorbingProcess().integral(t).item() == AbsorbingProcess().integral(0.5).item()


@pytest.mark.parametrize("make", [Loglinear, Cosine, CosineSquared])
@pytest.mark.parametrize("eps", [0.0, 1.0, -0.1])
def test_eps_outside_its_range_is_refused(make, eps):
    with pytest.raises(ValueError, match="eps"):
        make(eps)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, 0.5), (-1.0, 1.0), (1e-3, math.inf)])
def test_geometric_ends_out_of_order_are_refused(a, b):
    with pytest.raises(ValueError, match="geometric"):
        Geometric(a, b)


def test_a_users_schedule_needs_two_functions():
    class Exponential(Schedule):
        def integral(self, t):
            return 5.0 * torch.as_tensor(t, dtype=torch.float64)

        def rate(self, t):
            return torch.full_like(self.integral(t), 5.0)

    process = AbsorbingProcess(Exponential())
    assert process.mask_probability(1.0).item() == pytest.approx(1 - math.exp(-5))
    assert process.reveal_rate(1.0).item() == pytest.approx(5 / (math.exp(5) - 1))


@given(seed=st.integers(0, 1000), keyed=st.booleans(), counts=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_count_masks_exactly_that_many(seed, keyed, counts):
    draw = Draw(seed, torch.arange(len(counts)) if keyed else None)
    count = torch.tensor(counts)
    mask = AbsorbingProcess().mask(torch.zeros(len(counts), 9, dtype=torch.long), 5, draw, count=count)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == counts


def test_count_masks_every_subset_alike():
    rows = 20_000
    count = torch.full((rows,), 2)
    mask = AbsorbingProcess().mask(torch.zeros(rows, 5, dtype=torch.long), 9, Draw(1), count=count)
    code = (mask.long() * 2 ** torch.arange(5)).sum(1)
    subsets = [2**i + 2**j for i, j in itertools.combinations(range(5), 2)]
    observed = [int((code == subset).sum()) for subset in subsets]
    assert sum(observed) == rows
    assert chisquare(observed).pvalue > 1e-3


def test_probability_masks_independently():
    rows = 20_000
    probability = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64).repeat_interleave(rows)
    x0 = torch.zeros(3 * rows, 3, dtype=torch.long)
    none, some, every = AbsorbingProcess().mask(x0, 9, Draw(2), probability=probability).split(rows)
    assert not none.any()
    assert every.all()
    observed = torch.bincount((some.long() * torch.tensor([1, 2, 4])).sum(1), minlength=8)
    expected = [rows * 0.3 ** bin(i).count("1") * 0.7 ** (3 - bin(i).count("1")) for i in range(8)]
    assert chisquare(observed.numpy(), expected).pvalue > 1e-3


def test_fixed_positions_and_masks_are_never_chosen():
    x0 = torch.tensor([[0, 1, 9, 2, 3, 4]]).expand(200, 6)
    fixed = torch.tensor([[True, False, False, False, False, True]]).expand(200, 6)
    by_count = AbsorbingProcess().mask(x0, 9, Draw(3), count=torch.full((200,), 2), fixed=fixed)
    assert by_count.sum(1).tolist() == [2] * 200
    assert by_count.any(0).tolist() == [False, True, False, True, True, False]
    most = AbsorbingProcess().mask(x0, 9, Draw(3), count=torch.full((200,), 6), fixed=fixed)
    assert most.all(0).tolist() == [False, True, False, True, True, False]
    by_probability = AbsorbingProcess().mask(x0, 9, Draw(3), probability=torch.ones(200), fixed=fixed)
    assert torch.equal(by_probability, most)


def test_a_keyed_mask_does_not_depend_on_its_batch():
    process, keys = AbsorbingProcess(), torch.tensor([7, 3, 11])
    x0, count = torch.zeros(3, 16, dtype=torch.long), torch.tensor([5, 8, 16])
    together = process.mask(x0, 9, Draw(4, keys), count=count)
    alone = process.mask(x0[:1], 9, Draw(4, keys[1:2]), count=count[1:2])
    assert torch.equal(together[1:2], alone)


def test_wrong_mask_arguments_are_named():
    process, x0, draw = AbsorbingProcess(), torch.zeros(2, 4, dtype=torch.long), Draw(0)
    with pytest.raises(ValueError, match="exactly one"):
        process.mask(x0, 9, draw)
    with pytest.raises(ValueError, match="exactly one"):
        process.mask(x0, 9, draw, probability=torch.ones(2), count=torch.ones(2).long())
    with pytest.raises(ValueError, match="count"):
        process.mask(x0, 9, draw, count=torch.ones(2))
    with pytest.raises(ValueError, match="probability"):
        process.mask(x0, 9, draw, probability=torch.ones(3))
    with pytest.raises(ValueError, match="fixed"):
        process.mask(x0, 9, draw, probability=torch.ones(2), fixed=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="tokens"):
        process.mask(x0.float(), 9, draw, probability=torch.ones(2))
