import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_sgm.denoiser import Denoiser, EDMPreconditioning, GaussianMixtureDenoiser, Preconditioning
from lightning_sgm.objectives.denoising import (
    ChainTimes,
    DenoisingObjective,
    LogNormalRatio,
    Times,
    UniformLogSNR,
    UniformTime,
)
from lightning_sgm.objectives.weights import (
    DataWeight,
    EDMWeight,
    LikelihoodWeight,
    MinSNR,
    NoiseWeight,
    PosteriorWeight,
    VelocityWeight,
    VWeight,
    Weight,
)
from lightning_sgm.processes.chains import DDPMChain, SMLDChain
from lightning_sgm.processes.gaussian import EDM, VE, VP, Cosine, Flow, SubVP
from lightning_sgm.processes.residual import ResidualShift
from lightning_sgm.random import Draw
from lightning_sgm.residual_denoiser import ResidualDenoiser, ResShiftPreconditioning

PROCESSES = {"VP": VP(), "sub-VP": SubVP(), "VE": VE(0.01, 50.0), "EDM": EDM(), "cosine": Cosine(), "flow": Flow()}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
WEIGHTS = [NoiseWeight(), DataWeight(), LikelihoodWeight(), EDMWeight(0.7), MinSNR(), VelocityWeight(), VWeight()]
every_weight = pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: type(weight).__name__)


class Fixed(Times):
    """Given times, for tests at one level."""

    def __init__(self, t):
        self.t = torch.as_tensor(t, dtype=torch.float64)

    def __call__(self, process, count, draw):
        return self.t.expand(count)


class Zero(nn.Module):
    def forward(self, x, label, /):
        return torch.zeros_like(x)


class Answer(nn.Module):
    """Any function of input and label, to have an error to weigh."""

    def forward(self, x, label, /):
        return torch.sin(3 * x) + 0.1


def exact(process, std, dimensions=4):
    return GaussianMixtureDenoiser(process, torch.zeros(1, dimensions), std**2 * torch.eye(dimensions)[None])


def normal_data(rows, std, dimensions=4, seed=5):
    return std * Draw(seed).normal((rows, dimensions), torch.float64)


# The smallest possible loss (score_sde.md 10).


@pytest.mark.parametrize(
    ("process", "std", "optimum"),
    [
        (VP(), 0.5, 0.17331),
        (SubVP(), 0.5, 0.23555),
        (VE(0.01, 50.0), 0.5, 0.45932),
        (VP(), 1.0, 0.27599),
        (SubVP(), 1.0, 0.32117),
        (VE(0.01, 50.0), 1.0, 0.54067),
    ],
)
def test_optimal_default_loss(process, std, optimum):
    t = (torch.arange(20000).double() + 0.5) / 20000
    level = process.level(t)
    signal = (level.alpha * std) ** 2
    assert float((signal / (signal + level.sigma**2)).mean()) == pytest.approx(optimum, abs=2e-5)
    loss = DenoisingObjective()(exact(process, std), normal_data(20000, std), Draw(1))["loss"]
    assert loss.shape == (20000,)
    assert loss.dtype == torch.float64
    # Standard error without stratification, so an upper bound.
    assert abs(float(loss.mean()) - optimum) < 3 * float(loss.std()) / math.sqrt(20000)


@every_process
def test_no_denoiser_beats_the_exact_one(process):
    x0 = normal_data(4000, 0.5)
    best = DenoisingObjective()(exact(process, 0.5), x0, Draw(1))["loss"].mean()
    for wrong in (0.4, 0.6):
        assert DenoisingObjective()(exact(process, wrong), x0, Draw(1))["loss"].mean() > best


@every_process
def test_a_zero_network_has_loss_one_or_half_the_dimension(process):
    x0, model = torch.zeros(4000, 3, 2, 2), Denoiser(Zero(), process, Preconditioning())
    loss = DenoisingObjective()(model, x0, Draw(0))["loss"]
    assert loss.dtype == torch.float32
    assert float(loss.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 48000))
    half = DenoisingObjective(reduction="half_sum")(model, x0, Draw(0))["loss"]
    torch.testing.assert_close(half, loss * 12 / 2)


