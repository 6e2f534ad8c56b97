import math
from typing import Any

import pytest
import torch

from lightning_sgm.denoiser import BaseDenoiser, GaussianMixtureDenoiser
from lightning_sgm.guidance import (
    ClassifierFree,
    ClassifierGuidance,
    Matrix,
    NoisyClassifier,
    PosteriorMatching,
    classes,
)
from lightning_sgm.methods import Classifier
from lightning_sgm.networks import Network
from lightning_sgm.processes.gaussian import EDM, VE, VP, Cosine, Flow, SubVP
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    AnnealedLangevin,
    DPMpp2M,
    EulerMaruyama,
    LogUniform,
    ODESampler,
    ReverseDiffusion,
    Sampler,
    UniformTime,
)
from tests.samplers.exact import PROCESSES
from tests.samplers.test_loop import energy_distance

QUANTITIES = ("x0", "noise", "score", "velocity")
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
MEANS = torch.tensor([[-0.8, 0.3], [0.7, -0.2], [0.2, 0.9]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.04, 0.02], [0.02, 0.05]], [[0.09, -0.03], [-0.03, 0.02]], [[0.03, 0.0], [0.0, 0.06]]], dtype=torch.float64
)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEMBERS = (slice(0, 1), slice(1, 3))  # one mode is class 0, the other two are class 1
CLASS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def mixture(process, members=slice(None)):
    return GaussianMixtureDenoiser(process, MEANS[members], COVARIANCES[members], WEIGHTS[members])


def by_class(process):
    """The exact denoisers of class 0, class 1 and of all data."""
    return [*(mixture(process, members) for members in MEMBERS), mixture(process)]


class Conditional(BaseDenoiser):
    """The exact denoiser of labelled data: label 2 is no class. Remembers its calls."""

    conditions = ("label",)
    classes = 2

    def __init__(self, process):
        super().__init__(process)
        self.parts = by_class(process)
        self.calls: list[tuple[int, dict]] = []

    def x0(self, x, t, **conditions):
        self.calls.append((len(x), conditions))
        answers = torch.stack([part.x0(x, t) for part in self.parts])
        return answers[conditions["label"], torch.arange(len(x))]


LEVELS = EDM(1e-5, 1e5)


def log_classes(y, t):
    """ln p(class, y) under LEVELS, (B, 2), from the components' own densities."""
    parts = [part.log_density(y, t) + share.log() for part, share in zip(by_class(LEVELS)[:2], CLASS, strict=True)]
    return torch.stack(parts, 1)


def log_joint(x, level, ratios):
    """The same of x / alpha at the noise sigma / alpha."""
    ratio = level.ratio.clamp(*ratios)
    y = x * torch.sqrt((1 + ratio**2) / (level.alpha**2 + level.sigma**2)).reshape(-1, 1).to(x)
    return log_classes(y, LEVELS.t_from_ratio(ratio))


class Exact:
    """The exact classifier of the mixture at every level within ``ratios``."""

    classes = 2

    def __init__(self, ratios=(1e-4, 1e4)):
        self.ratios = ratios

    def log_probs(self, x, level):
        return log_joint(x, level, self.ratios).log_softmax(1)


def noisy(process, t, count=6, seed=0):
    level = process.level(t)
    spread = torch.sqrt(level.alpha**2 + level.sigma**2).reshape(-1, 1)
    return spread * Draw(seed).normal((count, 2), torch.float64)


def gradients(process, x, t):
    """Gradients of ln p_t(x | class 0), ln p_t(x | class 1) and ln p_t(x), by differentiation of the densities."""
    return [torch.func.grad(lambda x, part=part: part.log_density(x, t).sum())(x) for part in by_class(process)]


LABEL = torch.tensor([0, 1, 1, 0, 1, 0])


