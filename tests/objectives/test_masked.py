import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.networks.base import TokenNetwork
from lightning_sgm.networks.masked_transformer import MaskedTransformer
from lightning_sgm.objectives.masked import (
    MaskedLoss,
    MaskedObjective,
    Stratification,
    masked_nll,
    nll_by_masked_fraction,
)
from lightning_sgm.processes.absorbing import AbsorbingProcess, Cosine, CosineSquared, Geometric, Loglinear
from lightning_sgm.random import Draw
from tests.oracles import ConstantOracle, JointOracle, oracle_denoiser

LOSSES: tuple[MaskedLoss, ...] = ("t_DSE", "t_DCE", "lambda_DCE", "k_DCE")
STRATIFICATIONS: tuple[Stratification, ...] = ("stratified", "offset", "independent")
SCHEDULES = (Loglinear(), Geometric(1e-3, 1.0), Geometric(1e-4, 20.0), Cosine(), CosineSquared())


def frozen(vocabulary=5, schedule=Loglinear(), length=4):
    """A denoiser with a random network in eval mode."""
    torch.manual_seed(0)
    spec = {"kind": "text", "length": length, "vocabulary": vocabulary}
    network = MaskedTransformer(spec, width=8, blocks=1, heads=2).eval()
    nn.init.normal_(network.output_layer.linear.weight)
    return TokenDenoiser(network, AbsorbingProcess(schedule), vocabulary)


def subset_nll(denoiser, x0):
    """Sum of -ln c over the masked positions of every non-empty subset of positions masked, {subset: nats}."""
    length, found = len(x0), {}
    for size in range(1, length + 1):
        for subset in itertools.combinations(range(length), size):
            x = x0.clone()
            x[list(subset)] = denoiser.mask_id
            logp = denoiser.log_probs(x[None])[0].double()
            found[subset] = -sum(logp[i, x0[i]].item() for i in subset)
    return found


def any_order_nll(denoiser, x0):
    """Mean over all orders of the autoregressive negative log-likelihood, nats per token, term by term."""
    total = 0.0
    for order in itertools.permutations(range(len(x0))):
        x = torch.full_like(x0, denoiser.mask_id)
        for i in order:
            total -= denoiser.log_probs(x[None])[0, i, x0[i]].item()
            x[i] = x0[i]
    return total / math.factorial(len(x0)) / len(x0)


@torch.no_grad()
def test_the_subsets_give_the_any_order_likelihood():
    """radd.md 2.3: sum_k 1 / (k C(L, k)) sum over |A| = k of sum_i n_i(A)."""
    denoiser, x0 = frozen(), torch.tensor([3, 0, 4, 1])
    expected = sum(nll / (len(a) * math.comb(4, len(a))) for a, nll in subset_nll(denoiser, x0).items()) / 4
    assert any_order_nll(denoiser, x0) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stratification", STRATIFICATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_all_losses_estimate_the_any_order_likelihood(loss, stratification):
    denoiser, x0 = frozen(), torch.tensor([3, 0, 4, 1])
    exact = any_order_nll(denoiser, x0)
    objective, draw = MaskedObjective(loss, stratification), Draw(7)
    draws = [objective(denoiser, x0.expand(512, 4), draw)["loss"] for _ in range(40)]
    means = torch.stack(draws).div(4).double().mean(1)
    error = means.std() / math.sqrt(len(means))
    # The times below t_min = 1e-3 are worth at most about ln V / 1000 per token.
    assert abs(means.mean() - exact) < 4 * error + 0.003
    assert error < 0.03 * exact


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_t_losses_have_the_expectation_of_their_schedule(schedule):
    """The mean over masks at each time, by enumeration, integrated over time."""
    denoiser, x0 = frozen(schedule=schedule), torch.tensor([3, 0, 4, 1])
    t = torch.linspace(1e-3, 1, 200001, dtype=torch.float64)
    rate, total = schedule.rate(t), schedule.integral(t)
    share, at_time = 1 - torch.exp(-total), torch.zeros_like(t)
    for subset, nll in subset_nll(denoiser, x0).items():
        at_time += share ** len(subset) * (1 - share) ** (4 - len(subset)) * nll
    exact = torch.trapezoid(at_time * rate / torch.expm1(total), t).item() / (1 - 1e-3) / 4
    for objective, key in ((MaskedObjective("t_DSE"), "nll"), (MaskedObjective("t_DCE"), "nll")):
        draw = Draw(3)
        means = torch.stack([objective(denoiser, x0.expand(512, 4), draw)[key].double().mean() for _ in range(30)])
        assert abs(means.mean() - exact) < 4 * means.std() / math.sqrt(len(means))


