import math

import pytest
import torch
from torch import nn

from lightning_sgm.denoiser import (
    BaseDenoiser,
    Denoiser,
    EDMPreconditioning,
    GaussianMixtureDenoiser,
    Preconditioning,
    Prediction,
    TokenDenoiser,
)
from lightning_sgm.processes.absorbing import AbsorbingProcess
from lightning_sgm.processes.chains import DDPMChain, SMLDChain
from lightning_sgm.processes.gaussian import EDM, VE, VP, Cosine, Flow, SubVP
from lightning_sgm.random import Draw

PROCESSES = {"VP": VP(), "sub-VP": SubVP(), "VE": VE(), "EDM": EDM(), "cosine": Cosine(), "flow": Flow()}
QUANTITIES = ("x0", "noise", "score", "velocity")
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
MEANS = torch.tensor([[0.8, -0.3, 0.1], [-0.6, 0.5, 0.0]]).double()
FACTORS = torch.tensor([[[0.3, 0.1, 0], [0, 0.2, 0.1], [0.05, 0, 0.4]], [[0.2, 0, 0], [0.1, 0.3, 0], [0, 0.1, 0.1]]])
COVARIANCES = FACTORS.double() @ FACTORS.double().mT
WEIGHTS = torch.tensor([1.0, 3.0]).double()


def mixture(process):
    return GaussianMixtureDenoiser(process, MEANS, COVARIANCES, WEIGHTS)


def noisy(process, t, rows=6):
    level = process.level(t)
    draw = Draw(3)
    x0 = MEANS[draw.integers(2, (rows,))] + 0.3 * draw.normal((rows, 3), torch.float64)
    return process.perturb(x0, level, draw.normal((rows, 3), torch.float64))


def v(exact, x, t):
    level = exact.process.level(t)
    alpha, sigma = (value.reshape(-1, 1) for value in (level.alpha, level.sigma))
    return alpha * exact.noise(x, t) - sigma * exact.x0(x, t)


def scaled_score(exact, x, t):
    return exact.process.level(t).sigma.reshape(-1, 1) * exact.score(x, t)


class Perfect(nn.Module):
    """Answers what the exact denoiser does, from what the preconditioning shows it."""

    def __init__(self, exact, preconditioning, t):
        super().__init__()
        self.exact, self.t = exact, t
        self.kind = preconditioning.prediction
        self.c_in, self.c_skip, self.c_out = preconditioning.scales(exact.process.level(t))

    def forward(self, x, label, /):
        self.shown, self.label = x, label
        x = x.double() / self.c_in.reshape(-1, 1)
        own = {"v": v, "scaled_score": scaled_score}
        target = (
            own[self.kind](self.exact, x, self.t) if self.kind in own else getattr(self.exact, self.kind)(x, self.t)
        )
        return (target - self.c_skip.reshape(-1, 1) * x) / self.c_out.reshape(-1, 1)


def denoiser(process, preconditioning, t):
    return Denoiser(Perfect(mixture(process), preconditioning, t), process, preconditioning)


# The exact denoiser.


@every_process
@pytest.mark.parametrize("t", [1e-3, 0.3, 0.9, 1.0])
def test_score_of_the_mixture_is_the_gradient_of_its_log_density(process, t):
    exact = mixture(process)
    x = noisy(process, t).requires_grad_()
    (gradient,) = torch.autograd.grad(exact.log_density(x, t).sum(), x)
    torch.testing.assert_close(exact.score(x, t), gradient, rtol=1e-7, atol=1e-9)


@every_process
def test_log_density_of_the_mixture(process):
    exact, t = mixture(process), torch.tensor([0.1, 0.8]).double()
    x = noisy(process, 0.5, rows=2)
    for row in range(2):
        alpha, sigma = (float(value[row]) for value in process.level(t)[1:])
        cover = alpha**2 * COVARIANCES + sigma**2 * torch.eye(3)
        parts = torch.distributions.MultivariateNormal(alpha * MEANS, cover)
        law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(WEIGHTS), parts)
        torch.testing.assert_close(exact.log_density(x, t)[row], law.log_prob(x[row]))


