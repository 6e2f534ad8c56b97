import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_sgm.denoiser import BaseDenoiser, Denoiser, EDMPreconditioning, GaussianMixtureDenoiser, Preconditioning
from lightning_sgm.metrics import PerceptualDistance
from lightning_sgm.objectives import (
    ChainTimes,
    Data,
    GroundTruth,
    HighFrequencyScore,
    Inverse,
    Perceptual,
    Phase,
    Regression,
    Term,
    Times,
    UniformLogSNR,
    perceptual,
)
from lightning_sgm.processes.chains import DDPMChain
from lightning_sgm.processes.gaussian import EDM, VP, Flow
from lightning_sgm.processes.residual import ResidualShift
from lightning_sgm.random import Draw
from lightning_sgm.residual_denoiser import ResidualDenoiser, ResShiftPreconditioning

SHAPE = (5, 3, 2)
PROCESSES = {"ResShift": ResidualShift(), "DDPM": DDPMChain(40), "VP": VP(), "EDM": EDM(), "flow": Flow()}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


class At(Times):
    """Given times."""

    def __init__(self, t):
        self.t = torch.as_tensor(t, dtype=torch.float64)

    def __call__(self, process, count, draw):
        return self.t.expand(count)


class Small(nn.Module):
    """A network with parameters, in float64, that counts its calls."""

    def __init__(self, seed=0):
        super().__init__()
        self.mix = nn.Parameter(0.5 * Draw(seed).normal((2, 2), torch.float64))
        self.calls = 0

    def forward(self, x, label, /):
        self.calls += 1
        return torch.sin(x @ self.mix) + 0.01 * label[:, None, None]


class Free(BaseDenoiser):
    """Answers its own parameter, whatever it is asked: a free sample."""

    def __init__(self, process, sample):
        super().__init__(process)
        self.answer = sample.clone().requires_grad_()

    def x0(self, x, t, **conditions):
        return self.answer


class Blind(BaseDenoiser):
    """A teacher that does not look at x."""

    def x0(self, x, t, **conditions):
        return torch.full_like(x, 0.3)


def normal(seed, shape=SHAPE):
    return Draw(seed).normal(shape, torch.float64)


def network_denoiser(process, seed=0):
    return Denoiser(Small(seed), process, Preconditioning("x0", "time"))


def make_phase(student, teacher, *, solution=None, data=None, seed=1, scale=1.0, solve=None, conditions=None):
    start = float(teacher.process.level(1.0).sigma) * normal(9)
    return Phase(
        student, teacher, solve, start, conditions or {}, Draw(seed), data=data, solution=solution, scale=scale
    )


def gradient_at_the_sample(term, phase):
    """dL/dz_s (B, *) of the sum of the losses, for a Free student."""
    (gradient,) = torch.autograd.grad(term.student(phase).sum(), phase.student.answer)
    return gradient


# Score distillation.


def noised(process, t, z, seed=1):
    """What a phase of that seed makes of z at given times."""
    return process.perturb(z, process.level(t), Draw(seed).normal(z.shape, z.dtype))


