import math

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_sgm.metrics import TokenLikelihood


def fed(batches, **arguments):
    metric = TokenLikelihood(**arguments)
    for nll, index, tokens in batches:
        metric.update(nll, index, tokens)
    return metric


def test_mean_is_over_tokens_and_the_units_follow():
    metric = fed(
        [(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), 4), (torch.tensor([5.0]), torch.tensor([2]), 2)],
        bytes_per_token=4.5,
    )
    result = metric.compute()
    nll = (4 * 1 + 4 * 2 + 2 * 5) / 10
    assert result["nll"].dtype == torch.float64
    assert float(result["nll"]) == pytest.approx(nll, rel=1e-15)
    assert float(result["perplexity"]) == pytest.approx(math.exp(nll), rel=1e-14)
    assert float(result["bits_per_token"]) == pytest.approx(nll / math.log(2), rel=1e-14)
    assert float(result["bits_per_byte"]) == pytest.approx(nll / math.log(2) / 4.5, rel=1e-14)


def test_bits_per_byte_needs_a_known_number_of_bytes():
    result = fed([(torch.ones(3), torch.arange(3), 7)]).compute()
    assert {"nll", "perplexity", "bits_per_token", "standard_error", "perplexity_standard_error"} == set(result)


def test_one_pass_gives_the_spread_over_examples():
    nll = torch.rand(40, dtype=torch.float64)
    metric = fed([(nll[:30], torch.arange(30), 16), (nll[30:], torch.arange(30, 40), 16)], bytes_per_token=1.0)
    result = metric.compute()
    error = float(nll.std()) / math.sqrt(40)
    assert float(result["standard_error"]) == pytest.approx(error, rel=1e-10)
    assert float(result["perplexity_standard_error"]) == pytest.approx(error * math.exp(float(nll.mean())), rel=1e-10)
    assert float(result["bits_per_byte_standard_error"]) == pytest.approx(error / math.log(2), rel=1e-10)


def passes_of(draws, batch):
    """Feed draws (passes, examples), batch by batch, pass by pass."""
    index = torch.arange(draws.shape[1])
    return [(nll, part, 8) for row in draws for nll, part in zip(row.split(batch), index.split(batch), strict=True)]


def test_passes_give_the_variance_between_draws_of_the_same_batch():
    draws = torch.randn(5, 12, dtype=torch.float64) + 10 * torch.arange(12)
    result = fed(passes_of(draws, 4)).compute()
    totals = draws.view(5, 3, 4).sum(2)
    error = totals.var(0).sum().div(5).sqrt() / 12
    assert float(result["nll"]) == pytest.approx(float(draws.mean()), rel=1e-14)
    assert float(result["standard_error"]) == pytest.approx(float(error), rel=1e-10)


@pytest.mark.parametrize("coupling", [-0.1, 0.0, 0.3])
def test_standard_error_is_the_spread_of_repeated_estimates(coupling):
    """Also when draws in a batch hang together, as stratified ones do: x_i = difficulty_i + z_i + coupling * sum z."""
    generator = torch.Generator().manual_seed(0)
    difficulty = 3 * torch.randn(32, generator=generator, dtype=torch.float64)
    means, variances = [], []
    for _ in range(300):
        noise = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
        noise = (noise + coupling * noise.sum(2, keepdim=True)).flatten(1)
        result = fed(passes_of(difficulty + noise, 8)).compute()
        means.append(result["nll"])
        variances.append(result["standard_error"].square())
    assert float(torch.stack(means).var()) == pytest.approx(float(torch.stack(variances).mean()), rel=0.25)
    truth = (1 + 8 * coupling) ** 2 / (32 * 3)
    assert float(torch.stack(variances).mean()) == pytest.approx(truth, rel=0.08)


def test_processes_merge_to_the_result_of_one():
    draws = torch.randn(3, 16, dtype=torch.float64)
    batches = passes_of(draws, 4)
    whole = fed(batches).compute()
    first, second = fed(batches[::2]), fed(batches[1::2])
    first.merge_state(second)
    merged = first.compute()
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        assert float(merged[name]) == pytest.approx(float(value), rel=1e-12), name


def test_order_of_examples_in_a_batch_does_not_matter():
    nll = torch.randn(2, 6, dtype=torch.float64)
    flipped = torch.arange(6).flip(0)
    straight = fed([(nll[0], torch.arange(6), 3), (nll[1], torch.arange(6), 3)]).compute()
    turned = fed([(nll[0], torch.arange(6), 3), (nll[1].flip(0), flipped, 3)]).compute()
    assert float(turned["standard_error"]) == pytest.approx(float(straight["standard_error"]), rel=1e-12)