# Weights.


def weighted(weight, process, t, network=None, preconditioning=None):
    model = Denoiser(network or Answer(), process, preconditioning or Preconditioning("v", "sigma"))
    return DenoisingObjective(Fixed(t), weight)(model, normal_data(64, 0.5), Draw(2))["loss"]


FORMULAS = {
    # Each loss at a level, as a multiple of the noise error.
    NoiseWeight: lambda alpha, sigma, g: 1.0,
    DataWeight: lambda alpha, sigma, g: (sigma / alpha) ** 2,
    LikelihoodWeight: lambda alpha, sigma, g: g**2 / sigma**2,
    EDMWeight: lambda alpha, sigma, g: (
        ((sigma / alpha) ** 2 + 0.7**2) / (0.7 * sigma / alpha) ** 2 * (sigma / alpha) ** 2
    ),
    MinSNR: lambda alpha, sigma, g: min((alpha / sigma) ** 2, 5.0) * (sigma / alpha) ** 2,
    # velocity = f x - g^2 / 2 score, so its error is g^2 / (2 sigma) times that of the noise.
    VelocityWeight: lambda alpha, sigma, g: (g**2 / (2 * sigma)) ** 2,
    # v = alpha eps - sigma x_0 and err_x0 = -(sigma / alpha) err_noise.
    VWeight: lambda alpha, sigma, g: (alpha + sigma**2 / alpha) ** 2,
}


@every_process
@every_weight
@pytest.mark.parametrize("t", [0.01, 0.3, 0.6, 0.95])
def test_weights_are_multiples_of_the_noise_error(process, weight, t):
    alpha, sigma = (float(value) for value in process.level(t)[1:])
    factor = FORMULAS[type(weight)](alpha, sigma, float(process.diffusion(t)))
    expected = factor * weighted(NoiseWeight(), process, t)
    torch.testing.assert_close(weighted(weight, process, t), expected, rtol=1e-6, atol=0)


@every_process
@pytest.mark.parametrize("t", [0.0001, 0.2, 0.9, 1.0])
def test_edm_weight_is_the_plain_error_of_the_network(process, t):
    sigma_data, x0 = 0.5, normal_data(64, 0.5)
    level = process.level(t)
    draw = Draw(2)
    noise = draw.normal(x0.shape, torch.float64)
    x = process.perturb(x0, level, noise)
    c_in, c_skip, c_out = EDMPreconditioning(sigma_data).scales(level)
    target = (x0 - c_skip * x) / c_out
    plain = (Answer()(c_in * x, None) - target).square().mean(1)
    found = weighted(EDMWeight(sigma_data), process, t, preconditioning=EDMPreconditioning(sigma_data))
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", [Flow(), Cosine()], ids=["flow", "cosine"])
@pytest.mark.parametrize("weight", [NoiseWeight(), DataWeight(), EDMWeight(), MinSNR(), VelocityWeight(), VWeight()])
def test_weights_are_finite_where_no_data_is_left(process, weight):
    loss = weighted(weight, process, 1.0)
    assert loss.isfinite().all()


def test_velocity_weight_is_conditional_flow_matching():
    x0 = normal_data(64, 0.5)
    draw = Draw(2)
    noise = draw.normal(x0.shape, torch.float64)
    x = 0.7 * x0 + 0.3 * noise
    expected = (Answer()(x, None) - (noise - x0)).square().mean(1)
    found = weighted(VelocityWeight(), Flow(), 0.3, preconditioning=Preconditioning("velocity"))
    torch.testing.assert_close(found, expected)


def test_velocity_loss_keeps_its_digits_in_float32():
    # A perfect velocity network must have loss 0, also where x_0 or noise would have to be divided by t.
    class Straight(nn.Module):
        def forward(self, x, label, /):
            return x / 1e-5

    model = Denoiser(Straight(), Flow(), Preconditioning("velocity"))
    loss = DenoisingObjective(Fixed(1e-5), VelocityWeight())(model, torch.zeros(64, 4), Draw(0))["loss"]
    assert float(loss.max()) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "half_sum"])