@every_process
@pytest.mark.parametrize("reference", ["solution", "data"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_gradient_of_the_score_term_is_its_closed_form(process, reference, scale):
    # tad_sr.md 2.4: g = alpha / sigma [(z_s - z_r) - (x0_hat(x_s) - x0_hat(x_r))], dL/dz_s = g / D.
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    z, reference_z, teacher = normal(2), normal(3), network_denoiser(process)
    phase = make_phase(Free(process, z), teacher, scale=scale, **{reference: reference_z})
    found = gradient_at_the_sample(HighFrequencyScore(times=At(t), reference=reference), phase)
    with torch.no_grad():
        estimates = [teacher.x0(noised(process, t, x), t) for x in (z, reference_z)]
    level = process.level(t)
    g = (level.alpha / level.sigma)[:, None, None] * ((z - reference_z) - (estimates[0] - estimates[1]))
    torch.testing.assert_close(found, g / 6 / scale, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(phase.logged["score_gap"], g.abs().mean((1, 2)), rtol=1e-5, atol=1e-9)


@every_process
def test_a_teacher_blind_to_x_pulls_by_the_factor(process):
    t, z, solution = 0.25, normal(2), normal(3)
    phase = make_phase(Free(process, z), Blind(process), solution=solution)
    found = gradient_at_the_sample(HighFrequencyScore(times=At(t)), phase)
    level = process.level(t)
    torch.testing.assert_close(found, level.alpha / level.sigma * (z - solution) / 6)


def test_the_factors_of_resshift():
    process, z, solution = ResidualShift(), normal(2), normal(3)
    for index, factor in ((0, 24.99), (1, 4.21), (2, 2.75), (3, 2.02), (14, 0.010)):
        phase = make_phase(Free(process, z), Blind(process), solution=solution)
        term = HighFrequencyScore(times=ChainTimes(first=index, last=index))
        ratio = gradient_at_the_sample(term, phase) * 6 / (z - solution)
        assert float(ratio.min()) == pytest.approx(float(ratio.max()))
        assert float(ratio.mean()) == pytest.approx(factor, abs=5e-3 if index < 14 else 5e-4)


def test_the_default_noise_is_that_of_the_three_smallest_indices():
    process = ResidualShift()
    start = torch.zeros(600, 1, 1)
    phase = Phase(Blind(process), Blind(process), None, start, {}, Draw(0))
    level, noise = phase.noise("a", HighFrequencyScore().times)
    assert torch.bincount(process.index(level.t).long()).tolist() == [200, 200, 200]
    assert noise.shape == start.shape
    assert abs(float(noise.mean())) < 4 / 600**0.5  # Gaussian, not the uniform noise of their code


def exact(process):
    return GaussianMixtureDenoiser(process, torch.zeros(1, 6).double(), 0.25 * torch.eye(6).double()[None])


@every_process
def test_at_the_solution_the_score_term_rests_and_plain_distillation_does_not(process):
    # The exact denoiser: no noise would be left to answer to if the difference were right.
    z = 0.5 * normal(2)
    gradients = {}
    for reference in ("solution", "noise"):
        phase = make_phase(Free(process, z), exact(process), solution=z)
        gradients[reference] = gradient_at_the_sample(HighFrequencyScore(times=At(0.3), reference=reference), phase)
    assert not gradients["solution"].any()
    assert float(gradients["noise"].square().mean().sqrt()) * 6 > 0.03


def test_plain_distillation_is_right_on_average_only():
    # Over many noises, E[eps_hat(x) - n] = 0 where the samples have the law of the data.
    process, count = VP(), 40000
    z = 0.5 * normal(2, (count, 6))
    student = Free(process, z)
    phase = Phase(student, exact(process), None, normal(9, (count, 6)), {}, Draw(1))
    g = 6 * gradient_at_the_sample(HighFrequencyScore(times=At(0.3), reference="noise"), phase)
    error = g.std() / (count * 6) ** 0.5
    assert abs(float(g.mean())) < 4 * float(error)
    assert float(g.std()) > 0.03


def test_score_terms_send_nothing_to_the_teacher_and_all_to_the_student():
    process = ResidualShift()
    student, teacher = network_denoiser(process, 1), network_denoiser(process, 2)
    for term in (HighFrequencyScore(), HighFrequencyScore(reference="noise"), Regression(), Data(), Inverse()):
        losses = term.student(make_phase(student, teacher, solution=normal(3), data=normal(4)))
        (gradient,) = torch.autograd.grad(losses.sum(), student.network.mix, retain_graph=True)
        assert gradient.abs().min() > 0
        losses.sum().backward()
    assert teacher.network.mix.grad is None


# Regressions.


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.05, 20.0), seed=st.integers(0, 1000))
def test_regressions_are_mean_squares_in_units_of_the_scale(scale, seed):
    z, solution, data = (normal(seed + i) for i in range(3))
    phase = make_phase(Free(VP(), z), Blind(VP()), solution=solution, data=data, scale=scale)
    for term, target in ((Regression(), solution), (Data(), data)):
        loss = term.student(phase)
        torch.testing.assert_close(loss, ((z - target) ** 2).mean((1, 2)) / scale**2)
        (gradient,) = torch.autograd.grad(loss.sum(), phase.student.answer)
        torch.testing.assert_close(gradient, 2 * (z - target) / 6 / scale**2)


def test_losses_of_half_precision_samples_are_float32():
    z = torch.full((2, 1000), 30.0, dtype=torch.bfloat16)
    phase = Phase(Free(VP(), z), Blind(VP()), None, z, {}, Draw(0), solution=torch.zeros_like(z))
    loss = Regression().student(phase)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 900.0), rtol=4e-3, atol=0)