def test_posterior_mean_by_quadrature():
    process, means, variances = VP(), torch.tensor([[1.0], [-0.5]]).double(), torch.tensor([0.1, 0.4]).double()
    exact = GaussianMixtureDenoiser(process, means, variances.reshape(2, 1, 1))
    level = process.level(0.3)
    x0 = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    prior = torch.exp(-0.5 * (x0 - means) ** 2 / variances[:, None]) / variances[:, None].sqrt()
    for x in (-1.0, 0.2, 2.5):
        posterior = prior.sum(0) * torch.exp(-0.5 * ((x - level.alpha * x0) / level.sigma) ** 2)
        expected = (posterior * x0).sum() / posterior.sum()
        torch.testing.assert_close(exact.x0(torch.tensor([[x]]).double(), 0.3)[0, 0], expected, rtol=1e-8, atol=0)


def test_mixture_takes_images_and_points_without_spread():
    exact = GaussianMixtureDenoiser(VE(), torch.zeros(1, 12), torch.zeros(1, 12, 12))
    x = Draw(0).normal((5, 3, 2, 2))
    assert exact.x0(x, 0.5).shape == x.shape
    torch.testing.assert_close(exact.x0(x, 0.5), torch.zeros_like(x))
    torch.testing.assert_close(exact.noise(x, 0.5), x / float(VE().level(0.5).sigma))


# Networks.

KINDS: tuple[Prediction, ...] = ("noise", "x0", "score", "v", "velocity", "scaled_score")
PRECONDITIONINGS = [*(Preconditioning(kind) for kind in KINDS[:5]), EDMPreconditioning(), EDMPreconditioning(1.7)]
PRECONDITIONINGS += [Preconditioning("scaled_score", "log_half_sigma")]
every_preconditioning = pytest.mark.parametrize(
    "preconditioning", PRECONDITIONINGS, ids=[*KINDS[:5], "EDM", "EDM 1.7", "scaled score"]
)


@every_process
@every_preconditioning
def test_every_prediction_gives_every_quantity(process, preconditioning):
    t = torch.cat([torch.logspace(-4, -1, 20), torch.linspace(0.11, 0.999, 20)]).double()
    exact, x = mixture(process), noisy(process, t, rows=40)
    model = denoiser(process, preconditioning, t)
    for quantity in QUANTITIES:
        truth = getattr(exact, quantity)(x, t)
        found = getattr(model, quantity)(x, t)
        size = truth.abs().amax(1, keepdim=True)
        torch.testing.assert_close(found / size, truth / size, rtol=0, atol=1e-7)


@every_process
@every_preconditioning
def test_a_time_per_row_equals_row_by_row(process, preconditioning):
    t = torch.tensor([0.01, 0.2, 0.5, 0.7, 0.9, 0.999]).double()
    x = noisy(process, t)
    for quantity in QUANTITIES:
        together = getattr(denoiser(process, preconditioning, t), quantity)(x, t)
        for row in range(6):
            for time in (t[row], float(t[row]), t[row : row + 1]):
                alone = getattr(denoiser(process, preconditioning, time), quantity)(x[row : row + 1], time)
                torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-9)


@every_process
@pytest.mark.parametrize("kind", ["noise", "velocity", "v"])
@pytest.mark.parametrize("t", [1e-5, 1e-3, 0.5])
def test_velocity_keeps_its_digits_in_float32(process, kind, t):
    # Through x_0, float32 loses up to 6 % of the velocity at t = 1e-5.
    x = noisy(process, t).float()
    truth = mixture(process).velocity(x.double(), t)
    found = denoiser(process, Preconditioning(kind), t).velocity(x, t)
    tolerance = 1e-6 if kind != "v" or t > 1e-4 else 0.1
    assert found.dtype == torch.float32
    assert float((found - truth).norm() / truth.norm()) < tolerance


@every_process
@every_preconditioning
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_and_shapes_are_kept(process, preconditioning, dtype):
    class Zero(nn.Module):
        def forward(self, x, label, /):
            assert x.dtype == dtype
            # bfloat16 could not tell 999 t from its neighbours.
            assert label.dtype == torch.promote_types(dtype, torch.float32)
            assert label.shape == (2,)
            return torch.zeros_like(x, dtype=torch.bfloat16)

    x = torch.ones(2, 3, 4, dtype=dtype)
    for quantity in QUANTITIES:
        for t in (0.4, torch.tensor(0.4), torch.tensor([0.4, 0.6]).double()):
            answer = getattr(Denoiser(Zero(), process, preconditioning), quantity)(x, t)
            assert answer.dtype == dtype
            assert answer.shape == x.shape
            assert answer.isfinite().all()


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=["cosine", "flow"])
@pytest.mark.parametrize("preconditioning", [*PRECONDITIONINGS[3:6], PRECONDITIONINGS[1]])
def test_at_alpha_zero(process, preconditioning):
    exact, x = mixture(process), noisy(process, 1.0)
    model = denoiser(process, preconditioning, 1.0)
    mean = (WEIGHTS / WEIGHTS.sum()) @ MEANS
    torch.testing.assert_close(model.x0(x, 1.0), mean.expand(6, 3))
    for quantity in QUANTITIES:
        torch.testing.assert_close(getattr(model, quantity)(x, 1.0), getattr(exact, quantity)(x, 1.0))