def test_likelihood_weighting_of_ve_is_a_constant(reduction):
    process, t = VE(0.01, 50.0), torch.linspace(0.0, 1.0, 64).double()
    model = Denoiser(Answer(), process, Preconditioning())
    default = DenoisingObjective(Fixed(t), NoiseWeight(), reduction)(model, normal_data(64, 0.5), Draw(2))["loss"]
    likelihood = DenoisingObjective(Fixed(t), LikelihoodWeight(), reduction)(model, normal_data(64, 0.5), Draw(2))[
        "loss"
    ]
    torch.testing.assert_close(likelihood / default, torch.full_like(default, 2 * math.log(5000)))
    assert 2 * math.log(5000) == pytest.approx(17.03, abs=5e-3)


@pytest.mark.parametrize("process", [VP(), SubVP(), VE(), EDM()], ids=["VP", "sub-VP", "VE", "EDM"])
def test_log_uniform_levels_are_the_importance_law_of_likelihood_weighting(process):
    t_min, count = 1e-3, 40000
    low, high = float(process.level(t_min).ratio), float(process.level(1.0).ratio)
    span = 2 * math.log(high / low)
    # Exactly: the integral of g^2 / sigma^2 over t is the range of ln(sigma / alpha)^2.
    cells = torch.logspace(math.log10(t_min), 0, 100001, dtype=torch.float64)
    middle = 0.5 * (cells[1:] + cells[:-1])
    weights = LikelihoodWeight()(process.level(middle), process)
    assert float((weights * cells.diff()).sum()) == pytest.approx(span, rel=1e-6)
    # And in the losses of a denoiser that is wrong everywhere.
    model, x0 = exact(process, 0.8), normal_data(count, 0.5)
    uniform = DenoisingObjective(UniformTime(t_min=t_min), LikelihoodWeight())(model, x0, Draw(1))["loss"]
    important = DenoisingObjective(UniformLogSNR(low, None))(model, x0, Draw(2))["loss"]
    uniform, important = uniform * (1 - t_min), important * span
    error = float((uniform.var() / count + important.var() / count).sqrt())
    assert abs(float(uniform.mean() - important.mean())) < 3 * error
    if isinstance(process, VP | SubVP):
        assert important.var() < 0.2 * uniform.var()


# Laws of the times.


class Independent(Draw):
    """A draw whose numbers are given, to test laws by quadrature."""

    def __init__(self, u):
        super().__init__(0)
        self.u = u

    def uniform(self, shape, dtype=torch.float32):
        return self.u


def quantiles(times, process, count=9999):
    u = (torch.arange(count).double() + 0.5) / count
    return u, times(process, count, Independent(u))


@every_process
def test_uniform_times(process):
    u, t = quantiles(UniformTime(stratified=False), process)
    torch.testing.assert_close(t, process.t_min + (1 - process.t_min) * u)
    _, t = quantiles(UniformTime(stratified=False, t_min=0.25), process)
    torch.testing.assert_close(t, 0.25 + 0.75 * u)


@every_process
def test_log_normal_levels(process):
    u, t = quantiles(LogNormalRatio(-1.2, 1.2, stratified=False), process)
    found = torch.log(process.level(t).ratio)
    expected = torch.distributions.Normal(-1.2, 1.2).icdf(u)
    low, high = float(process.level(process.t_min).ratio), float(process.level(1.0).ratio)
    torch.testing.assert_close(found, expected.clamp(math.log(low), math.log(high)), rtol=0, atol=1e-6)
    assert (t >= process.t_min).all()


def test_log_normal_levels_of_the_flow_are_logit_normal_times():
    u, t = quantiles(LogNormalRatio(0.0, 1.0, stratified=False), Flow())
    torch.testing.assert_close(torch.logit(t), torch.distributions.Normal(0.0, 1.0).icdf(u), rtol=0, atol=1e-8)


