import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lightning_sgm.denoiser import BaseDenoiser, Denoiser, EDMPreconditioning, GaussianMixtureDenoiser, Preconditioning
from lightning_sgm.guidance.classes import ClassifierFree, ClassifierGuidance
from lightning_sgm.likelihood import Likelihood
from lightning_sgm.networks.mlp import MLP
from lightning_sgm.processes.chains import DDPMChain
from lightning_sgm.processes.gaussian import VP, Cosine, Flow, SubVP, as_time
from lightning_sgm.random import Draw
from lightning_sgm.samplers.integrators import size
from lightning_sgm.samplers.ode import ODESampler
from tests.samplers.exact import MEAN, PROCESSES, SDES, STD, Mixture, gaussian, ode_map

BITS = 1 / math.log(2)
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def keyed(count, seed=0):
    return Draw(seed, torch.arange(count))


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_gaussian(x, process, data=(0.0, 0.0), t_min=None):
    """What the estimator is worth for data N(MEAN, STD^2): its prior, for data of mean and std ``data``, included."""
    clean, noisy = process.level(process.t_min if t_min is None else t_min), process.level(1.0)
    x = x.flatten(1).double()
    latent = ode_map(x, clean, noisy)
    stretch = (noisy.alpha**2 * STD**2 + noisy.sigma**2) / (clean.alpha**2 * STD**2 + clean.sigma**2)
    scale = torch.sqrt(noisy.sigma**2 + (noisy.alpha * data[1]) ** 2)
    prior = torch.distributions.Normal(noisy.alpha * data[0], scale)
    return (prior.log_prob(latent) + 0.5 * torch.log(stretch)).sum(1)


def true_density(x):
    return torch.distributions.Normal(MEAN, STD).log_prob(x.flatten(1).double()).sum(1)


# Closed forms.


@every_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_per_dim_of_gaussians(process, dtype):
    """One Rademacher probe is exact here, the Jacobian being diagonal."""
    x = MEAN + STD * normal(32, 3, 4, 4, dtype=dtype)
    for likelihood, bound in ((Likelihood(), 5e-5), (Likelihood(rtol=1e-6, atol=1e-6), 1e-5)):
        found = likelihood(gaussian(process, 48, dtype=dtype), x, keyed(32))
        assert found.dtype == torch.float64
        assert found.shape == (32,)
        error = (found - of_gaussian(x, process)) / 48 * BITS
        assert float(error.abs().max()) < bound
    paper = Likelihood(rtol=1e-5, atol=1e-5)(gaussian(process, 48, dtype=dtype), x, keyed(32))
    assert abs(float((paper - of_gaussian(x, process)).mean())) / 48 * BITS < 5e-5


def test_the_bias_of_the_prior_beside_it():
    """The specification's 9e-4 and 2.8e-3 bits/dim at worst; the data's moments remove the prior's part."""
    x = MEAN + STD * normal(32, 48, dtype=torch.float32)
    for name, process in SDES.items():
        denoiser = gaussian(process, 48, dtype=torch.float32)
        plain = Likelihood(rtol=1e-6, atol=1e-6)(denoiser, x, keyed(32))
        bias = (true_density(x) - plain).abs().max() / 48 * BITS
        assert float(bias) == pytest.approx({"VP": 9.9e-4, "sub-VP": 9.9e-4, "VE": 2.8e-3}[name], rel=0.05)
        informed = Likelihood(rtol=1e-6, atol=1e-6, data_mean=MEAN, data_std=STD)
        found = informed(denoiser, x, keyed(32))
        torch.testing.assert_close(found, of_gaussian(x, process, (MEAN, STD)), rtol=0, atol=48 * 1e-5)
        # What is left is the noise at t_min.
        there = process.level(process.t_min)
        law = torch.distributions.Normal(MEAN, torch.sqrt(STD**2 + there.ratio**2))
        left = law.log_prob(x.double() / there.alpha).sum(1) - 48 * torch.log(there.alpha)
        torch.testing.assert_close(found, left, rtol=0, atol=48 * 1e-5)