@torch.no_grad()
def test_with_the_true_conditionals_the_loss_is_the_entropy():
    torch.manual_seed(0)
    joint = torch.rand(3, 3, 3, dtype=torch.float64) ** 3
    joint /= joint.sum()
    oracle, objective = JointOracle(joint), MaskedObjective("k_DCE")
    x0 = oracle.sequences[torch.multinomial(joint.flatten(), 20000, replacement=True)]
    losses = objective(oracle_denoiser(oracle), x0, Draw(0))["loss"].div(x0.shape[1])
    entropy = -(joint * joint.log()).sum().item() / 3
    assert losses.mean().item() == pytest.approx(entropy, abs=4 * losses.std().item() / math.sqrt(20000))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_new_network_scores_log_v(loss):
    spec = {"kind": "text", "length": 16, "vocabulary": 50}
    denoiser = TokenDenoiser(MaskedTransformer(spec, width=8, blocks=1, heads=2), AbsorbingProcess(), 50)
    x0 = torch.randint(50, (2048, 16))
    result = MaskedObjective(loss)(denoiser, x0, Draw(1))
    nll = result["nll"]
    assert result["loss"].dtype == torch.float32
    assert nll.mean().item() == pytest.approx(math.log(50), rel=0.03)
    if loss != "t_DCE":
        torch.testing.assert_close(result["loss"], 16 * nll)
    if loss == "k_DCE":
        torch.testing.assert_close(nll, torch.full((2048,), math.log(50)))


def test_loglinear_t_dse_weighs_by_one_over_t():
    objective = MaskedObjective("t_DSE")
    masking = objective.draw_masking(AbsorbingProcess(), 64, 10, Draw(5))
    t = 1e-3 + (1 - 1e-3) * objective.draw_uniform(64, Draw(5))
    torch.testing.assert_close(masking.weight, 1 / t, rtol=1e-12, atol=0)
    torch.testing.assert_close(masking.probability, (1 - 1e-3) * t, rtol=1e-12, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_t_dse_is_the_score_entropy(schedule):
    """sigma sum_masked [r n' + sum_y s_y + K] of radd.md 2.3, with s = r c, n' = -ln s_x0, K = r ln r - r."""
    denoiser, draw = frozen(schedule=schedule), Draw(11)
    x0, objective = torch.randint(5, (6, 4)), MaskedObjective("t_DSE", "independent")
    t = 1e-3 + (1 - 1e-3) * (1 - draw.uniform((6,), torch.float64))
    mask = draw.uniform((6, 4), torch.float64) < -torch.expm1(-schedule.integral(t))[:, None]
    r = (1 / torch.expm1(schedule.integral(t)))[:, None]
    score = r[..., None] * denoiser.log_probs(x0.masked_fill(mask, 5)).double().exp()
    at_token = -score.gather(2, x0[..., None])[..., 0].log()
    entropy = (mask * (r * at_token + score.sum(-1) + r * r.log() - r)).sum(1) * schedule.rate(t) / 4
    got = objective(denoiser, x0, Draw(11))["loss"].div(x0.shape[1])
    torch.testing.assert_close(got.double(), entropy, rtol=1e-4, atol=1e-5)


def gradients(objective, denoiser, x0, seed=0):
    loss = objective(denoiser, x0, Draw(seed))["loss"].div(x0.shape[1]).mean()
    return loss.item(), torch.autograd.grad(loss, list(denoiser.network.parameters()))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_t_dse_and_t_dce_differ_by_a_constant(schedule):
    denoiser, x0 = frozen(schedule=schedule), torch.randint(5, (16, 4))
    first, grads = gradients(MaskedObjective("t_DSE"), denoiser, x0)
    second, others = gradients(MaskedObjective("t_DCE"), denoiser, x0)
    assert first != second
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    result = MaskedObjective("t_DCE")(denoiser, x0, Draw(0))
    assert result["nll"].mean().item() == pytest.approx(first, rel=1e-6)


@torch.no_grad()
def test_the_constant_of_t_dce_has_no_mean():
    """Over all times; the integral of lambda sigma / (e^S - 1) ln(e^S - 1) dt vanishes."""
    denoiser = oracle_denoiser(ConstantOracle(torch.full((4,), 0.25)))
    result = MaskedObjective("t_DCE")(denoiser, torch.zeros(20000, 8, dtype=torch.int64), Draw(2))
    extra = (result["loss"].div(8) - result["nll"]).double()
    assert abs(extra.mean()) < 4 * extra.std() / math.sqrt(20000) + 0.01
    assert extra.std() > 0.3


@torch.no_grad()
@pytest.mark.parametrize("loss", LOSSES)
def test_one_draw_is_worth_what_the_table_says(loss):
    """The whole call against a loop over positions, with the same masks."""
    denoiser, x0, objective = frozen(), torch.randint(5, (8, 4)), MaskedObjective(loss)
    seen = []
    denoiser.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    got = objective(denoiser, x0, Draw(4))["loss"].div(x0.shape[1])
    masking = objective.draw_masking(denoiser.process, 8, 4, Draw(4))
    x = seen[0]
    assert ((x == x0) | (x == 5)).all()
    logp = denoiser.log_probs(x)
    for row in range(8):
        masked = [i for i in range(4) if x[row, i] == 5]
        if masking.count is not None:
            assert len(masked) == masking.count[row]
        constant = 0.0 if masking.constant is None else masking.constant[row].item()
        weight = masking.weight[row].item()
        value = sum(-weight * logp[row, i, x0[row, i]].item() + constant for i in masked) / 4
        assert got[row].item() == pytest.approx(value, rel=1e-4, abs=1e-6)


class Spy(TokenNetwork):
    """Records its arguments."""

    def forward(self, x, positions=None, topic=None):
        self.seen = (x, positions, topic)
        return torch.zeros(len(positions), 5, requires_grad=True)


def test_the_network_sees_masks_and_conditions_but_no_time():
    spy, x0 = Spy(), torch.randint(5, (6, 9))
    topic = torch.arange(6)
    MaskedObjective()(TokenDenoiser(spy, AbsorbingProcess(), 5), x0, Draw(0), topic=topic)
    x, positions, passed = spy.seen
    assert torch.equal((x.flatten() == 5).nonzero()[:, 0], positions)
    assert passed is topic


def test_no_mask_at_all_is_no_loss():
    denoiser, x0 = frozen(), torch.randint(5, (2, 4))
    loss = masked_nll(denoiser, x0, torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(loss, torch.zeros(2))
    loss.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in denoiser.network.parameters())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(0, 1000))