@every_process
def test_log_uniform_levels(process):
    u, t = quantiles(UniformLogSNR(0.01, 50.0, stratified=False), process)
    found = torch.log(process.level(t).ratio)
    torch.testing.assert_close(found, math.log(0.01) + u * math.log(5000), rtol=0, atol=1e-6)
    if float(process.level(1.0).alpha) > 0:
        _, t = quantiles(UniformLogSNR(stratified=False), process)
        assert float(t.min()) == pytest.approx(process.t_min, abs=1e-3)
        assert float(t.max()) == pytest.approx(1.0, abs=1e-3)


LAWS = [UniformTime, LogNormalRatio, UniformLogSNR]


@pytest.mark.parametrize("law", LAWS)
def test_stratified_times_fill_every_cell_in_random_order(law):
    process, count = VE(), 64
    independent = law(stratified=False)
    edges = independent(process, count + 1, Independent(torch.arange(count + 1).double() / count))
    first = law()(process, count, Draw(1))
    assert first.dtype == torch.float64
    ordered = first.sort()
    assert (edges[:-1] - 1e-12 <= ordered.values).all()
    assert (ordered.values <= edges[1:] + 1e-12).all()
    # Random order: every place of the batch sees all times.
    draw = Draw(2)
    runs = torch.stack([law()(process, 8, draw) for _ in range(400)])
    cells = torch.stack([run.argsort().argsort() for run in runs])
    counts = torch.nn.functional.one_hot(cells, 8).sum(0).double()
    assert float(((counts - 50) ** 2 / 50).sum(1).max()) < 30  # chi squared, 7 degrees, p = 1e-4
    marginal = runs.flatten().sort().values
    expected = independent(process, 3200, Independent((torch.arange(3200).double() + 0.5) / 3200))
    assert float((torch.log(process.sigma(marginal)) - torch.log(process.sigma(expected))).abs().mean()) < 0.1


def test_stratified_times_make_the_loss_less_noisy():
    model, process = exact(VP(), 0.5), VP()
    x0 = torch.zeros(16, 4).double()
    variance = {}
    for stratified in (True, False):
        objective, draw = DenoisingObjective(UniformTime(stratified)), Draw(3)
        means = torch.stack([objective(model, x0, draw)["loss"].mean() for _ in range(400)])
        variance[stratified] = float(means.var())
    assert variance[True] < 0.6 * variance[False]
    assert process.t_min > 0


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("stratified", [True, False])
def test_exact_losses_do_not_depend_on_the_batch(law, stratified):
    objective, model = DenoisingObjective(law(stratified=stratified)), exact(VP(), 0.5)
    keys, x0 = torch.tensor([4, 9, 2, 2**40, 7]), normal_data(5, 0.5)
    whole = objective(model, x0, Draw(1, keys))["loss"]
    parts = [objective(model, x0[rows], Draw(1, keys[rows]))["loss"] for rows in ([3, 0], [1], [4, 2])]
    torch.testing.assert_close(torch.cat(parts), whole[[3, 0, 1, 4, 2]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("law", LAWS)
def test_exact_times_of_an_example_have_the_law(law):
    process = VE()
    t = torch.cat([law()(process, 2, Draw(seed, torch.tensor([3, 8]))) for seed in range(2000)]).reshape(2000, 2)
    expected = law(stratified=False)(process, 2000, Independent((torch.arange(2000).double() + 0.5) / 2000))
    for row in range(2):
        assert float((t[:, row].sort().values - expected).abs().mean()) < 0.01


# Discrete training.


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("chain", [DDPMChain(25), SMLDChain(25)], ids=["DDPM", "SMLD"])
def test_chain_times_are_its_indices_equally_often(chain, stratified):
    t = ChainTimes(stratified)(chain, 5000, Draw(1))
    index = chain.index(t)
    assert torch.equal(chain.time(index.long()), t)
    counts = torch.bincount(index.long(), minlength=25).double()
    # Strata of a fifth of a cell; chi squared with 24 degrees, p = 1e-4.
    assert float((counts - 200).abs().max()) <= 1 if stratified else float(((counts - 200) ** 2 / 200).sum()) < 61


def test_the_last_index_is_the_largest():
    u = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53]).double()
    assert ChainTimes(stratified=False)(DDPMChain(30), 3, Independent(u)).tolist() == [1 / 30, 16 / 30, 1.0]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 2, [0, 1, 2]),
        (0, -2, [*range(14)]),
        (-1, None, [14]),
        (-3, -2, [12, 13]),
        (3, 3, [3]),
        (0, None, [*range(15)]),
    ],
)
@pytest.mark.parametrize("stratified", [True, False])
def test_a_range_of_indices_equally_often(first, last, expected, stratified):
    chain, count = ResidualShift(), 200 * len(expected)
    index = chain.index(ChainTimes(stratified, first=first, last=last)(chain, count, Draw(1))).long()
    counts = torch.bincount(index, minlength=15).double()
    assert counts.nonzero().flatten().tolist() == expected
    inside = counts[expected]
    assert float((inside - 200).abs().max()) == 0 if stratified else float(((inside - 200) ** 2 / 200).sum()) < 45
    ends = torch.tensor([0.0, 1.0 - 2.0**-53]).double()
    times = ChainTimes(False, first, last)(chain, 2, Independent(ends))
    assert chain.index(times).tolist() == [expected[0], expected[-1]]