@every_process
def test_the_mean_bias_of_the_prior(process):
    """Against Gauss-Hermite quadrature of the data's law at t_min, from which the ODE starts."""
    level, likelihood = process.level(process.t_min), Likelihood(data_mean=0.1, data_std=0.2)
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    std = torch.sqrt((level.alpha * STD) ** 2 + level.sigma**2)
    x = (level.alpha * MEAN + std * points)[:, None]
    law = torch.distributions.Normal(level.alpha * MEAN, std)
    gap = law.log_prob(x[:, 0]) - of_gaussian(x, process, (0.1, 0.2))
    bias = likelihood.prior_bias(process, MEAN, STD)
    assert bias == pytest.approx(float((weights * gap).sum() / weights.sum()), abs=1e-9)
    assert bias > 0 or process.level(1.0).alpha == 0
    assert likelihood.prior_bias(process, 0.1, 0.2) == pytest.approx(0.0, abs=1e-15)


def test_a_discrete_chain_and_another_t_min():
    x = MEAN + STD * normal(8, 5)
    for process, t_min in ((DDPMChain(), None), (VP(), 1e-3), (SubVP(), 0.1)):
        found = Likelihood(rtol=1e-6, atol=1e-6, t_min=t_min)(gaussian(process, 5), x, keyed(8))
        torch.testing.assert_close(found, of_gaussian(x, process, t_min=t_min), rtol=0, atol=5e-5)


@pytest.mark.parametrize("solver", ["dopri8", "bosh3", "scipy_RK45"])
def test_every_solver(solver):
    x = MEAN + STD * normal(4, 3)
    found = Likelihood(solver=solver)(gaussian(VP(), 3), x, keyed(4))
    torch.testing.assert_close(found, of_gaussian(x, VP()), rtol=0, atol=3 * 1e-4)


# The trace.


class Correlated(NamedTuple):
    """A Gaussian in 12 dimensions whose neighbours hang together."""

    process: VP = VP()
    covariance: torch.Tensor = 0.25 * 0.8 ** (torch.arange(12)[:, None] - torch.arange(12)).abs().double()

    def denoiser(self):
        return GaussianMixtureDenoiser(self.process, torch.full((1, 12), MEAN).double(), self.covariance[None])

    def moved(self):
        """M (12, 12) with ln of the volume tr(M), and the matrix that takes x - mean to its latent."""
        basis, values = self._eigen()
        clean, noisy = self.process.level(self.process.t_min), self.process.level(1.0)
        growth = (noisy.alpha**2 * values + noisy.sigma**2) / (clean.alpha**2 * values + clean.sigma**2)
        return basis @ torch.diag(0.5 * torch.log(growth)) @ basis.T, basis @ torch.diag(growth.sqrt()) @ basis.T

    def _eigen(self):
        values, basis = torch.linalg.eigh(self.covariance)
        return basis, values

    def log_density(self, x):
        clean, noisy = self.process.level(self.process.t_min), self.process.level(1.0)
        volume, way = self.moved()
        latent = noisy.alpha * MEAN + (x - clean.alpha * MEAN) @ way
        return torch.distributions.Normal(0.0, noisy.sigma).log_prob(latent).sum(1) + volume.trace()


