import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgm.processes import CLEAN, VE, VP, Cosine, CosineChain, DDPMChain, SMLDChain, SubVP
from lightning_sgm.processes.chains import as_chain
from lightning_sgm.random import Draw
from lightning_sgm.testing import check_process

CHAINS = {
    "DDPM": DDPMChain(),
    "shortest DDPM": DDPMChain(21),
    "gentle DDPM": DDPMChain(50, 0.5, 5.0),
    "cosine": CosineChain(),
    "short cosine": CosineChain(8),
    "cosine from 1": CosineChain(40, 0.0, 0.9),
    "SMLD": SMLDChain(),
    "SMLD of ten": SMLDChain(10, 0.01, 1.0),
    "shortest SMLD": SMLDChain(2),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())


def ddpm_table(steps, low, high):
    """alpha and sigma of every index by the product of the chain's own factors."""
    alphas = 1 - torch.linspace(low / steps, high / steps, steps, dtype=torch.float64)
    product = alphas.cumprod(0)
    return product.sqrt(), (1 - product).sqrt()


def smld_table(steps, low, high):
    return torch.ones(steps).double(), torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64)


@every_chain
def test_parts_fit_together(chain):
    check_process(chain)


@pytest.mark.parametrize(("steps", "low", "high"), [(1000, 0.1, 20.0), (21, 0.1, 20.0), (50, 0.5, 5.0)])
def test_ddpm_levels_are_its_table(steps, low, high):
    chain, index = DDPMChain(steps, low, high), torch.arange(steps)
    alpha, sigma = ddpm_table(steps, low, high)
    level = chain.level(chain.time(index))
    torch.testing.assert_close(level.alpha, alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(level.sigma, sigma, rtol=1e-11, atol=0)
    assert float(chain.betas[0]) == pytest.approx(low / steps)
    assert float(chain.betas[-1]) == pytest.approx(high / steps)


# pad_ts.md section 2: beta_0, abar_0, sqrt(1 - abar_0), abar_{T/2}, abar_{T-2}, abar_{T-1}.
COSINE = {
    250: (1.94269e-4, 0.99980573, 0.013938, 0.48761043, 3.88598e-5, 3.88598e-8),
    500: (8.74241e-5, 0.99991258, 0.009350, 0.49072683, 9.71504e-6, 9.71504e-9),
}


@pytest.mark.parametrize("steps", COSINE)
def test_cosine_levels_are_the_measured_table(steps):
    chain = CosineChain(steps)
    level = chain.level(chain.time(torch.arange(steps)))
    kept = level.alpha**2
    found = (chain.betas[0], kept[0], level.sigma[0], kept[steps // 2], kept[-2], kept[-1])
    digits = ("{:.5e}", "{:.8f}", "{:.6f}", "{:.8f}", "{:.5e}", "{:.5e}")
    expected = [form.format(value) for form, value in zip(digits, COSINE[steps], strict=True)]
    assert [form.format(float(value)) for form, value in zip(digits, found, strict=True)] == expected


@pytest.mark.parametrize(("steps", "offset", "beta_max"), [(250, 0.008, 0.999), (500, 0.008, 0.999), (30, 0.1, 0.3)])
def test_cosine_levels_are_products_of_its_betas(steps, offset, beta_max):
    def f(u):
        return math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2

    betas = torch.tensor(
        [min(1 - f((i + 1) / steps) / f(i / steps), beta_max) for i in range(steps)], dtype=torch.float64
    )
    chain = CosineChain(steps, offset, beta_max)
    torch.testing.assert_close(chain.betas, betas, rtol=1e-11, atol=0)
    kept = torch.cumprod(1 - betas, 0)
    level = chain.level(chain.time(torch.arange(steps)))
    torch.testing.assert_close(level.alpha**2, kept, rtol=1e-11, atol=0)
    torch.testing.assert_close(level.sigma**2, 1 - kept, rtol=1e-11, atol=0)
    if beta_max == 0.999:
        assert (chain.betas < beta_max).sum() == steps - 1
        # Uncut, it is the continuous schedule at its times.
        continuous = Cosine(offset).level(chain.time(torch.arange(steps - 1)))
        torch.testing.assert_close(level.alpha[:-1], continuous.alpha, rtol=1e-10, atol=0)


@pytest.mark.parametrize("steps", [250, 500])
def test_posterior_of_the_cosine_chain(steps):
    """c1 = beta sqrt(abar_{t-1}) / (1 - abar), c2 = (1 - abar_{t-1}) sqrt(1 - beta) / (1 - abar), and variances."""
    chain, index = CosineChain(steps), torch.arange(1, steps)
    before, level = chain.level(chain.time(index - 1)), chain.level(chain.time(index))
    one, zero = torch.ones(len(index), dtype=torch.float64), torch.zeros(len(index), dtype=torch.float64)
    beta, kept = chain.betas[1:], torch.cumprod(1 - chain.betas, 0)
    c1, std = chain.posterior(one, zero, level, before)
    c2, _ = chain.posterior(zero, one, level, before)
    torch.testing.assert_close(c1, beta * kept[:-1].sqrt() / (1 - kept[1:]), rtol=1e-10, atol=0)
    torch.testing.assert_close(c2, (1 - kept[:-1]) * (1 - beta).sqrt() / (1 - kept[1:]), rtol=1e-10, atol=0)
    torch.testing.assert_close(std**2, beta * (1 - kept[:-1]) / (1 - kept[1:]), rtol=1e-10, atol=0)
    torch.testing.assert_close(c1 + c2 * level.alpha, before.alpha, rtol=0, atol=1e-13)
    torch.testing.assert_close(chain.transition(before, level)[1] ** 2, beta, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("steps", "low", "high"), [(1000, 0.02, 100.0), (10, 0.01, 50.0), (2, 0.01, 1.0)])
def test_smld_levels_are_its_table(steps, low, high):
    chain = SMLDChain(steps, low, high)
    level = chain.level(chain.time(torch.arange(steps)))
    alpha, sigma = smld_table(steps, low, high)
    torch.testing.assert_close(level.alpha, alpha)
    torch.testing.assert_close(level.sigma, sigma, rtol=1e-12, atol=0)


def test_transitions_between_indices_are_the_chains_own_steps():
    chain, index = DDPMChain(), torch.arange(1, 1000)
    scale, std = chain.transition(chain.level(chain.time(index - 1)), chain.level(chain.time(index)))
    beta = chain.betas[1:]
    torch.testing.assert_close(scale, torch.sqrt(1 - beta), rtol=1e-11, atol=0)
    torch.testing.assert_close(std, torch.sqrt(beta), rtol=1e-9, atol=0)
    smld = SMLDChain()
    scale, std = smld.transition(smld.level(smld.time(index - 1)), smld.level(smld.time(index)))
    sigma = smld_table(1000, 0.02, 100.0)[1]
    assert (scale == 1).all()
    torch.testing.assert_close(std, torch.sqrt(sigma[1:] ** 2 - sigma[:-1] ** 2), rtol=1e-9, atol=0)


@every_chain
def test_time_zero_is_clean_and_the_first_step_starts_there(chain):
    start, first = chain.level(0.0), chain.level(chain.time(0))
    assert (start.alpha, start.sigma) == (CLEAN.alpha, CLEAN.sigma) == (1, 0)
    assert chain.time(0) == chain.t_min == chain.chain_step
    assert chain.time(chain.steps - 1) == 1
    scale, std = chain.transition(start, first)
    assert float(scale) == pytest.approx(float(first.alpha))
    assert float(std) == pytest.approx(float(first.sigma))


@given(steps=st.integers(2, 4000))
def test_indices_are_integers_whatever_the_rounding_of_times(steps):
    # floor(t (N - 1)) of the reference is off by one for half of the steps of N = 2000 (score_sde.md, trap 8).
    chain, index = SMLDChain(steps), torch.arange(steps)
    assert torch.equal(chain.index(chain.time(index)), index.double())
    assert torch.equal(chain.label(chain.time(index)), (steps - 1 - index).double())
    assert [float(chain.time(i)) for i in (0, steps - 1)] == [1 / steps, 1.0]


def test_labels():
    ddpm, smld, t = DDPMChain(100), SMLDChain(100), torch.tensor([0.01, 0.5, 0.505, 1.0]).double()
    torch.testing.assert_close(ddpm.label(t), torch.tensor([0.0, 49.0, 49.5, 99.0]).double())
    # Label 0 is the largest sigma.
    torch.testing.assert_close(smld.label(t), torch.tensor([99.0, 50.0, 49.5, 0.0]).double())
    assert smld.label(0.003) == 99
    assert ddpm.label(0.003) == 0


@given(steps=st.integers(2, 300), low=st.floats(1e-6, 1.0), share=st.floats(1e-3, 0.999))
def test_ddpm_is_monotone_between_its_indices(steps, low, share):
    high = share * steps
    if not low < high:
        return
    chain = DDPMChain(steps, low, high)
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    total = chain.integral(t)
    assert (total.diff() >= -1e-15).all()
    # Strictly so from one index to the next, and the drift never points away from 0.
    assert (chain.integral(chain.time(torch.arange(steps))).diff() > 0).all()
    assert (chain.drift(t[1:]) <= 1e-12).all()


def test_long_chains_approach_the_sdes():
    t = torch.linspace(0.01, 1.0, 100, dtype=torch.float64)
    for chain, process in ((DDPMChain(100_000), VP()), (SMLDChain(100_000), VE())):
        torch.testing.assert_close(chain.sigma(t), process.sigma(t), rtol=2e-3, atol=0)
        torch.testing.assert_close(chain.diffusion(t), process.diffusion(t), rtol=2e-3, atol=0)
        torch.testing.assert_close(chain.drift(t), process.drift(t), rtol=2e-3, atol=0)


@every_chain
def test_level_from_its_snr(chain):
    t = torch.cat([chain.time(torch.arange(chain.steps)), torch.linspace(0.001, 0.999, 77).double()])
    torch.testing.assert_close(chain.t_from_log_snr(chain.log_snr(t)), t, rtol=1e-9, atol=1e-12)
    ends = chain.t_from_log_snr(torch.tensor([-math.inf, -500.0, math.inf]).double())
    torch.testing.assert_close(ends, torch.tensor([1.0, 1.0, 0.0]).double())


@every_chain
def test_everything_is_finite_from_the_first_index_on(chain):
    t = torch.linspace(chain.t_min, 1.0, 1001, dtype=torch.float64)
    for value in (*chain.level(t), *chain.derivatives(t), chain.drift(t), chain.diffusion(t), chain.log_snr(t)):
        assert value.dtype == torch.float64
        assert value.isfinite().all()
    assert chain.prior((3, 2), Draw(0)).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPMChain(20), "a DDPMChain of 20 steps .* use more than 20 steps"),
        (lambda: DDPMChain(5), "beta_max / steps = 4"),
        (lambda: DDPMChain(100, 3.0, 2.0), "0 < beta_min < beta_max"),
        (lambda: DDPMChain(1, 0.1, 0.5), "DDPMChain needs at least 2 steps, got 1"),
        (lambda: CosineChain(1), "CosineChain needs at least 2 steps, got 1"),
        (lambda: CosineChain(10, -0.1), "offset >= 0 and beta_max in .* got -0.1 and 0.999"),
        (lambda: CosineChain(10, beta_max=1.0), r"beta_max in \(0, 1\)"),
        (lambda: SMLDChain(0), "SMLDChain needs at least 2 steps"),
        (lambda: SMLDChain(10, 2.0, 1.0), "0 < sigma_min < sigma_max, got 2.0, 1.0"),
        (lambda: SMLDChain(10, 1.0, 1.0), "0 < sigma_min < sigma_max"),
        (
            lambda: as_chain(SubVP(), "ChainTimes"),
            "ChainTimes needs a discrete chain, and SubVP is none: .*sub-VP has no",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