# ResShift's losses (tad_sr.md 2.2).


def test_posterior_weight_is_that_of_resshift():
    # 0.5 / var (alpha_t / eta_t)^2 with var = kappa^2 eta_{t-1} alpha_t / eta_t, at the first index that of the second.
    process = ResidualShift(steps=4, min_noise=0.2)
    eta = process.table**2
    alpha = eta.diff(prepend=torch.zeros(1).double())
    variance = 4.0 * (eta.roll(1) * alpha / eta)[[1, 1, 2, 3]]
    level = process.level(process.time(torch.arange(4)))
    found = PosteriorWeight()(level, process)
    torch.testing.assert_close(found, 0.5 / variance * (alpha / eta) ** 2, rtol=1e-9, atol=0)
    assert found.dtype == torch.float64
    assert float(PosteriorWeight()(process.level(0.5), process)) == pytest.approx(float(found[1]))
    # Said of the noise, as their networks for epsilon do: 0.5 / var (kappa alpha_t / ((1 - eta_t) sqrt(eta_t)))^2.
    expected = 0.5 / variance * (2.0 * alpha / ((1 - eta) * eta.sqrt())) ** 2
    torch.testing.assert_close(found * level.ratio**2, expected, rtol=1e-9, atol=0)


def test_posterior_weight_is_the_bound_of_ho_et_al():
    # Eq. 12 of Ho et al. 2020 for the noise error, beta^2 / (2 v (1 - beta) (1 - abar)), v their posterior variance.
    process = DDPMChain(50)
    betas = process.betas
    kept = (1 - betas).cumprod(0)
    variance = betas * (1 - kept.roll(1)) / (1 - kept)
    variance[0] = variance[1]
    expected = betas**2 / (2 * variance * (1 - betas) * (1 - kept))
    level = process.level(process.time(torch.arange(50)))
    torch.testing.assert_close(PosteriorWeight()(level, process) * level.ratio**2, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("process", [ResidualShift(), DDPMChain(50), SMLDChain(50)], ids=["ResShift", "DDPM", "SMLD"])
def test_posterior_weight_is_the_divergence_of_posteriors(process):
    # KL of two Gaussians of one variance: the squared distance of their means over twice the variance.
    level, before = (
        process.level(process.time(torch.tensor(index))) for index in (20 % process.steps, 19 % process.steps)
    )
    x = normal_data(1, 1.0)
    (first, std), (second, _) = (process.posterior(x0, x, level, before) for x0 in (torch.zeros_like(x), x + 0.5))
    divergence = (first - second).square() / (2 * std**2)
    torch.testing.assert_close(PosteriorWeight()(level, process) * (x + 0.5) ** 2, divergence, rtol=1e-7, atol=0)


def test_data_weight_is_the_plain_error_of_an_image():
    process, x0, origin = ResidualShift(), normal_data(64, 0.5), normal_data(64, 1.0, seed=6)
    expected = None
    for output, sign in (("xstart", 1.0), ("residual", -1.0)):
        # Networks of x_0 and of y - x_0 with the same error: the same loss.
        target = x0 + origin if output == "xstart" else -x0
        answer = Constant(target + sign * 0.3 * origin)
        model = ResidualDenoiser(answer, process, ResShiftPreconditioning(output))  # type: ignore[arg-type]
        loss = DenoisingObjective(ChainTimes(), DataWeight())(model, x0, Draw(2), origin=origin)["loss"]
        torch.testing.assert_close(loss, (0.3 * origin).square().mean(1))
        torch.testing.assert_close(loss, loss if expected is None else expected)
        expected = loss


class Constant(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, label, /):
        return self.answer


class Labelled(nn.Module):
    """Depends on its label, and keeps it."""

    def forward(self, x, label, /):
        self.label = label
        return torch.sin(3 * x) + 0.01 * label[:, None]


def test_ddpm_loss_is_its_formula():
    # score_sde.md 2.3: mean of (network(sqrt(abar_i) x_0 + sqrt(1 - abar_i) z, i) - z)^2.
    chain, network, x0, draw = DDPMChain(40), Labelled(), normal_data(64, 0.5), Draw(2)
    found = DenoisingObjective(ChainTimes())(Denoiser(network, chain, Preconditioning("noise", "index")), x0, draw)
    index = network.label.long()
    assert torch.equal(index.double(), network.label)
    kept = (1 - torch.linspace(0.1 / 40, 20 / 40, 40, dtype=torch.float64)).cumprod(0)[index][:, None]
    repeat = Draw(2)
    ChainTimes()(chain, 64, repeat)
    noise = repeat.normal(x0.shape, torch.float64)
    error = network(kept.sqrt() * x0 + (1 - kept).sqrt() * noise, network.label) - noise
    torch.testing.assert_close(found["loss"], error.square().mean(1))


def test_smld_loss_is_its_formula():
    # score_sde.md 2.3: half the sum of (s(x_0 + sigma_i z, i) + z / sigma_i)^2 sigma_i^2, s = network / sigma_i.
    chain, network, x0 = SMLDChain(40, 0.01, 50.0), Labelled(), normal_data(64, 0.5)
    objective = DenoisingObjective(ChainTimes(), reduction="half_sum")
    found = objective(Denoiser(network, chain, Preconditioning("scaled_score", "index")), x0, Draw(2))
    label = network.label.long()
    sigma = torch.logspace(math.log10(50), -2, 40, dtype=torch.float64)[label][:, None]  # label 0 is the largest
    repeat = Draw(2)
    ChainTimes()(chain, 64, repeat)
    noise = repeat.normal(x0.shape, torch.float64)
    error = network(x0 + sigma * noise, network.label) / sigma + noise / sigma
    torch.testing.assert_close(found["loss"], 0.5 * (error.square() * sigma**2).sum(1))


@pytest.mark.parametrize("chain", [DDPMChain(), SMLDChain()], ids=["DDPM", "SMLD"])
def test_optimal_discrete_loss(chain):
    level = chain.level(chain.time(torch.arange(1000)))
    signal = (0.5 * level.alpha) ** 2
    optimum = float((signal / (signal + level.sigma**2)).mean())
    loss = DenoisingObjective(ChainTimes())(exact(chain, 0.5), normal_data(20000, 0.5), Draw(1))["loss"]
    assert abs(float(loss.mean()) - optimum) < 3 * float(loss.std()) / math.sqrt(20000)


# The objective as a whole.


def test_gradients_reach_the_network_and_conditions_its_forward():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x, noise, /, label):
            assert noise.shape == (6,)
            return x * self.scale[label][:, None]

    for weight in WEIGHTS:
        network = Conditional()
        objective = DenoisingObjective(weight=weight)
        x0 = normal_data(6, 0.5).float()
        loss = objective(Denoiser(network, VE(), Preconditioning("v")), x0, Draw(0), label=torch.tensor([0, 1, 1] * 2))
        assert set(loss) == {"loss"}
        loss["loss"].mean().backward()
        gradient = network.scale.grad
        assert gradient is not None
        assert gradient.ne(0).tolist() == [True, True, False]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_half_precision_is_averaged_in_float32(dtype, expected):
    model = Denoiser(Zero(), VP(), Preconditioning())
    loss = DenoisingObjective()(model, torch.zeros(256, 8, dtype=dtype), Draw(0))["loss"]
    assert loss.dtype == expected
    assert float(loss.mean()) == pytest.approx(1.0, abs=0.15)