def test_the_exact_trace_of_a_correlated_gaussian():
    law = Correlated()
    x = MEAN + 0.5 * normal(5, 12)
    found = Likelihood("exact", rtol=1e-6, atol=1e-6)(law.denoiser(), x, keyed(5))
    torch.testing.assert_close(found, law.log_density(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [1, 4])
def test_probes_are_unbiased_and_their_noise_is_the_predicted(trace, probes):
    """The estimate is e^T M e for fixed e: variance 2 ||M||^2 over P, without the diagonal for Rademacher's.

    M is the change of volume in z = x / n.
    """
    law, count = Correlated(), 1000
    x = (MEAN + 0.5 * normal(1, 12)).expand(count, -1).contiguous()
    found = Likelihood(trace, probes)(law.denoiser(), x, keyed(count))
    volume = law.moved()[0] - torch.eye(12) * torch.log(size(VP().level(1.0)) / size(VP().level(VP.t_min)))
    if trace == "rademacher":
        volume = volume - torch.diag(volume.diagonal())
    variance = 2 * float(volume.square().sum()) / probes
    assert float(found.var()) == pytest.approx(variance, rel=0.25)
    assert abs(float((found - law.log_density(x)).mean())) < 4 * math.sqrt(variance / count)


def test_the_trace_is_that_of_the_networks_jacobian():
    denoiser, x = network(), normal(3, 1, 2, 3, dtype=torch.float32)
    likelihood, level = Likelihood("exact"), VP().level(0.4)
    _, trace = likelihood.answer(denoiser, x, level, likelihood._directions(x, keyed(3)), {})
    jacobian = torch.func.jacrev(lambda x: denoiser.x0(x, level.t))(x).reshape(3, 6, 3, 6)
    less = 6 * level.alpha / size(level) ** 2
    torch.testing.assert_close(trace + less, torch.einsum("bdbd->b", jacobian).double(), rtol=1e-5, atol=1e-5)


@every_process
def test_mixture_in_the_plane(process):
    """With the true law of the latents in the prior's place, ln p is that of the mixture at t_min."""
    mixture = Mixture()
    denoiser, x = mixture.denoiser(process), mixture.draw(50).double()
    found = Likelihood("exact", rtol=1e-6, atol=1e-6)(denoiser, x, keyed(50))
    latent = ODESampler(rtol=1e-8, atol=1e-8).encode(denoiser, x)
    prior = torch.distributions.Normal(0.0, process.sigma(as_time(1.0))).log_prob(latent).sum(1)
    correction = denoiser.log_density(latent, 1.0) - prior
    truth = denoiser.log_density(x, process.t_min)
    torch.testing.assert_close(found + correction, truth, rtol=0, atol=2e-4)
    if process.level(1.0).alpha == 0:
        assert float(correction.abs().max()) < 1e-6


# Cost, modes, batches.


def network(seed=0, process=VP(), preconditioning=EDMPreconditioning(0.5)):
    torch.manual_seed(seed)
    net = MLP({"kind": "image", "shape": [1, 2, 3]}, width=16, depth=1).eval()
    torch.nn.init.normal_(net.last.weight, std=0.2)
    return Denoiser(net, process, preconditioning)


def test_one_network_call_gives_drift_and_divergence():
    slopes, calls = [], []

    class Counted(Likelihood):
        def answer(self, *arguments):
            slopes.append(1)
            return super().answer(*arguments)

    denoiser = network()
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    for probes in (1, 3):
        slopes.clear()
        calls.clear()
        likelihood = Counted(probes=probes)
        likelihood(denoiser, 0.3 * normal(4, 1, 2, 3, dtype=torch.float32), keyed(4))
        assert len(calls) == len(slopes) == likelihood.evaluations > 20


def test_every_grad_mode_gives_the_same_and_no_graph():
    denoiser, x = network(), 0.3 * normal(4, 1, 2, 3, dtype=torch.float32)
    plain = Likelihood()(denoiser, x, keyed(4))
    assert not plain.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert torch.equal(Likelihood()(denoiser, x.clone(), keyed(4)), plain)


def test_an_example_does_not_depend_on_its_batch():
    law = Correlated()
    x = MEAN + 0.5 * normal(6, 12)
    whole = Likelihood()(law.denoiser(), x, keyed(6))
    alone = [Likelihood()(law.denoiser(), x[i : i + 1], Draw(0, torch.tensor([i]))) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=12 * 5e-5)
    other = Likelihood()(law.denoiser(), x, keyed(6, seed=1))
    assert float((other - whole).abs().min()) > 0.01


# Conditions and guidance.


class TwoClasses(BaseDenoiser):
    """N(MEAN, STD^2) and its mirror image N(-MEAN, STD^2); label 2 is both."""

    conditions = ("label",)
    classes = 2

    def __init__(self, process):
        super().__init__(process)
        means = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * MEAN * torch.ones(2, 3)
        square = STD**2 * torch.eye(3, dtype=torch.float64)[None]
        self.both = GaussianMixtureDenoiser(process, means, square.expand(2, -1, -1))
        self.each = [GaussianMixtureDenoiser(process, mean[None], square) for mean in means]

    def x0(self, x, t, **conditions):
        label = conditions["label"][:, None]
        first, second, both = (denoiser.x0(x, t) for denoiser in (*self.each, self.both))
        return torch.where(label == 0, first, torch.where(label == 1, second, both))


class ExactClassifier:
    """p(class | x_t) of the two, whatever the process."""

    classes = 2
    ratios = (0.0, math.inf)

    def log_probs(self, x, level):
        return TwoClasses(SubVP()).both._components(x, level.t)[1].log_softmax(1)


def of_classes(x, label, process):
    sign = torch.where(label == 0, 1.0, -1.0)[:, None]
    return of_gaussian(sign * x, process)


def test_conditions():
    x, label = STD * normal(8, 3), torch.tensor([0, 1] * 4)
    found = Likelihood()(TwoClasses(VP()), x, keyed(8), label=label)
    torch.testing.assert_close(found, of_classes(x, label, VP()), rtol=0, atol=3 * 1e-4)


def test_guided_denoisers():
    """At weight 1 and scale 1 both guidances are Bayes' rule."""
    x, label = STD * normal(8, 3), torch.tensor([0, 1] * 4)
    classes = TwoClasses(SubVP())
    likelihood, truth = Likelihood("exact"), of_classes(x, label, SubVP())
    torch.testing.assert_close(
        likelihood(ClassifierFree(classes, 1.0), x, keyed(8), label=label), truth, rtol=0, atol=1e-3
    )
    assert likelihood.evaluations % 2 == 0
    guided = ClassifierGuidance(classes.both, ExactClassifier())
    with torch.inference_mode():
        torch.testing.assert_close(likelihood(guided, x, keyed(8), label=label), truth, rtol=0, atol=1e-3)


# Mistakes.


@pytest.mark.parametrize("process", [Cosine(), Flow()])
def test_models_of_noise_are_refused_where_nothing_is_left_of_the_data(process):
    x = 0.3 * normal(2, 1, 2, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match="nothing of the data is left at t = 1"):
        Likelihood()(network(0, process, Preconditioning("noise")), x, keyed(2))
    assert Likelihood()(network(0, process, Preconditioning("v")), x, keyed(2)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "at least 1 probe"),
        ({"probes": -2}, "at least 1 probe, got -2"),
        ({"trace": "hutchinson"}, "rademacher, gaussian, exact"),
        ({"trace": "exact", "probes": 2}, "takes no probes"),
        ({"solver": "euler"}, "solver"),
        ({"rtol": 0.0}, "rtol"),
        ({"atol": -1.0}, "atol"),
        ({"t_min": 1.0}, "t_min"),
        ({"t_min": -0.1}, "t_min"),
        ({"data_std": -1.0}, "data_std"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Likelihood(**arguments)


def test_bad_data():
    with pytest.raises(ValueError, match="continuous"):
        Likelihood()(gaussian(VP(), 3), torch.zeros(2, 3, dtype=torch.uint8), keyed(2))
    with pytest.raises(ValueError, match="1025 dimensions"):
        Likelihood("exact")(gaussian(VP()), torch.zeros(2, 1025), keyed(2))
    with pytest.raises(ValueError, match="no noise is left"):
        Likelihood(t_min=0.0)(gaussian(VP()), torch.zeros(2, 1), keyed(2))
    with pytest.raises(ValueError, match="2 keys cannot fill"):
        Likelihood()(gaussian(VP(), 3), torch.zeros(5, 3), keyed(2))