@every_process
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_classifier_free_moves_away_from_the_answer_without_a_class(process, weight):
    guided, plain = ClassifierFree(Conditional(process), weight), Conditional(process)
    for t in (0.05, 0.6):
        x = noisy(process, t)
        for quantity in QUANTITIES:
            conditional = getattr(plain, quantity)(x, t, label=LABEL)
            null = getattr(plain, quantity)(x, t, label=torch.full_like(LABEL, 2))
            found = getattr(guided, quantity)(x, t, label=LABEL)
            scale = float(1 + conditional.abs().max())
            torch.testing.assert_close(found, null + weight * (conditional - null), rtol=1e-9, atol=1e-10 * scale)
    if weight == 1.0:
        assert torch.equal(guided.x0(x, t, label=LABEL), plain.x0(x, t, label=LABEL))


@every_process
def test_classifier_free_is_the_score_of_sharpened_classes(process):
    """Of p(x) (p(x | class) / p(x))^w."""
    for t in (0.1, 0.5):
        x = noisy(process, t)
        *conditional, null = gradients(process, x, t)
        chosen = torch.stack(conditional)[LABEL, torch.arange(6)]
        found = ClassifierFree(Conditional(process), 3.0).score(x, t, label=LABEL)
        torch.testing.assert_close(found, -2.0 * null + 3.0 * chosen, rtol=1e-6, atol=1e-6)


def test_classifier_free_asks_once_for_both():
    denoiser = Conditional(VP())
    guided = ClassifierFree(denoiser)
    assert (guided.conditions, guided.classes, guided.null) == (("label",), 2, 2)
    pace = torch.arange(6.0)
    guided.x0(noisy(VP(), 0.5), 0.5, label=LABEL, pace=pace)
    ((rows, conditions),) = denoiser.calls
    assert rows == 12
    assert torch.equal(conditions["label"], torch.cat([LABEL, torch.full((6,), 2)]))
    assert torch.equal(conditions["pace"], torch.cat([pace, pace]))
    assert guided.cost == 2
    sampler = Sampler(DPMpp2M(), 5, LogUniform())
    sampler(guided, (3, 2), Draw(0), label=LABEL[:3])
    assert sampler.evaluations == 10
    other = Conditional(VP())
    ClassifierFree(other, null=1).x0(noisy(VP(), 0.5), 0.5, label=LABEL)
    assert torch.equal(other.calls[0][1]["label"][6:], torch.ones(6, dtype=torch.int64))


@every_process
def test_interval_and_times_of_single_rows(process):
    times = process.t_from_ratio(torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 9.0]))
    ratios = process.level(times).ratio
    low, high = float(ratios[1]), float(ratios[3])  # (low, high]
    x = noisy(process, times)
    denoiser = Conditional(process)
    guided, always = ClassifierFree(denoiser, 3.0, (low, high)), ClassifierFree(Conditional(process), 3.0)
    conditional, everywhere = Conditional(process).x0(x, times, label=LABEL), always.x0(x, times, label=LABEL)
    inside = torch.tensor([False, False, True, True, False, False])[:, None]
    found = guided.x0(x, times, label=LABEL)
    torch.testing.assert_close(found, torch.where(inside, everywhere, conditional))
    assert guided.cost == 2
    for index, t in enumerate(times):
        one = guided.x0(x[index : index + 1], t, label=LABEL[index : index + 1])
        torch.testing.assert_close(one, found[index : index + 1])
        assert guided.cost == (2 if inside[index] else 1)
    assert [rows for rows, _ in denoiser.calls] == [12, 1, 1, 2, 2, 1, 1]


def test_a_run_costs_less_with_an_interval():
    process = VE(0.01, 50.0)
    sampler = Sampler(DPMpp2M(), 20, LogUniform(0.01, 50.0))
    ratios = [float(level.ratio) for level in sampler.levels(process)[:-1]]
    sampler(ClassifierFree(Conditional(process), 2.0, (0.2, 5.0)), (2, 2), Draw(0), label=LABEL[:2])
    assert sampler.evaluations == 20 + sum(0.2 < ratio <= 5.0 for ratio in ratios)
    assert 22 < sampler.evaluations < 38