@every_weight
@pytest.mark.parametrize("times", [UniformTime(), LogNormalRatio()], ids=lambda times: type(times).__name__)
@pytest.mark.parametrize("exact_draw", [True, False])
def test_no_value_is_waited_for(weight, times, exact_draw):
    # Fake tensors raise where Python asks for a value, which on an accelerator is a wait.
    with FakeTensorMode():
        draw = Draw(0, torch.arange(4) if exact_draw else None)
        model = Denoiser(Answer(), Cosine(), EDMPreconditioning())
        assert DenoisingObjective(times, weight)(model, torch.zeros(4, 3), draw)["loss"].shape == (4,)


def test_training_finds_the_optimum():
    # One parameter, noise = w x / sigma-free label: for data of std 0 at one level, w = 1 / sigma is perfect.
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x, label, /):
            return self.w * x

    network, level = Line(), VP().level(0.4)
    objective = DenoisingObjective(Fixed(0.4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for step in range(60):
        x0 = normal_data(256, 0.5, seed=step).float()
        optimizer.zero_grad()
        objective(Denoiser(network, VP(), Preconditioning()), x0, Draw(step))["loss"].mean().backward()
        optimizer.step()
    # E[eps | x] = sigma x / (alpha^2 s^2 + sigma^2)
    best = float(level.sigma / ((0.5 * level.alpha) ** 2 + level.sigma**2))
    assert float(network.w.detach()) == pytest.approx(best, abs=0.05)


def test_bases_must_be_filled_in():
    with pytest.raises(NotImplementedError):
        Times()(VP(), 1, Draw(0))
    with pytest.raises(NotImplementedError):
        Weight()(VP().level(0.5), VP())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformTime(t_min=1.0), "t_min must lie in"),
        (lambda: UniformTime(t_min=-0.1), "t_min must lie in"),
        (lambda: LogNormalRatio(std=0.0), "std of ln"),
        (lambda: EDMWeight(0.0), "sigma_data must be positive"),
        (lambda: MinSNR(0.0), "gamma must be positive"),
        (lambda: DenoisingObjective(reduction="sum"), "mean or half_sum"),  # type: ignore[arg-type]
        (lambda: ChainTimes()(SubVP(), 2, Draw(0)), "SubVP is none: .* sub-VP has no discrete form"),
        (lambda: ChainTimes(last=4)(ResidualShift(4), 2, Draw(0)), "last=4 does not fit a chain of 4 steps, .* 0 to 3"),
        (lambda: ChainTimes(first=-5)(ResidualShift(4), 2, Draw(0)), "first=-5 .* -4 to -1, from the end"),
        (lambda: ChainTimes(first=3, last=-2)(ResidualShift(4), 2, Draw(0)), "from first=3 to last=-2 does not fit"),
        (lambda: PosteriorWeight()(VP().level(0.5), VP()), "PosteriorWeight needs a discrete chain, and VP is none"),
        (lambda: UniformLogSNR()(Flow(), 2, Draw(0)), "Flow has -inf to inf"),
        (lambda: UniformLogSNR()(Cosine(), 2, Draw(0)), "must be finite levels"),
        (lambda: UniformLogSNR(2.0, 1.0)(VP(), 2, Draw(0)), "one below the other"),
        (lambda: UniformLogSNR(0.001)(VE(), 2, Draw(0)), "VE has -3.912 to 4.605"),
        (lambda: UniformLogSNR(0.1, 200.0)(VE(), 2, Draw(0)), "levels sigma / alpha of the process"),
        (lambda: UniformLogSNR(-1.0)(VE(), 2, Draw(0)), "levels sigma / alpha of the process"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
