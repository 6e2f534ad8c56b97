"""The unmasking sampler against exact laws: enumeration, dynamic programming, forward-backward."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from lightning_sgm.processes.absorbing import AbsorbingProcess, Cosine, CosineSquared, Geometric, Loglinear
from lightning_sgm.random import Draw
from lightning_sgm.samplers.unmasking import UnmaskingSampler, draw_tokens
from tests.oracles import ConstantOracle, JointOracle, MarkovOracle, oracle_denoiser

V, L = 3, 4
SCHEDULES = [None, Geometric(1e-4, 20.0), Cosine(), CosineSquared()]
SCHEDULE_IDS = ["loglinear", "geometric", "cosine", "cosine2"]


def world(seed, impossible=True):
    """A strongly dependent joint law over 3^4 sequences, some of which never occur if ``impossible``."""
    joint = torch.rand(V**L, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 6 + 1e-6
    if impossible:
        joint[::7] = 0.0
    return (joint / joint.sum()).reshape((V,) * L)


def blank(rows, length=L, mask=V):
    return torch.full((rows, length), mask)


def sampled_law(sampler, joint, rows, seed):
    """Counts (V ** L,) of the sampled sequences."""
    x = sampler(oracle_denoiser(JointOracle(joint)), blank(rows), Draw(seed))
    return torch.bincount((x * V ** torch.arange(L - 1, -1, -1)).sum(1), minlength=V**L)


def assert_law(counts, law, smallest=1e-3):
    assert counts[law == 0].sum() == 0
    expected = law[law > 0] * counts.sum()
    observed = counts[law > 0].double()
    # Sequences too rare for the chi-square approximation are counted together.
    rare = expected < 5
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if len(expected) > 1:
        assert chisquare(observed.numpy(), expected.numpy()).pvalue > smallest


def tau_leaping_law(joint, psi):
    """Law (V ** L,) after steps with reveal probabilities ``psi``, by transition matrices over all 4^4 states."""
    oracle = JointOracle(joint)
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
    known = states != V
    conditionals = oracle.conditionals(states)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1.0  # all masks
    for p in psi:
        move = torch.cat([p * conditionals, torch.full_like(conditionals[..., :1], 1.0 - p)], -1)
        stay = torch.nn.functional.one_hot(states, V + 1).double()
        move = torch.where(known[..., None], stay, move)
        transition = torch.ones(len(states), len(states), dtype=torch.float64)
        for i in range(L):
            transition *= move[:, i, states[:, i]]
        law = law @ transition
    assert law[~known.all(1)].sum() < 1e-12
    return law[known.all(1)]


def psi_by_hand(schedule, steps, rule, eps=1e-5):
    """Reveal probabilities from the formulas of radd.md 2.4, straight from S and sigma."""
    process = AbsorbingProcess(schedule or Loglinear())
    grid = [1.0 + k * (eps - 1.0) / steps for k in range(steps + 1)]
    psi = []
    for t, s in itertools.pairwise(grid):
        masked, later = (1 - math.exp(-process.integral(u).item()) for u in (t, s))
        euler = (t - s) * process.rate(t).item() / (math.exp(process.integral(t).item()) - 1)
        psi.append(min(1.0, euler) if rule == "euler" else (masked - later) / masked)
    return psi[:-1] + [1.0]


def test_one_step_draws_from_the_product_of_marginals():
    joint = world(0)
    marginals = [joint.sum([j for j in range(L) if j != i]) for i in range(L)]
    law = torch.einsum("a,b,c,d->abcd", *marginals).flatten()
    assert_law(sampled_law(UnmaskingSampler(1), joint, 20_000, 1), law)


@pytest.mark.parametrize("order", ["random", "forward", "backward", [2, 0, 3, 1]])
def test_one_token_at_a_time_draws_from_the_joint(order):
    joint = world(1)
    assert_law(sampled_law(UnmaskingSampler(rule="any_order", order=order), joint, 20_000, 2), joint.flatten())


def test_many_steps_draw_from_the_joint():
    joint = world(2)
    assert_law(sampled_law(UnmaskingSampler(20_000), joint, 20_000, 3), joint.flatten())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("rule", ["tweedie", "euler"])
@pytest.mark.parametrize("steps", [2, 5])
def test_few_steps_draw_from_the_exact_law_of_tau_leaping(steps, rule, schedule):
    joint = world(3, impossible=False)
    law = tau_leaping_law(joint, psi_by_hand(schedule, steps, rule))
    sampler = UnmaskingSampler(steps, rule, schedule=schedule)
    assert_law(sampled_law(sampler, joint, 20_000, 4), law)


def test_the_exact_laws_differ_enough_to_be_told_apart():
    joint = world(3, impossible=False)
    counts = sampled_law(UnmaskingSampler(2), joint, 20_000, 4)
    for wrong in (psi_by_hand(None, 5, "tweedie"), psi_by_hand(Geometric(1e-4, 20.0), 2, "tweedie")):
        law = tau_leaping_law(joint, wrong)
        with pytest.raises(AssertionError):
            assert_law(counts, law)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("rule", ["tweedie", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 8, 100])
def test_reveal_law_is_a_probability_and_as_derived(steps, rule, schedule):
    law = UnmaskingSampler(steps, rule, schedule=schedule).reveal_law(AbsorbingProcess())
    psi = psi_by_hand(schedule, steps, rule)
    kept = [math.prod(1 - p for p in psi[:k]) for k in range(steps)]
    expected = torch.tensor([k * p for k, p in zip(kept, psi, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(law, expected, rtol=1e-9, atol=1e-12)
    assert law.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_euler_is_clamped_where_it_exceeds_certainty():
    process, steps = AbsorbingProcess(Geometric(1e-4, 20.0)), 8
    grid = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64)[:-1]
    assert (process.reveal_rate(grid) / steps).max() > 1.5
    assert UnmaskingSampler(steps, "euler").reveal_law(process).min() >= 0


@given(steps=st.integers(1, 300))
def test_euler_equals_tweedie_for_loglinear(steps):
    laws = [UnmaskingSampler(steps, rule).reveal_law(AbsorbingProcess()) for rule in ("euler", "tweedie")]
    torch.testing.assert_close(*laws, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 8, 128, 1024, 4096])
def test_no_step_count_sharpens_a_zipf_law(steps):
    # float32 draws over all tokens and "stay masked" at once give 7.37, 7.02 ... 6.24, 5.70 here (Zheng et al. 2024).
    probs = 1.0 / torch.arange(1, 50258, dtype=torch.float64)
    probs /= probs.sum()
    entropy = -(probs * probs.log()).sum().item()
    assert entropy == pytest.approx(7.566, abs=1e-3)
    x = UnmaskingSampler(steps)(oracle_denoiser(ConstantOracle(probs)), blank(8, 160, 50257), Draw(5))
    surprise = -probs.log()[x].flatten()
    error = surprise.std().item() / math.sqrt(surprise.numel())
    assert error < 0.1
    assert surprise.mean().item() == pytest.approx(entropy, abs=3 * error)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize(("rule", "steps", "length"), [("tweedie", 16, 64), ("tweedie", 200, 64), ("euler", 16, 20)])
def test_evaluations_follow_the_formula(schedule, rule, steps, length):
    sampler = UnmaskingSampler(steps, rule, schedule=schedule)
    oracle = ConstantOracle(torch.tensor([0.5, 0.5]))
    start = blank(16, 64, 2)
    start[:, length:] = 1
    runs = []
    for seed in range(50):
        before = oracle.rows
        sampler(oracle_denoiser(oracle), start, Draw(seed))
        assert sampler.evaluations == (oracle.rows - before) / 16
        runs.append(sampler.evaluations)
    values = torch.tensor(runs)
    error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(
        sampler.expected_evaluations(length, AbsorbingProcess()), abs=3 * error + 1e-9
    )


def test_expected_evaluations_are_those_of_the_table():
    process = AbsorbingProcess()
    published = {32: 32.0, 64: 64.0, 128: 128.0, 256: 251.3, 512: 442.8, 1024: 647.5, 2048: 806.0, 4096: 906.1}
    for steps, value in published.items():
        assert UnmaskingSampler(steps).expected_evaluations(1024, process) == pytest.approx(value, abs=0.06)
    for schedule, value in ((Cosine(), 598.0), (Geometric(1e-4, 20.0), 370.4)):
        sampler = UnmaskingSampler(1024, schedule=schedule)
        assert sampler.expected_evaluations(1024, process) == pytest.approx(value, abs=0.06)
    assert UnmaskingSampler(rule="any_order").expected_evaluations(1024, process) == 1024


def test_rows_do_not_wait_for_each_other():
    oracle = ConstantOracle(torch.tensor([0.5, 0.5]))
    sampler = UnmaskingSampler(10_000)
    sampler(oracle_denoiser(oracle), blank(32, 20, 2), Draw(0))
    assert oracle.calls == 20
    assert sampler.evaluations == pytest.approx(20, abs=0.2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("rule", ["tweedie", "euler", "any_order"])
@pytest.mark.parametrize("strategy", [{}, {"top_p": 0.8}, {"top_p": 1.0}, {"top_k": 2}, {"top_k": 50}])
@pytest.mark.parametrize("steps", [1, 2, 16, 500])
def test_no_mask_is_left_and_prompts_survive(steps, strategy, rule, schedule):
    start = blank(40, 8)
    start[:, :2] = 1
    start[::2, 5] = 2
    start[3] = 0
    sampler = UnmaskingSampler(steps, rule, schedule=schedule, **strategy)
    before = start.clone()
    x = sampler(oracle_denoiser(ConstantOracle(torch.tensor([0.2, 0.5, 0.3]))), start, Draw(6))
    assert torch.equal(start, before)
    assert torch.equal(x[start != V], start[start != V])
    assert ((x >= 0) & (x < V)).all()


def test_infilling_draws_from_the_conditional_law():
    joint = world(4)
    start = blank(20_000)
    start[:, 1] = 2
    x = UnmaskingSampler(rule="any_order")(oracle_denoiser(JointOracle(joint)), start, Draw(7))
    law = joint.clone()
    law[:, :2] = 0.0
    counts = torch.bincount((x * V ** torch.arange(L - 1, -1, -1)).sum(1), minlength=V**L)
    assert_law(counts, (law / law.sum()).flatten())


@pytest.mark.parametrize("rule", ["tweedie", "any_order"])
def test_a_sequence_does_not_depend_on_its_batch(rule):
    denoiser = oracle_denoiser(MarkovOracle(torch.tensor([[0.1, 0.9], [0.6, 0.4]], dtype=torch.float64)))
    sampler, keys = UnmaskingSampler(20, rule), torch.arange(100, 116)
    together = sampler(denoiser, blank(16, 24, 2), Draw(8, keys))
    for i in (0, 5, 15):
        assert torch.equal(sampler(denoiser, blank(1, 24, 2), Draw(8, keys[i : i + 1]))[0], together[i])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("steps", [1, 7, 40, 300])
def test_the_cache_changes_nothing(steps):
    denoiser = oracle_denoiser(MarkovOracle(torch.tensor([[0.1, 0.9], [0.6, 0.4]], dtype=torch.float64)))
    sampler, rows, length = UnmaskingSampler(steps, schedule=Cosine()), 12, 24
    draw = Draw(9)
    reveal, uniform = (draw.uniform((rows, length), torch.float64) for _ in range(2))
    edges = sampler.reveal_law(denoiser.process).cumsum(0)
    x = blank(rows, length, 2)
    for k in range(steps):  # every row at every step, all positions, in lockstep
        now = (x == 2) & (reveal < edges[k] if k < steps - 1 else True)
        tokens = draw_tokens(denoiser.log_probs(x).flatten(0, 1), uniform.flatten()).view(rows, length)
        x = torch.where(now, tokens, x)
    assert torch.equal(sampler(denoiser, blank(rows, length, 2), Draw(9)), x)


@pytest.mark.parametrize(
    ("order", "expected"),
    [("forward", [1, 2, 4, 6]), ("backward", [6, 4, 2, 1]), ([3, 4, 1, 0, 6, 5, 2], [4, 1, 6, 2])],
)
def test_fixed_orders_reveal_one_position_after_the_other(order, expected):
    start = torch.tensor([[0, 2, 2, 0, 2, 1, 2], [0, 2, 2, 0, 2, 1, 2]])
    seen = [start]

    def watch(done, total, x):
        assert (done, total) == (len(seen), 4)
        seen.append(x.clone())

    denoiser = oracle_denoiser(ConstantOracle(torch.tensor([0.5, 0.5])))
    UnmaskingSampler(rule="any_order", order=order)(denoiser, start, Draw(0), on_event=watch)
    for row in range(2):
        changed = [(a[row] != b[row]).nonzero().flatten().tolist() for a, b in itertools.pairwise(seen)]
        assert changed == [[position] for position in expected]


@pytest.mark.parametrize("rule", ["tweedie", "any_order"])
def test_masks_that_are_not_wanted_stay_and_cost_nothing(rule):
    joint = world(3)
    start = blank(3000, 4, 3)
    wanted = torch.tensor([True, False, True, False]).expand_as(start)
    sampler = UnmaskingSampler(1000, rule=rule)
    x = sampler(oracle_denoiser(JointOracle(joint)), start, Draw(4), wanted)
    assert torch.equal(x == 3, ~wanted)
    assert 1.9 < sampler.evaluations <= 2
    # What stays masked is averaged over: the marginal of the two.
    law = joint.sum((1, 3)).flatten()
    counts = torch.bincount(x[:, 0] * 3 + x[:, 2], minlength=9)
    assert chisquare(counts.numpy(), (law / law.sum() * len(x)).numpy()).pvalue > 1e-3


def test_random_orders_are_all_alike_and_differ_between_rows():
    rows, first = 3000, []
    denoiser = oracle_denoiser(ConstantOracle(torch.tensor([0.5, 0.5])))

    def watch(done, total, x):
        if done == 1:
            first.append((x != 2).long().argmax(1))

    UnmaskingSampler(rule="any_order")(denoiser, blank(rows, 6, 2), Draw(10), on_event=watch)
    assert chisquare(torch.bincount(first[0], minlength=6).numpy()).pvalue > 1e-3


def test_a_finished_sequence_costs_nothing():
    oracle, sampler = ConstantOracle(torch.tensor([0.5, 0.5])), UnmaskingSampler(4)
    start = torch.zeros(3, 5, dtype=torch.long)
    assert torch.equal(sampler(oracle_denoiser(oracle), start, Draw(0)), start)
    assert (oracle.calls, sampler.evaluations) == (0, 0)
    assert sampler(oracle_denoiser(oracle), start[:0], Draw(0)).shape == (0, 5)


def test_conditions_reach_the_network_row_by_row():
    class Labelled(ConstantOracle):
        def forward(self, x, positions=None, label=None):
            return torch.where(torch.arange(2) == label[positions // x.shape[1], None], 0.0, -torch.inf)

    start = blank(6, 5, 2)
    start[1, :4] = 0
    label = torch.tensor([0, 1, 0, 1, 1, 0])
    denoiser = oracle_denoiser(Labelled(torch.tensor([0.5, 0.5])))
    x = UnmaskingSampler(30)(denoiser, start, Draw(0), label=label)
    assert torch.equal(x[start == 2], label[:, None].expand(6, 5)[start == 2])


def test_markov_chains_are_reproduced_at_many_steps():
    transition = torch.tensor([[0.05, 0.9, 0.05], [0.1, 0.1, 0.8], [0.7, 0.2, 0.1]], dtype=torch.float64)
    oracle = MarkovOracle(transition)
    x = UnmaskingSampler(4000)(oracle_denoiser(oracle), blank(4000, 12), Draw(11))
    for i in range(11):
        counts = torch.bincount(x[:, i] * 3 + x[:, i + 1], minlength=9)
        assert_law(counts, (oracle.stationary[:, None] * transition).flatten(), smallest=1e-4)


def test_one_step_forgets_the_markov_chain():
    transition = torch.tensor([[0.05, 0.9, 0.05], [0.1, 0.1, 0.8], [0.7, 0.2, 0.1]], dtype=torch.float64)
    oracle = MarkovOracle(transition)
    x = UnmaskingSampler(1)(oracle_denoiser(oracle), blank(4000, 12), Draw(11))
    counts = torch.bincount(x[:, 5] * 3 + x[:, 6], minlength=9)
    assert_law(counts, (oracle.stationary[:, None] * oracle.stationary).flatten())


PROBS = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3], dtype=torch.float64)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (None, None, [0, 1, 3, 4]),
        (0.3, None, [1]),
        (0.39, None, [1]),
        (0.41, None, [1, 4]),
        (0.69, None, [1, 4]),
        (0.71, None, [1, 3, 4]),
        (1.0, None, [0, 1, 3, 4]),
        (None, 1, [1]),
        (None, 2, [1, 4]),
        (None, 5, [0, 1, 3, 4]),
        (None, 99, [0, 1, 3, 4]),
        (0.6, 2, [1, 4]),
        (0.5, 2, [1]),
    ],
)
def test_top_p_and_top_k_draw_from_the_renormalised_head(top_p, top_k, kept):
    uniform = Draw(12).uniform((20_000,), torch.float64)
    drawn = draw_tokens(PROBS.log().expand(20_000, 5), uniform, top_p, top_k)
    law = torch.zeros(5, dtype=torch.float64)
    law[kept] = PROBS[kept] / PROBS[kept].sum()
    assert_law(torch.bincount(drawn, minlength=5), law)


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 1.0]), min_size=2, max_size=8).filter(
        lambda w: sum(w) > 0
    ),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53, 0.5])),
    top_p=st.sampled_from([None, 0.5, 0.999999]),
    top_k=st.sampled_from([None, 1, 3]),
)
def test_an_impossible_token_is_never_drawn(weights, uniform, top_p, top_k):
    log_probs = torch.tensor([weights]).log().log_softmax(1)
    token = draw_tokens(log_probs, torch.tensor([uniform], dtype=torch.float64), top_p, top_k)
    assert weights[token.item()] > 0


def test_every_token_of_a_large_vocabulary_has_its_own_interval():
    probs = 1.0 / torch.arange(1, 50258, dtype=torch.float64)
    probs /= probs.sum()
    tokens = torch.linspace(0, 50256, 200).long()
    middle = (probs.cumsum(0) - 0.5 * probs)[tokens]
    log_probs = probs.log().float().log_softmax(0).expand(200, -1)
    assert torch.equal(draw_tokens(log_probs, middle), tokens)


def test_tokens_rarer_than_float32_can_see_are_drawn():
    probs = torch.tensor([0.5, 1e-12, 0.5], dtype=torch.float64)
    uniform = (probs.cumsum(0) - 0.5 * probs) / probs.sum()
    assert draw_tokens(probs.log().expand(3, 3), uniform).tolist() == [0, 1, 2]


def test_a_rounding_error_in_the_sums_cannot_draw_an_impossible_token(monkeypatch):
    # Parallel sums on a GPU may rise where the probability is 0; here they do so by a lot.
    cumsum = torch.Tensor.cumsum
    rise = torch.tensor([0.0, 0.0, 0.2, 0.2])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, *args, **kwargs: cumsum(x, *args, **kwargs) + rise)
    log_probs = torch.tensor([[0.3, 0.7, 0.0, 0.0]]).log()
    assert draw_tokens(log_probs, torch.tensor([0.9], dtype=torch.float64)).item() == 1


def test_large_vocabularies_are_drawn_in_blocks_with_the_same_result(monkeypatch):
    log_probs, uniform = torch.randn(50, 7).log_softmax(1), Draw(13).uniform((50,), torch.float64)
    whole = draw_tokens(log_probs, uniform, 0.9)
    monkeypatch.setattr("lightning_sgm.samplers.unmasking._WORKSPACE", 21)
    assert torch.equal(draw_tokens(log_probs, uniform, 0.9), whole)


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"rule": "heun"},
        {"order": "sideways", "rule": "any_order"},
        {"order": [0, 2], "rule": "any_order"},
        {"order": [0, 0, 1], "rule": "any_order"},
        {"order": [], "rule": "any_order"},
        {"order": "forward"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"eps": 0.0},
    ],
)
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        UnmaskingSampler(**arguments)


def test_an_order_of_another_length_is_named():
    denoiser = oracle_denoiser(ConstantOracle(torch.tensor([0.5, 0.5])))
    with pytest.raises(ValueError, match="order of the unmasking sampler has 2 positions, sequences 3"):
        UnmaskingSampler(rule="any_order", order=[1, 0])(denoiser, blank(1, 3, 2), Draw(0))


def test_wrong_tokens_are_named():
    denoiser = oracle_denoiser(ConstantOracle(torch.tensor([0.5, 0.5])))
    with pytest.raises(ValueError, match="int64"):
        UnmaskingSampler(2)(denoiser, torch.zeros(2, 3), Draw(0))