def draws(label, count=4000):
    """Exact draws of one class."""
    members = MEMBERS[label]
    generator = torch.Generator().manual_seed(label)
    which = torch.multinomial(WEIGHTS[members], count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    roots = torch.linalg.cholesky(COVARIANCES[members])[which]
    return (MEANS[members][which] + torch.einsum("bij,bj->bi", roots, noise)).float()


SAMPLERS: dict[str, tuple[Any, dict]] = {
    "DPM++2M": (Sampler(DPMpp2M(), 60, LogUniform()), PROCESSES),
    "ODE": (ODESampler(), {"VP": VP(), "sub-VP": SubVP(), "VE": VE(0.01, 50.0)}),
    "Euler-Maruyama": (Sampler(EulerMaruyama(), 250, UniformTime(1e-3)), {"VP": VP()}),
    "predictor-corrector": (
        Sampler(ReverseDiffusion(), 200, UniformTime(1e-3), before=[AnnealedLangevin(0.2)], finish="mean"),
        {"sub-VP": SubVP(), "VE": VE(0.01, 50.0)},
    ),
}


@pytest.mark.parametrize(
    ("sampler", "process"),
    [
        pytest.param(sampler, process, id=f"{name} {key}")
        for name, (sampler, processes) in SAMPLERS.items()
        for key, process in processes.items()
    ],
)
@pytest.mark.parametrize("way", ["classifier-free", "classifier"])
def test_samples_have_the_law_of_their_class(sampler, process, way):
    label = torch.arange(3000) % 2
    guided = (
        ClassifierFree(Conditional(process), 1.0)
        if way == "classifier-free"
        else ClassifierGuidance(mixture(process), Exact())
    )
    x = sampler(guided, (3000, 2), Draw(1), label=label)
    for chosen in (0, 1):
        assert energy_distance(x[label == chosen], draws(chosen)) < 0.006
    assert energy_distance(x[label == 0], draws(1)) > 0.1


def test_more_weight_is_more_typical_of_the_class():
    label = torch.ones(2000, dtype=torch.int64)
    right, spread = [], []
    for weight in (0.0, 1.0, 3.0):
        for guided in (
            ClassifierFree(Conditional(VP()), weight),
            ClassifierGuidance(mixture(VP()), Exact(), weight),
        ):
            x = Sampler(DPMpp2M(), 20, LogUniform())(guided, (2000, 2), Draw(1), label=label)
            right.append(float(Exact().log_probs(x.double(), VP().level(0.05)).exp()[:, 1].mean()))
            spread.append(float(x.std(0).norm()))
    # Both are the same guidance where both are exact.
    assert right[::2] == pytest.approx(right[1::2], abs=1e-3)
    assert spread[::2] == pytest.approx(spread[1::2], abs=1e-3)
    assert right[0] == pytest.approx(0.7, abs=0.03)
    assert right[0] < right[2] - 0.2 < right[4] - 0.2
    assert spread[0] > spread[2] > spread[4]


@every_process
def test_a_classifier_turns_the_mixture_into_its_classes(process):
    """Bayes: guided by the exact classifier at scale 1, the denoiser of all data is that of a class."""
    guided, expected = ClassifierGuidance(mixture(process), Exact()), Conditional(process)
    assert isinstance(guided.classifier, NoisyClassifier)
    assert (guided.conditions, guided.classes) == (("label",), 2)
    for t in (0.03, 0.3, 0.8):
        x = noisy(process, t)
        for quantity in QUANTITIES:
            exact = getattr(expected, quantity)(x, t, label=LABEL)
            found = getattr(guided, quantity)(x, t, label=LABEL)
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6 * float(1 + exact.abs().max()))
    times = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    x = noisy(process, times)
    for quantity in QUANTITIES:
        exact = getattr(expected, quantity)(x, times, label=LABEL)
        found = getattr(guided, quantity)(x, times, label=LABEL)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6 * float(1 + exact.abs().max()))