class Line(BaseDenoiser):
    """x0 and noise that are known lines in x, other ones at each end of time."""

    def __init__(self, process):
        super().__init__(process)
        self.slopes = torch.tensor([2.0, 0.7]).double().requires_grad_()
        self.times = []

    def x0(self, x, t, **conditions):
        self.times.append(float(t))
        return self.slopes[0 if t < 0.5 else 1] * x + 0.1

    def noise(self, x, t, **conditions):
        self.times.append(float(t))
        return self.slopes[0] * x - 0.2


@pytest.mark.parametrize("process", [ResidualShift(), VP(), EDM()], ids=["ResShift", "VP", "EDM"])
@pytest.mark.parametrize("answer", ["x0", "noise"])
def test_the_terms_of_sinsr(process, answer):
    # tad_sr.md section 4, with "index 0" the smallest level and residuals as states.
    student, solution, data = Line(process), normal(2), normal(3)
    phase = make_phase(student, Blind(process), solution=solution, data=data, scale=0.5)
    sigma = float(process.level(1.0).sigma)
    slope = float(student.slopes[0].detach())

    def start_of(z):
        return 2.0 * z + 0.1 if answer == "x0" else sigma * (2.0 * z - 0.2)

    inverse = Inverse(answer=answer).student(phase)
    torch.testing.assert_close(inverse, ((start_of(solution) - phase.start) / 0.5).square().mean((1, 2)))
    truth = GroundTruth(answer=answer).student(phase)
    torch.testing.assert_close(truth, ((0.7 * start_of(data) + 0.1 - data) / 0.5).square().mean((1, 2)))
    assert student.times == [process.t_min, process.t_min, 1.0]
    # The inverse learns how to find the start, the other what to make of it, and not the reverse.
    ((inverse_slope, one),) = torch.autograd.grad(inverse.sum(), student.slopes)
    ((zero, truth_slope),) = torch.autograd.grad(truth.sum(), student.slopes)
    assert (float(one), float(zero)) == (0.0, 0.0)
    assert inverse_slope != 0
    assert truth_slope != 0
    assert slope == 2.0


def test_the_inverse_of_a_perfect_student_costs_nothing():
    # The deterministic map of one Gaussian is linear, and a student may be that map at t = 1 and its inverse at t_min.
    process = ResidualShift()
    shrink = 0.5 / float(((0.5 * process.level(1.0).alpha) ** 2 + process.level(1.0).sigma ** 2).sqrt())

    class Perfect(BaseDenoiser):
        def x0(self, x, t, **conditions):
            return x * shrink if t == 1.0 else x / shrink

    phase = make_phase(Perfect(process), exact(process), solve=lambda start, conditions: shrink * start, data=normal(2))
    for term in (Regression(), Inverse(), GroundTruth()):
        assert float(term.student(phase).max()) < 1e-20
    assert float(Data().student(phase).min()) > 0.1


def test_why_inverse_has_an_answer_for_karras_networks():
    # Their x0 at the smallest level is the input, whatever the network says; their noise is not.
    process, z = ResidualShift(kappa=0.3, min_noise=0.004), 0.1 * normal(2)
    change = {}
    for answer in ("x0", "noise"):
        losses = []
        for seed in (0, 1):
            student = Denoiser(Small(seed), process, EDMPreconditioning(0.1, "index"))
            phase = make_phase(student, Blind(process), solution=z, scale=0.1)
            losses.append(Inverse(answer=answer).student(phase).detach())
        change[answer] = float(((losses[1] - losses[0]) / losses[0]).abs().mean())
    assert change["x0"] < 0.05
    assert change["noise"] > 0.2


def test_the_inverse_of_a_network_that_says_images_is_an_image_less_the_origin():
    # SinSR: the network is shown z_t at index 0 and answers x_T, both images.
    class Says(nn.Module):
        conditions = ("low",)

        def forward(self, x, label, /, low):
            assert label.tolist() == [0.0] * 5
            return 3.0 * x + low

    process, origin, low = ResidualShift(), normal(4), normal(5)
    student = ResidualDenoiser(Says(), process, ResShiftPreconditioning(scaling="none"))
    z, start = normal(2), normal(6)
    phase = Phase(student, Blind(process), None, start, {"origin": origin, "low": low}, Draw(0), solution=z)
    image = 3.0 * (z + origin) + low
    torch.testing.assert_close(Inverse().student(phase), (image - (start + origin)).square().mean((1, 2)))


# Phases.