def test_noise_prediction_at_alpha_zero_knows_the_noise_but_not_x0():
    model, x = denoiser(Flow(), Preconditioning("noise"), 1.0), noisy(Flow(), 1.0)
    torch.testing.assert_close(model.noise(x, 1.0), x)
    torch.testing.assert_close(model.score(x, 1.0), -x)
    assert not model.x0(x, 1.0).isfinite().any()


@pytest.mark.parametrize("process", [VP(), SubVP(), VE(), EDM()], ids=["VP", "sub-VP", "VE", "EDM"])
def test_velocity_is_that_of_the_probability_flow_ode(process):
    t = torch.linspace(1e-3, 0.999, 50).double()
    x = noisy(process, t, rows=50)
    for model in (mixture(process), denoiser(process, Preconditioning("noise"), t)):
        pull = 0.5 * process.diffusion(t)[:, None] ** 2 * model.score(x, t)
        expected = process.drift(t)[:, None] * x - pull
        torch.testing.assert_close(model.velocity(x, t), expected, rtol=1e-6, atol=1e-6)


def test_base_quantities_follow_from_x0_alone():
    class Shrink(BaseDenoiser):
        def x0(self, x, t, **conditions):
            return 0.5 * x

    process, x, t = VP(), Draw(0).normal((2, 3), torch.float64), 0.4
    level = process.level(t)
    noise = (x - level.alpha * 0.5 * x) / level.sigma
    torch.testing.assert_close(Shrink(process).noise(x, t), noise)
    torch.testing.assert_close(Shrink(process).score(x, t), -noise / level.sigma)
    d_alpha, d_sigma = process.derivatives(t)
    torch.testing.assert_close(Shrink(process).velocity(x, t), d_alpha * 0.5 * x + d_sigma * noise)


# What the network sees.