@every_process
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_adds_the_scaled_gradient_to_the_score(process, scale):
    # Song et al. 2021, eq. 14: grad ln p_t(x) + scale grad ln p_t(class | x).
    x = noisy(process, 0.4)
    *conditional, null = gradients(process, x, 0.4)
    chosen = torch.stack(conditional)[LABEL, torch.arange(6)]
    guided = ClassifierGuidance(mixture(process), Exact(), scale)
    found = guided.score(x, 0.4, label=LABEL)
    torch.testing.assert_close(found, null + scale * (chosen - null), rtol=1e-6, atol=1e-6)
    if scale == 0.0:
        assert torch.equal(guided.x0(x, 0.4, label=LABEL), mixture(process).x0(x, 0.4))


def test_no_class_is_no_guidance():
    label = torch.tensor([2, 0, 2, 1, 2, 1])
    x = noisy(VP(), 0.4)
    found = ClassifierGuidance(mixture(VP()), Exact()).x0(x, 0.4, label=label)
    torch.testing.assert_close(found, Conditional(VP()).x0(x, 0.4, label=label))
    assert torch.equal(found[::2], mixture(VP()).x0(x, 0.4)[::2])


@pytest.mark.parametrize("process", [Flow(), Cosine()], ids=["flow", "cosine"])
def test_pure_noise_is_guided_as_the_classifiers_largest_level(process):
    """At alpha = 0 the state says nothing: x_0 is the class's mean."""
    guided = ClassifierGuidance(mixture(process), Exact((1e-3, 300.0)))
    x = noisy(process, 1.0)
    shares = [WEIGHTS[members] / WEIGHTS[members].sum() for members in MEMBERS]
    means = torch.stack([share @ MEANS[members] for share, members in zip(shares, MEMBERS, strict=True)])
    torch.testing.assert_close(guided.x0(x, 1.0, label=LABEL), means[LABEL], rtol=0, atol=0.01)
    torch.testing.assert_close(guided.noise(x, 1.0, label=LABEL), x)
    assert guided.velocity(x, 1.0, label=LABEL).isfinite().all()
    # Continuous: just before, it is nearly the same.
    near = guided.x0(x, 1.0 - 1e-5, label=LABEL)
    torch.testing.assert_close(near, guided.x0(x, 1.0, label=LABEL), rtol=0, atol=0.01)