def test_a_phase_asks_each_network_once_for_what_its_terms_share():
    process, solved = ResidualShift(), []

    def solve(start, conditions):
        assert not torch.is_grad_enabled()
        solved.append(conditions)
        return teacher.x0(start, 1.0)

    student, teacher = network_denoiser(process, 1), network_denoiser(process, 2)
    phase = make_phase(student, teacher, solve=solve, data=normal(3), conditions={"low": normal(4)})
    for term in (Regression(), Data(), HighFrequencyScore(), Regression()):
        term.student(phase)
    assert student.network.calls == 1
    assert teacher.network.calls == 1 + 2
    assert [[*names] for names in solved] == [["low"]]
    assert not phase.solution.requires_grad
    assert phase.sample.requires_grad


def test_a_known_solution_is_not_solved_for():
    z = normal(3)
    phase = make_phase(Blind(VP()), Blind(VP()), solution=z, solve=lambda *_: pytest.fail("was solved for"))
    assert phase.solution is z


def test_a_sample_has_a_graph_where_it_is_first_asked_for_with_gradients():
    student = network_denoiser(VP())
    with torch.no_grad():
        assert not make_phase(student, Blind(VP())).sample.requires_grad
        phase = make_phase(student, Blind(VP()))
        phase.sample  # noqa: B018
    assert not phase.sample.requires_grad
    assert student.network.calls == 2


def test_noise_is_drawn_once_for_a_key_and_again_for_another():
    phase = make_phase(Blind(VP()), Blind(VP()))
    times = UniformLogSNR(0.1, 1.0)
    (first, noise), (again, same), (other, new) = (phase.noise(key, times) for key in ("a", "a", "b"))
    assert first is again
    assert noise is same
    assert not torch.equal(noise, new)
    assert not torch.equal(first.t, other.t)
    repeated = make_phase(Blind(VP()), Blind(VP()))
    assert torch.equal(repeated.noise("b", times)[1], noise)


def test_shared_values_are_made_once():
    phase, made = make_phase(Blind(VP()), Blind(VP())), []
    for _ in range(2):
        assert phase.shared("key", lambda: made.append(1)) is None
    assert made == [1]


def test_exact_draws_give_each_example_its_loss_whatever_its_batch():
    process, keys = ResidualShift(), torch.tensor([3, 8, 1, 2**40, 5])
    z, solution, start = normal(2), normal(3), normal(9)
    student, teacher = network_denoiser(process, 1), network_denoiser(process, 2)

    def losses(rows):
        phase = Phase(
            student, teacher, None, start[rows], {}, Draw(1, keys[rows]), solution=solution[rows], data=z[rows]
        )
        terms = (HighFrequencyScore(), Regression(), HighFrequencyScore(reference="noise"), Inverse(), GroundTruth())
        return torch.stack([term.student(phase).detach() for term in terms])

    whole = losses(slice(None))
    parts = torch.cat([losses([3, 0]), losses([1]), losses([4, 2])], 1)
    torch.testing.assert_close(parts, whole[:, [3, 0, 1, 4, 2]], rtol=1e-12, atol=1e-14)


def test_each_model_is_given_the_conditions_it_wants():
    class Wants(nn.Module):
        conditions = ("low",)

        def forward(self, x, label, /, low):
            return x + low

    student = Denoiser(Wants(), VP(), Preconditioning("x0"))
    low, other = normal(5), normal(6)
    phase = make_phase(student, Blind(VP()), conditions={"low": low, "other": other}, solution=normal(3))
    torch.testing.assert_close(phase.sample, phase.start + low)
    assert HighFrequencyScore(times=At(0.5)).student(phase).isfinite().all()


# A whole distillation: the student must find the teacher's map.


@pytest.mark.parametrize("process", [VP(), ResidualShift()], ids=["VP", "ResShift"])
def test_score_and_regression_lead_to_the_teachers_map(process):
    level = process.level(1.0)
    shrink = 0.5 / float(((0.5 * level.alpha) ** 2 + level.sigma**2).sqrt())

    class Gain(BaseDenoiser):
        gain = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def x0(self, x, t, **conditions):
            return self.gain * x

    student, terms = Gain(process), [Regression(), HighFrequencyScore(times=At(0.2))]
    optimizer = torch.optim.SGD([student.gain], lr=0.02)
    for step in range(300):
        start = level.sigma * normal(step, (16, 6))
        phase = Phase(student, exact(process), lambda x, _: shrink * x, start, {}, Draw(step), scale=0.5)
        optimizer.zero_grad()
        torch.stack([term.student(phase).mean() for term in terms]).sum().backward()
        optimizer.step()
    assert float(student.gain.detach()) == pytest.approx(shrink, rel=1e-3)


# Accelerators.