def test_reset_forgets_the_passes():
    metric = fed(passes_of(torch.randn(2, 8, dtype=torch.float64), 4))
    metric.reset()
    nll = torch.rand(8, dtype=torch.float64)
    metric.update(nll, torch.arange(8), 8)
    assert float(metric.compute()["standard_error"]) == pytest.approx(float(nll.std()) / math.sqrt(8), rel=1e-10)


def test_half_precision_of_the_model_leaves_the_sums_alone():
    class Method(LightningModule):
        def __init__(self):
            super().__init__()
            self.likelihood = TokenLikelihood()

    module = Method().to(torch.bfloat16)
    for i in range(1000):
        module.likelihood.update(torch.full((1,), 1.001, dtype=torch.float64), torch.tensor([i]), 1)
    assert float(module.likelihood.compute()["nll"]) == pytest.approx(1.001, rel=1e-12)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="bytes_per_token"):
        TokenLikelihood(bytes_per_token=0.0)
    with pytest.raises(ValueError, match=r"shape \(batch,\)"):
        TokenLikelihood().update(torch.zeros(2, 3), torch.zeros(2), 3)
    with pytest.raises(ValueError, match="update"):
        TokenLikelihood()(torch.zeros(2), torch.zeros(2), 3)
    with pytest.raises(ValueError, match="no example"), pytest.warns(UserWarning, match="compute"):
        TokenLikelihood().compute()


def controlled(draws, controls, batch):
    metric, index = TokenLikelihood(), torch.arange(draws.shape[1])
    for row, chance in zip(draws, controls, strict=True):
        parts = zip(row.split(batch), chance.split(batch), index.split(batch), strict=True)
        for nll, control, part in parts:
            metric.update(nll, part, 8, control)
    return metric.compute()


def test_a_control_takes_its_noise_away_and_leaves_an_honest_error():
    generator = torch.Generator().manual_seed(1)
    difficulty = 3 * torch.randn(32, generator=generator, dtype=torch.float64)
    means, variances = [], []
    for _ in range(300):
        chance, rest = torch.randn(2, 6, 32, generator=generator, dtype=torch.float64)
        result = controlled(difficulty + 2.5 * chance + 0.5 * rest, chance, 4)
        means.append(result["nll"])
        variances.append(result["standard_error"].square())
    truth = 0.25 / (32 * 6)
    assert float(torch.stack(variances).mean()) == pytest.approx(truth, rel=0.08)
    assert float(torch.stack(means).var()) == pytest.approx(truth, rel=0.25)
    assert float(torch.stack(means).mean()) == pytest.approx(float(difficulty.mean()), abs=4 * (truth / 300) ** 0.5)


def test_a_control_without_relation_or_with_few_passes_changes_little():
    draws, chance = torch.randn(2, 6, 32, dtype=torch.float64)
    plain = fed(passes_of(draws, 4)).compute()
    both = controlled(draws, chance, 4)
    assert float(both["nll"]) == pytest.approx(float(plain["nll"]), abs=2 * float(plain["standard_error"]))
    assert float(both["standard_error"]) == pytest.approx(float(plain["standard_error"]), rel=0.2)


def test_with_few_passes_a_control_counts_as_much_as_the_nll():
    generator = torch.Generator().manual_seed(2)
    chance, rest = torch.randn(2, 2, 32, generator=generator, dtype=torch.float64)
    draws = 5 + 5 * chance + 0.1 * rest
    plain = fed(passes_of(draws, 4)).compute()
    few = controlled(draws, chance, 4)  # eight repeats
    assert float(few["nll"]) == pytest.approx(float(plain["nll"] * (1 - chance.mean())), rel=1e-12)
    assert float(few["nll"]) == pytest.approx(5, abs=0.3)
    left = (draws - plain["nll"] * chance).view(2, 8, 4).sum(2)
    error = left.var(0).sum().div(2).sqrt() / 32
    assert float(few["standard_error"]) == pytest.approx(float(error), rel=1e-9)


def test_processes_merge_controls_too():
    draws, chance = torch.randn(2, 6, 32, dtype=torch.float64)
    draws = draws + 2 * chance
    whole = controlled(draws, chance, 4)
    parts = [TokenLikelihood(), TokenLikelihood()]
    for row, control in zip(draws, chance, strict=True):
        batches = zip(row.split(4), control.split(4), torch.arange(32).split(4), strict=True)
        for i, (nll, noise, index) in enumerate(batches):
            parts[i % 2].update(nll, index, 8, noise)
    parts[0].merge_state(parts[1])
    for name, value in parts[0].compute().items():
        assert float(value) == pytest.approx(float(whole[name]), rel=1e-12), name