def test_strata_hold_one_number_each(rows, seed):
    u = MaskedObjective(stratification="stratified").draw_uniform(rows, Draw(seed))
    assert sorted(torch.ceil(u * rows).int().tolist()) == list(range(1, rows + 1))
    u = MaskedObjective(stratification="offset").draw_uniform(rows, Draw(seed))
    assert u.sort().values.diff().numpy() == pytest.approx(1 / rows, abs=1e-12)


@pytest.mark.parametrize("stratification", STRATIFICATIONS)
def test_each_number_is_uniform_by_itself(stratification):
    """Were the strata not dealt at random, row j of a batch would always lie in cell j (radd.md 8, trap 5)."""
    objective, draw = MaskedObjective(stratification=stratification), Draw(0)
    u = torch.stack([objective.draw_uniform(4, draw) for _ in range(4000)])
    for row in range(4):
        counts = torch.histc(u[:, row].float(), 8, 0, 1)
        assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-square with 7 degrees of freedom, p = 1e-4
    assert (u > 0).all()
    assert (u <= 1).all()


class Extreme(Draw):
    """Always the smallest or largest possible uniform number."""

    def __init__(self, value):
        super().__init__(0)
        self.value = value

    def uniform(self, shape, dtype=torch.float32):
        return torch.full(tuple(shape), self.value, dtype=dtype)