@every_process
@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 3.0])
def test_edm_shows_and_asks_unit_variance(process, sigma_data):
    level = process.level(torch.linspace(1e-3, 1.0, 50).double())
    one = torch.ones(50).double()
    c_in, c_skip, c_out = EDMPreconditioning(sigma_data).scales(level)
    total = level.sigma**2 + (level.alpha * sigma_data) ** 2
    torch.testing.assert_close(c_in**2 * total, one)
    # target = (x_0 - c_skip x) / c_out with x = alpha x_0 + sigma eps
    variance = ((1 - c_skip * level.alpha) * sigma_data) ** 2 + (c_skip * level.sigma) ** 2
    torch.testing.assert_close(variance / c_out**2, one)
    # and c_skip is the one that makes the target smallest: it is uncorrelated with the input.
    covariance = (1 - c_skip * level.alpha) * sigma_data**2 * level.alpha - c_skip * level.sigma**2
    torch.testing.assert_close(covariance / total, 0 * one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_edm_scales_are_those_of_karras(sigma):
    level = EDM().level(EDM().t_from_ratio(sigma))
    c_in, c_skip, c_out = (float(value) for value in EDMPreconditioning(0.5).scales(level))
    assert c_skip == pytest.approx(0.25 / (sigma**2 + 0.25), rel=1e-6)
    assert c_out == pytest.approx(sigma * 0.5 / math.sqrt(sigma**2 + 0.25), rel=1e-6)
    assert c_in == pytest.approx(1 / math.sqrt(sigma**2 + 0.25), rel=1e-6)
    assert float(EDMPreconditioning().label(level, EDM())) == pytest.approx(math.log(sigma) / 4, abs=1e-6)


def test_labels():
    t = torch.tensor([0.1, 0.6]).double()
    level = VP().level(t)
    shown = {}
    for kind in ("time", "log_ratio", "sigma", "log_half_sigma"):
        model = denoiser(VP(), Preconditioning("noise", kind), t)
        model.x0(noisy(VP(), t, rows=2), t)
        shown[kind] = model.network.label
    torch.testing.assert_close(shown["time"], 999 * t)
    torch.testing.assert_close(shown["log_ratio"], torch.log(level.sigma / level.alpha) / 4)
    torch.testing.assert_close(shown["sigma"], level.sigma)
    torch.testing.assert_close(shown["log_half_sigma"], torch.log(level.sigma / 2))
    assert Preconditioning("v", "log_ratio").label(Flow().level(1.0), Flow()).isfinite()


@pytest.mark.parametrize("chain", [DDPMChain(100), SMLDChain(100)], ids=["DDPM", "SMLD"])
def test_index_is_what_the_chains_networks_are_told(chain):
    index = torch.tensor([0, 41, 99])
    t = chain.time(index)
    model = denoiser(chain, Preconditioning("scaled_score", "index"), t)
    model.x0(noisy(chain, t, rows=3), t)
    # 0 is the least noise of DDPM and the most of SMLD.
    assert model.network.label.tolist() == [[0, 41, 99], [99, 58, 0]][isinstance(chain, SMLDChain)]


def test_the_released_ncsnpp_is_half_their_score():
    """Their network sees x in [-1, 1] and ln sigma of [0, 1]; output / sigma is their score (score_sde.md 2.3)."""

    class Theirs(nn.Module):
        def forward(self, x, log_sigma, /):
            return torch.sin(x) * log_sigma[:, None]

    ours = Denoiser(Theirs(), VE(0.02, 100.0), Preconditioning("scaled_score", "log_half_sigma"))
    t = torch.tensor([0.1, 0.6, 0.9]).double()
    sigma = 0.01 * (50.0 / 0.01) ** t[:, None]
    x = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = Theirs()(2 * x - 1, sigma[:, 0].log()) / sigma
    torch.testing.assert_close(ours.score(2 * x - 1, t), theirs / 2, rtol=1e-6, atol=0)
    # Tweedie in their units and in ours is the same image.
    torch.testing.assert_close(ours.x0(2 * x - 1, t), 2 * (x + sigma**2 * theirs) - 1, rtol=1e-6, atol=1e-6)


def test_input_is_scaled_before_the_network():
    x = noisy(VE(), 0.9)
    model = denoiser(VE(), EDMPreconditioning(), 0.9)
    model.x0(x, 0.9)
    torch.testing.assert_close(model.network.shown, x * EDMPreconditioning().scales(VE().level(0.9))[0])


def test_conditions_reach_the_network_and_gradients_the_input():
    class Shift(nn.Module):
        def forward(self, x, noise, /, label, scale):
            return x * scale[:, None] + label[:, None]

    model = Denoiser(Shift(), VP(), Preconditioning("x0"))
    x = torch.ones(2, 3, requires_grad=True)
    conditions = {"label": torch.tensor([1, 2]), "scale": torch.tensor([1.0, 0.5])}
    for quantity in QUANTITIES:
        answer = getattr(model, quantity)(x, 0.5, **conditions)
        assert torch.autograd.grad(answer.sum(), x)[0].abs().min() > 0
    torch.testing.assert_close(model.x0(x, 0.5, **conditions), torch.tensor([[2.0] * 3, [2.5] * 3]))


def test_works_in_inference_mode():
    for preconditioning in PRECONDITIONINGS:
        with torch.inference_mode():
            x = noisy(VP(), 0.5)
            assert denoiser(VP(), preconditioning, 0.5).velocity(x, 0.5).isfinite().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="prediction must be one of noise, x0, score, scaled_score, v, velocity"):
        Preconditioning("epsilon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label one of time, log_ratio, sigma, log_half_sigma, index"):
        Preconditioning("noise", "step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the label index needs a discrete chain, and VP is none"):
        Denoiser(nn.Identity(), VP(), Preconditioning("noise", "index"))
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        EDMPreconditioning(0.0)


# Tokens.


def test_token_denoiser():
    class Table(nn.Module):
        def forward(self, x, positions=None, shift=torch.tensor(0.0)):
            logits = torch.arange(4.0).expand(*x.shape, 4) * (x[..., None] + 1) + shift
            return (logits if positions is None else logits.flatten(0, 1)[positions]).half()

    model = TokenDenoiser(Table(), AbsorbingProcess(), 4)
    assert model.mask_id == 4
    x = torch.tensor([[0, 4, 2], [4, 4, 1]])
    log_probs = model.log_probs(x)
    assert log_probs.dtype == torch.float32
    assert log_probs.shape == (2, 3, 4)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3))
    positions = torch.tensor([1, 3, 4])
    assert torch.equal(model.log_probs(x, positions), log_probs.flatten(0, 1)[positions])
    assert torch.equal(model.logits(x, shift=torch.tensor(1.0)), model.logits(x) + 1)
