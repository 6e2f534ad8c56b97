import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgm import random as source
from lightning_sgm.random import Draw, mix, run_seed, seed_step

KEYS = torch.tensor([5, 0, -3, 2**62, 17, 4])
METHODS = {
    "uniform": lambda draw, rows: draw.uniform((rows, 3)),
    "uniform64": lambda draw, rows: draw.uniform((rows, 3), torch.float64),
    "normal": lambda draw, rows: draw.normal((rows, 2, 2)),
    "integers": lambda draw, rows: draw.integers(1000, (rows, 3)),
}


def normal_cdf(x):
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def kolmogorov_smirnov(x, cdf):
    """sqrt(n) sup |F_n - F|; above 1.95 with probability 0.001 if x has the law of cdf."""
    x = x.flatten().sort().values
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    law = cdf(x)
    return math.sqrt(len(x)) * float(torch.maximum((law - steps[:-1]).max(), (steps[1:] - law).max()))


# The counters.


def test_the_hash_is_splitmix64():
    # First outputs of the generator for states 0 and 1234567, as published with java.util.SplittableRandom's tests.
    hashed = source._hash(torch.tensor([0, 1234567]))
    assert hashed.tolist() == [0xE220A8397B1DCDAF - (1 << 64), 6457827717110365317]


@given(st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None)
def test_hash_of_tensors_and_of_integers_agree(value):
    assert mix(value) == (int(source._hash(torch.tensor([value]))) & source._MASK) >> 1


@given(st.lists(st.integers(-(2**70), 2**70), max_size=4), st.lists(st.integers(-(2**70), 2**70), max_size=4))
@settings(deadline=None)
def test_mix_gives_63_bits_and_tells_lists_apart(first, second):
    assert 0 <= mix(*first) < 2**63
    same = [v % 2**64 for v in first] == [v % 2**64 for v in second]
    assert (mix(*first) == mix(*second)) == same


def test_mix_has_no_collisions_on_small_counters():
    values = {mix(a, b) for a in range(200) for b in range(200)} | {mix(a) for a in range(200)}
    assert len(values) == 200 * 200 + 200