def test_no_value_is_waited_for():
    # Fake tensors raise where Python asks for a value, which on an accelerator is a wait.
    terms = (Regression(), Data(), HighFrequencyScore(), Inverse(), Inverse(answer="noise"), GroundTruth())
    with FakeTensorMode(allow_non_fake_inputs=True):
        z = torch.zeros(4, 3, dtype=torch.float64)
        student = Blind(ResidualShift())
        phase = Phase(student, student, None, z, {}, Draw(0, torch.arange(4)), data=z, solution=z)
        assert all(term.student(phase).shape == (4,) for term in terms)


# Messages.


def test_what_is_missing_is_said():
    phase = make_phase(Blind(VP()), Blind(VP()))
    with pytest.raises(ValueError, match="give the Phase a solver, or the solutions"):
        Regression().student(phase)
    for term in (Data(), GroundTruth(), HighFrequencyScore(times=At(0.5), reference="data")):
        with pytest.raises(ValueError, match="needs clean data, and there are none"):
            term.student(phase)
    with pytest.raises(ValueError, match="ChainTimes needs a discrete chain, and VP is none"):
        HighFrequencyScore().student(phase)
    with pytest.raises(NotImplementedError):
        Term().student(phase)


def test_terms_without_a_critic_have_none():
    term = Regression()
    term.build(Blind(VP()))
    assert not term.has_critic
    assert term.critic(make_phase(Blind(VP()), Blind(VP()))) is None
    assert list(term.parameters()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regression(-1.0), "weight of Regression must be at least 0"),
        (lambda: HighFrequencyScore(reference="teacher"), "solution, data or noise"),  # type: ignore[arg-type]
        (lambda: Inverse(answer="v"), "x0 or noise"),  # type: ignore[arg-type]
        (lambda: GroundTruth(answer="v"), "x0 or noise"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class HalfSquare(PerceptualDistance):
    """A stand-in: half the mean squared difference."""

    def __init__(self):
        super().__init__("half_square", torch.nn.Identity())

    def distances(self, x, truth):
        return 0.5 * (x - truth).square().flatten(1).mean(1)


@pytest.mark.parametrize("reference", ["data", "solution"])
def test_perceptual_compares_what_is_decoded(reference):
    """With a decoder that doubles, the stand-in is 2 mean (z_s - z_r)^2; nothing flows into the other image."""
    decoded = []

    def decode(sample, conditions):
        decoded.append(sample)
        return 2.0 * sample

    z, data, solution = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    student = Free(VP(), z.detach())
    phase = Phase(student, student, None, z, {}, Draw(0), data=data, solution=solution, decode=decode)
    loss = Perceptual(HalfSquare(), reference=reference).student(phase)
    wanted = data if reference == "data" else solution
    torch.testing.assert_close(loss, 2.0 * (z - wanted).square().mean(1))
    assert len(decoded) == 2
    loss.sum().backward()
    torch.testing.assert_close(student.answer.grad, 4.0 / 5.0 * (z - wanted).detach())
    assert wanted.grad is None
    assert Perceptual(HalfSquare()).state_dict() == {}


def test_perceptual_refuses_another_reference():
    with pytest.raises(ValueError, match="reference must be data or solution, got 'noise'"):
        Perceptual(HalfSquare(), reference="noise")  # type: ignore[arg-type]


def test_perceptual_by_name_is_made_when_it_is_asked_for(monkeypatch):
    """What was trained with it is loaded without the weights of its networks."""
    made = []

    def make():
        made.append(1)
        return HalfSquare()

    monkeypatch.setitem(perceptual._DISTANCES, "st_lpips", make)
    term, z = Perceptual("st_lpips"), torch.randn(2, 3)
    assert not made
    phase = Phase(Free(VP(), z), Free(VP(), z), None, z, {}, Draw(0), data=torch.zeros(2, 3))
    for _ in range(2):
        torch.testing.assert_close(term.student(phase), 0.5 * z.square().mean(1))
    assert made == [1]
    with pytest.raises(ValueError, match=r"distance must be one of st_lpips, .*, got 'lpipz'"):
        Perceptual("lpipz")  # type: ignore[arg-type]


def test_score_distillation_of_a_process_without_such_noise_is_refused_at_once():
    teacher = Blind(VP())
    with pytest.raises(ValueError, match=r"HighFrequencyScore cannot draw its noise.*UniformLogSNR"):
        HighFrequencyScore().build(teacher)
    HighFrequencyScore(times=UniformLogSNR(ratio_max=0.1)).build(teacher)