class Answers(Network):
    """The exact classifier as a network: shown x / sqrt(alpha^2 + sigma^2) and ln(sigma / alpha)."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.seen: list[float] = []

    def forward(self, x, label, /):
        self.seen += label.exp().tolist()
        y = x.double() * torch.sqrt(1 + torch.exp(2 * label.double()))[:, None]
        return log_classes(y, LEVELS.t_from_ratio(label.double().exp())) + self.bias


@every_process
def test_a_classifier_trained_under_one_process_guides_all(process):
    network = Answers()
    classifier = Classifier(network, {"kind": "array", "shape": [2], "classes": 2}, VE(0.002, 200.0))
    guided = ClassifierGuidance(mixture(process), classifier)
    for t in (0.1, 0.5, 0.9):
        x = noisy(process, t)
        exact = Conditional(process).x0(x, t, label=LABEL)
        torch.testing.assert_close(guided.x0(x, t, label=LABEL), exact, rtol=1e-3, atol=1e-3)
    x = Sampler(DPMpp2M(), 20, LogUniform())(guided, (500, 2), Draw(1), label=torch.zeros(500, dtype=torch.int64))
    assert float((x[:, 0] < 0).float().mean()) > 0.99
    assert min(network.seen) > 0.0019
    assert max(network.seen) < 201.0


def test_a_labelled_denoiser_gets_the_label_too():
    denoiser = Conditional(VP())
    guided = ClassifierGuidance(denoiser, Exact(), 0.5)
    assert guided.conditions == ("label",)
    x = noisy(VP(), 0.4)
    *conditional, null = gradients(VP(), x, 0.4)
    chosen = torch.stack(conditional)[LABEL, torch.arange(6)]
    torch.testing.assert_close(guided.score(x, 0.4, label=LABEL), chosen + 0.5 * (chosen - null), rtol=1e-6, atol=1e-6)
    assert torch.equal(denoiser.calls[0][1]["label"], LABEL)


def test_costs_of_a_classifier():
    guided = ClassifierGuidance(mixture(VP()), Exact())
    sampler = Sampler(DPMpp2M(), 5, LogUniform())
    sampler(guided, (6, 2), Draw(0), label=LABEL)
    assert sampler.evaluations == 10
    both = ClassifierGuidance(ClassifierFree(Conditional(VP())), Exact())
    both.x0(noisy(VP(), 0.5), 0.5, label=LABEL)
    assert both.cost == 3


def test_inference_mode_and_a_measurement_around_it():
    guided = ClassifierGuidance(mixture(VP()), Exact())
    x = noisy(VP(), 0.4)
    expected = guided.x0(x, 0.4, label=LABEL)
    assert not expected.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(guided.x0(x.clone(), 0.4, label=LABEL), expected)
        # Its Jacobian has the classifier's second derivatives in it.
        operator, y = Matrix([[1.0, 0.5]]), torch.tensor([[0.3]])
        found, exact = (
            PosteriorMatching(part, operator, y, 0.1, 1).x0(x.clone(), 0.4, label=LABEL)
            for part in (guided, Conditional(VP()))
        )
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_the_classifier_of_a_checkpoint_is_frozen(monkeypatch):
    classifier = Classifier(Answers(), {"kind": "array", "shape": [2], "classes": 2}, VE())
    monkeypatch.setattr(classes, "load", lambda path: classifier)
    guided = ClassifierGuidance(mixture(VP()), "some.ckpt")
    assert guided.classifier is classifier
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    monkeypatch.setattr(classes, "load", lambda path: torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"some.ckpt holds a Linear, which is no classifier: train one"):
        ClassifierGuidance(mixture(VP()), "some.ckpt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFree(Conditional(VP()), -1.0), "weight of ClassifierFree"),
        (lambda: ClassifierFree(Conditional(VP()), math.inf), "weight of ClassifierFree"),
        (lambda: ClassifierFree(Conditional(VP()), interval=(2.0, 1.0)), "interval of ClassifierFree"),
        (lambda: ClassifierFree(Conditional(VP()), interval=(-1.0, 1.0)), "interval of ClassifierFree"),
        (lambda: ClassifierFree(mixture(VP())), "network that takes the class: set its conditional to true"),
        (lambda: ClassifierFree(Conditional(VP())).x0(noisy(VP(), 0.5), 0.5), "ClassifierFree needs to know the class"),
        (lambda: ClassifierGuidance(mixture(VP()), Exact(), -0.1), "scale of ClassifierGuidance"),
        (lambda: ClassifierGuidance(mixture(VP()), Exact(), math.nan), "scale of ClassifierGuidance"),
        (
            lambda: ClassifierGuidance(mixture(VP()), Exact()).noise(noisy(VP(), 0.5), 0.5),
            r"ClassifierGuidance needs to know the class: give label, \(B,\) int64",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_classes_and_missing_files(tmp_path):
    ten = Conditional(VP())
    ten.classes = 10
    with pytest.raises(ValueError, match="classifier knows 2 classes, but the denoiser 10"):
        ClassifierGuidance(ten, Exact())
    unknown = Conditional(VP())
    unknown.classes = 0
    with pytest.raises(ValueError, match="null label: give null"):
        ClassifierFree(unknown)
    assert ClassifierFree(unknown, null=2).null == 2
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        ClassifierGuidance(mixture(VP()), str(tmp_path / "missing.ckpt"))