def test_run_seed_is_what_seed_everything_announced(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    assert run_seed() == 41
    assert os.environ["PL_GLOBAL_SEED"] == "41"


def test_seed_step_seeds_torch():
    seed_step(1, 2)
    first = torch.rand(3)
    torch.rand(7)
    seed_step(1, 2)
    assert torch.equal(torch.rand(3), first)
    seed_step(1, 3)
    assert not torch.equal(torch.rand(3), first)


# Streams must never change silently: checkpoints, samples and resumed runs depend on them.


def test_golden_values():
    assert [mix(), mix(0), mix(1, 2, 3), mix(-1)] == [0, 8147104208329303767, 3851293329796251419, 8245168133484221968]
    draw = Draw(7, keys=torch.tensor([0, 1, -5]))
    normal = [[-0.66999121259111827, 0.64022321114099745], [-0.32442130781874778, -1.06568219529760322]]
    normal.append([-2.18545201943054446, 0.48407496077463691])
    torch.testing.assert_close(draw.normal((3, 2), torch.float64), torch.tensor(normal, dtype=torch.float64))
    uniform = [[0.90705109643159643, 0.88318558395487190], [0.71727688619351726, 0.46283988847158120]]
    uniform.append([0.13389882232728845, 0.88644562311652730])
    assert draw.uniform((3, 2), torch.float64).tolist() == uniform
    assert draw.uniform((3,)).tolist() == [0.950231671333313, 0.8115096688270569, 0.5985521078109741]
    assert draw.integers(1000, (3, 2)).tolist() == [[650, 868], [118, 899], [575, 463]]
    forked = [[-0.026192672550678253, 0.4879078269004822], [1.1190204620361328, 1.2793152332305908]]
    forked.append([-0.2599133551120758, -1.6771026849746704])
    torch.testing.assert_close(draw.fork(4).normal((3, 2)), torch.tensor(forked))
    strata = [0.8384540140198182, 0.456488002769713, 0.7482840702703439]
    assert draw.strata(3).tolist() == strata
    # Without keys the stream is torch's own for this seed.
    generator = torch.Generator().manual_seed(mix(7))
    assert torch.equal(Draw(7).normal((3,)), torch.randn(3, generator=generator))


# Exact mode: a row depends on (seed, key, call number) alone.


@pytest.mark.parametrize("method", METHODS)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_rows_do_not_depend_on_their_batch(method, order, cut):
    make = METHODS[method]
    whole = Draw(3, keys=KEYS)
    calls = [make(whole, 6), make(whole, 6)]
    for part in (order[:cut], order[cut:]):
        if part:
            index = torch.tensor(part)
            for split in (Draw(3, keys=KEYS[index]), whole.rows(index)):
                assert torch.equal(make(split, len(part)), calls[0][index])
                assert torch.equal(make(split, len(part)), calls[1][index])


def test_rows_takes_a_mask_and_equal_keys_give_equal_rows():
    draw = Draw(3, keys=torch.tensor([1, 2, 1]))
    x = draw.normal((3, 4))
    assert torch.equal(x[0], x[2])
    assert not torch.equal(x[0], x[1])
    assert torch.equal(draw.rows(torch.tensor([False, True, True])).normal((2, 4)), x[1:])


def test_split_rows_have_keys_of_their_own():
    draw = Draw(5, torch.tensor([4, 7])).split(3)
    assert draw.keys is not None
    assert draw.keys.tolist() == [12, 13, 14, 21, 22, 23]
    assert torch.equal(draw.rows(torch.tensor([4])).uniform((1, 2)), Draw(5, torch.tensor([22])).uniform((1, 2)))
    plain = Draw(5)
    assert plain.split(3) is plain


def test_keys_of_any_integer_type():
    x = Draw(3, keys=torch.arange(5, dtype=torch.int32)).normal((5, 2))
    assert torch.equal(x, Draw(3, keys=torch.arange(5)).normal((5, 2)))


@pytest.mark.parametrize("keys", [None, KEYS])
def test_same_seed_same_numbers_and_calls_advance(keys):
    first, second, other = Draw(9, keys), Draw(9, keys), Draw(10, keys)
    a, b = first.normal((6, 5)), first.normal((6, 5))
    assert torch.equal(second.normal((6, 5)), a)
    assert torch.equal(second.normal((6, 5)), b)
    assert not torch.equal(a, b)
    assert not torch.equal(other.normal((6, 5)), a)


@pytest.mark.parametrize("keys", [None, torch.arange(20000)])
def test_forks_are_independent_and_do_not_touch_their_parent(keys):
    shape = (20000, 4)
    draw, untouched = Draw(9, keys), Draw(9, keys)
    streams = [draw.fork(1).normal(shape), draw.fork(2).normal(shape), draw.fork(1, 2).normal(shape)]
    streams += [draw.fork(1).fork(2).normal(shape), draw.normal(shape)]
    assert torch.equal(streams[-1], untouched.normal(shape))
    assert torch.equal(draw.fork(1).normal(shape), streams[0])
    correlation = torch.corrcoef(torch.stack(streams).flatten(1)) - torch.eye(5)
    assert correlation.abs().max() < 4.5 / math.sqrt(80000)


# Laws.

ROWS, WIDTH, CALLS = 20000, 4, 5


@pytest.fixture(scope="module")
def table():
    draw = Draw(1, keys=torch.arange(ROWS))
    return torch.stack([draw.normal((ROWS, WIDTH), torch.float64) for _ in range(CALLS)], 1)


def test_normal_moments(table):
    n = table.numel()
    assert abs(table.mean()) < 4 / math.sqrt(n)
    assert abs(table.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((table**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((table**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert 4.0 < table.abs().max() < 7.6


def test_normal_law_of_all_of_each_call_and_of_each_element(table):
    assert kolmogorov_smirnov(table, normal_cdf) < 1.95
    for slices in (table.unbind(1), table.unbind(2)):
        assert max(kolmogorov_smirnov(x, normal_cdf) for x in slices) < 2.2


def test_normals_are_uncorrelated_across_calls_elements_and_rows(table):
    bound = 4.5 / math.sqrt(ROWS)
    across = torch.corrcoef(table.flatten(1).T) - torch.eye(WIDTH * CALLS)
    assert across.abs().max() < bound
    assert (torch.corrcoef((table**2).flatten(1).T) - torch.eye(WIDTH * CALLS)).abs().max() < bound
    for lag in (1, 2, 256, 4096):
        product = table[lag:] * table[:-lag]
        assert abs(product.mean()) < 4.5 / math.sqrt(product.numel())


def test_box_muller_radius_and_angle_are_independent():
    # cos of the angle is hidden; the normal's sign and size must be independent.
    x = Draw(2, keys=torch.arange(200000)).normal((200000,), torch.float64)
    assert abs((x.sign() * (x.abs() - x.abs().mean())).mean()) < 4 / math.sqrt(200000)
    assert kolmogorov_smirnov(x, normal_cdf) < 1.95


@pytest.mark.parametrize("keys", [None, torch.arange(200000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniform_law(keys, dtype):
    u = Draw(4, keys).uniform((200000,), dtype)
    assert u.dtype == dtype
    assert u.min() >= 0
    assert u.max() < 1
    assert kolmogorov_smirnov(u.double(), lambda x: x) < 1.95


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keys", [None, torch.arange(100000)])
def test_uniforms_of_every_type_stay_below_one(keys, dtype):
    u = Draw(4, keys).uniform((100000,), dtype)
    assert u.min() >= 0
    assert u.max() < 1
    # The mean may lack half of the spacing of the type's digits.
    spacing = torch.finfo(dtype).eps / 2
    assert abs(u.double().mean() - 0.5) < spacing + 4 / math.sqrt(12 * 100000)
    assert Draw(4, keys).normal((100000,), dtype).isfinite().all()


@pytest.mark.parametrize("keys", [None, torch.arange(60000)])
def test_integers_are_uniform_and_reach_both_ends(keys):
    values = Draw(4, keys).integers(7, (60000,))
    assert values.dtype == torch.int64
    counts = torch.bincount(values, minlength=7).double()
    assert len(counts) == 7
    assert float(((counts - 60000 / 7) ** 2 / (60000 / 7)).sum()) < 22.5  # chi squared, 6 degrees, p = 0.001
    assert Draw(4, keys).integers(1, (60000,)).eq(0).all()


def test_neighbouring_seeds_and_keys_are_unrelated():
    rows = [Draw(seed, keys=torch.arange(1000)).normal((1000, 8)).flatten() for seed in range(8)]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(8)
    assert correlation.abs().max() < 4.5 / math.sqrt(8000)


# Strata.


def test_strata_without_keys_fill_every_cell_in_random_order():
    draw = Draw(3)
    runs = torch.stack([draw.strata(8) for _ in range(2000)])
    assert runs.dtype == torch.float64
    cells = (runs * 8).long()
    assert torch.equal(cells.sort(1).values, torch.arange(8).expand(2000, 8))
    counts = torch.nn.functional.one_hot(cells, 8).sum(0).double()
    assert float(((counts - 250) ** 2 / 250).sum(1).max()) < 30  # chi squared, 7 degrees, p = 1e-4
    assert kolmogorov_smirnov((runs * 8) % 1.0, lambda x: x) < 1.95


def test_strata_stay_below_one():
    class Extreme(Draw):
        def uniform(self, shape, dtype=torch.float32):
            return torch.full(tuple(shape), 1 - 2.0**-53, dtype=dtype)

    assert Extreme(0).strata(6).max() < 1


def test_strata_with_keys_are_a_kronecker_sequence():
    keys = torch.arange(-500, 500)
    whole = Draw(3, keys=keys).strata(1000)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Draw(3, keys=keys[order]).strata(1000), whole[order])
    golden = (math.sqrt(5) - 1) / 2
    step = (whole[1:] - whole[:-1]) % 1.0
    torch.testing.assert_close(step, torch.full_like(step, golden), rtol=0, atol=1e-12)
    # Any run of n of them leaves gaps of order 1 / n.
    for run in (whole[:64], whole[400:464], whole[-200:]):
        ordered = run.sort().values
        gaps = torch.cat([ordered.diff(), ordered[:1] + 1 - ordered[-1:]])
        assert float(gaps.max()) < 2.7 / len(run)


def test_strata_of_one_key_are_uniform_over_seeds_and_calls():
    runs = [Draw(seed, keys=torch.tensor([5, 2**62 + 1])) for seed in range(2000)]
    first = torch.stack([draw.strata(2) for draw in runs])
    second = torch.stack([draw.strata(2) for draw in runs])
    for u in (first[:, 0], first[:, 1], second[:, 0]):
        assert kolmogorov_smirnov(u, lambda x: x) < 1.95
    assert abs(float(torch.corrcoef(torch.stack([first[:, 0], second[:, 0]]))[0, 1])) < 4 / math.sqrt(2000)


def test_strata_keep_keys_of_any_size_apart():
    u = Draw(3, keys=torch.arange(1000) + 2**62).strata(1000)
    assert len(u.unique()) == 1000


# Shapes and errors.


def test_shapes():
    assert Draw(1).normal(()).shape == ()
    assert Draw(1).uniform((0, 3)).shape == (0, 3)
    keyed = Draw(1, keys=torch.arange(2))
    assert keyed.normal((2,)).shape == (2,)
    assert keyed.normal(torch.Size([2, 3, 4])).shape == (2, 3, 4)
    assert Draw(1, keys=torch.arange(0)).normal((0, 3)).shape == (0, 3)
    assert keyed.device == torch.device("cpu")


def test_errors_name_the_fix():
    with pytest.raises(ValueError, match="2 keys cannot fill shape \\(3, 4\\)"):
        Draw(1, keys=torch.arange(2)).normal((3, 4))
    with pytest.raises(ValueError, match="the first size must be 2"):
        Draw(1, keys=torch.arange(2)).uniform(())
    with pytest.raises(ValueError, match="cannot fill shape"):
        Draw(1, keys=torch.arange(2)).strata(3)
    with pytest.raises(ValueError, match="give keys"):
        Draw(1).rows(torch.tensor([0]))
    with pytest.raises(ValueError, match="high at least 1"):
        Draw(1).integers(0, (3,))


# What all rows and processes share.


def test_shared_numbers_are_the_same_on_all_processes_and_for_all_rows():
    ranks = [Draw(mix(7, rank), common=3) for rank in (0, 1)]
    exact = [Draw(3, keys=keys) for keys in (KEYS, KEYS[:2] + 1)]
    same = [[draw.shared.uniform((2,)), draw.shared.uniform((2,))] for draw in (*ranks, *exact)]
    for found in same[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, same[0], strict=True))
    assert not torch.equal(*same[0])  # it goes on from call to call
    assert not torch.equal(ranks[0].uniform((2,)), ranks[1].uniform((2,)))
    assert not torch.equal(Draw(4).shared.uniform((2,)), same[0][0])


def test_forks_rows_and_parts_share_too():
    first, second = (Draw(seed, common=5) for seed in (1, 2))
    assert torch.equal(first.fork(8).shared.uniform((3,)), second.fork(8).shared.uniform((3,)))
    assert not torch.equal(first.fork(8).shared.uniform((3,)), first.fork(9).shared.uniform((3,)))
    keyed = Draw(1, KEYS, common=5)
    expected = first.shared.uniform((3,))
    for draw in (keyed, keyed.rows(torch.tensor([2, 0])), keyed.split(3)):
        assert torch.equal(draw.shared.uniform((3,)), expected)
    # And it is neither of the sources it comes from.
    assert not torch.equal(expected, Draw(5).uniform((3,)))