@pytest.mark.parametrize("value", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("stratification", STRATIFICATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_numbers_stay_finite(loss, stratification, value):
    for schedule in SCHEDULES:
        masking = MaskedObjective(loss, stratification).draw_masking(AbsorbingProcess(schedule), 6, 10, Extreme(value))
        assert masking.weight.isfinite().all()
        if masking.count is not None:
            assert masking.count.min() >= 1
            assert masking.count.max() <= 10
        if masking.probability is not None:
            assert masking.probability.min() > 0
            assert masking.probability.max() <= 1
        assert masking.constant is None or masking.constant.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("loss", LOSSES)
def test_in_exact_mode_no_row_depends_on_its_batch(loss):
    denoiser, x0, objective = frozen(), torch.randint(5, (10, 4)), MaskedObjective(loss)
    draw = Draw(9, keys=torch.arange(100, 110))
    whole, index = objective(denoiser, x0, draw)["loss"].div(x0.shape[1]), torch.tensor([7, 2, 3])
    torch.testing.assert_close(objective(denoiser, x0[index], draw.rows(index))["loss"].div(x0.shape[1]), whole[index])


@torch.no_grad()
def test_strata_remove_the_noise_of_k():
    """All tokens alike: only a fully masked sequence has a loss, and exactly one in four has k = 4."""
    joint = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    joint[[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]] = 1 / 3
    denoiser, x0, draw = oracle_denoiser(JointOracle(joint)), torch.ones(32, 4, dtype=torch.int64), Draw(1)
    for stratification in STRATIFICATIONS:
        objective = MaskedObjective("k_DCE", stratification)
        means = torch.stack([objective(denoiser, x0, draw)["loss"].div(x0.shape[1]).mean() for _ in range(50)])
        assert bool((means - math.log(3) / 4).abs().max() < 1e-6) == (stratification != "independent")


def test_gradients_do_not_depend_on_the_way_of_indexing():
    """Fused, masked-only loss against log-probabilities at all positions."""
    denoiser, x0 = frozen(), torch.randint(5, (8, 4))
    mask = torch.rand(8, 4) < 0.5
    parameters = list(denoiser.network.parameters())
    first = masked_nll(denoiser, x0, mask)
    logp = denoiser.log_probs(x0.masked_fill(mask, 5)).gather(2, x0[..., None])[..., 0]
    second = -(logp * mask).sum(1)
    torch.testing.assert_close(first, second)
    weights = torch.randn(8)
    pairs = zip(*(torch.autograd.grad((loss * weights).sum(), parameters) for loss in (first, second)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class HalfLogits(TokenNetwork):
    """The same bfloat16 logits everywhere."""

    row = torch.linspace(-3, 3, 5).bfloat16()

    def forward(self, x, positions=None):
        return self.row.expand(len(positions), 5)


def test_softmax_is_float32_whatever_the_logits():
    x0 = torch.randint(5, (6, 7))
    loss = MaskedObjective()(TokenDenoiser(HalfLogits(), AbsorbingProcess(), 5), x0, Draw(0))["loss"].div(x0.shape[1])
    nll = masked_nll(TokenDenoiser(HalfLogits(), AbsorbingProcess(), 5), x0, torch.ones(6, 7, dtype=torch.bool))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(nll.double(), -HalfLogits.row.double().log_softmax(0)[x0].sum(1), rtol=1e-6, atol=0)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="loss must be one of t_DSE"):
        MaskedObjective("k_dce")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stratification must be one of"):
        MaskedObjective(stratification="vdm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="t_min"):
        MaskedObjective(t_min=0.0)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("loss", LOSSES)
def test_controls_have_no_mean_and_take_the_noise_of_the_count(loss, schedule):
    denoiser = oracle_denoiser(ConstantOracle(torch.tensor([0.25] * 4)))
    denoiser.process = AbsorbingProcess(schedule)
    x0, objective = torch.zeros(4000, 16, dtype=torch.int64), MaskedObjective(loss, "independent")
    nll, control = objective.evaluate(denoiser, x0, Draw(3))
    assert torch.allclose(nll, objective(denoiser, x0, Draw(3))["nll"])
    error = float(control.std()) / math.sqrt(len(control))
    assert abs(float(control.mean())) <= 4 * error
    # Every masked token costs ln 4: all that is left is a function of the level.
    left = nll - math.log(4) * control
    masking = objective.draw_masking(denoiser.process, 4000, 16, Draw(3))
    level = 1.0 if masking.probability is None else masking.weight * masking.probability
    assert torch.allclose(left.double(), math.log(4) * torch.as_tensor(level).expand(4000).double(), rtol=1e-4)


@torch.no_grad()
def test_loss_by_masked_fraction():
    joint = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint /= joint.sum()
    denoiser, x0 = oracle_denoiser(JointOracle(joint)), torch.tensor([[2, 0, 1, 1]]).expand(3000, 4)
    found = nll_by_masked_fraction(denoiser, x0, Draw(0), torch.tensor([0.25, 0.5, 1.0]))
    by_subset = subset_nll(denoiser, x0[0])
    for value, count in zip(found.tolist(), (1, 2, 4), strict=True):
        exact = [nll / count for subset, nll in by_subset.items() if len(subset) == count]
        assert value == pytest.approx(sum(exact) / len(exact), abs=0.05)
    assert float(found[2]) == pytest.approx(by_subset[0, 1, 2, 3] / 4, rel=1e-5)
