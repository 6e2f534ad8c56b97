import pytest
import torch
from torch import nn

from lightning_sgm.denoiser import BaseDenoiser, Denoiser, GaussianMixtureDenoiser, Preconditioning
from lightning_sgm.objectives import Adversarial, ChainTimes, Phase, Regression, UniformLogSNR, UniformTime
from lightning_sgm.processes.chains import DDPMChain
from lightning_sgm.processes.gaussian import VP
from lightning_sgm.processes.residual import ResidualShift
from lightning_sgm.random import Draw

SHAPE = (6, 3, 4, 4)


class Pictures(nn.Module):
    """A small network with two levels of features, that counts what it is asked."""

    conditions = ("low",)
    feature_channels = (8, 4)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1, stride=2)
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        self.calls = self.asked = 0

    def forward(self, x, label, /, low):
        self.calls += 1
        return self.last(torch.tanh(self.first(torch.cat([x, low], 1))))

    def features(self, x, label, /, low):
        self.asked += 1
        first = torch.tanh(self.first(torch.cat([x, low], 1)) + 0.01 * label[:, None, None, None])
        return [first, self.second(first)]


class Linear(nn.Module):
    """Heads whose logits are all a times the mean of the first features, plus b: losses by hand."""

    def __init__(self, a=1.0, b=0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))
        self.labels = []

    def forward(self, features, label):
        self.labels.append(label)
        return (self.a * features[0].flatten(1).mean(1) + self.b)[:, None].expand(-1, 7)


class Same(nn.Module):
    """Its own features: what is shown to it."""

    feature_channels = (3,)

    def features(self, x, label, /):
        return [x]

    def forward(self, x, label, /):
        return x


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(seed, shape=SHAPE):
    return Draw(seed).normal(shape)


def model(process, network=None, frozen=False):
    network = network or Pictures()
    return Denoiser(network.requires_grad_(not frozen), process, Preconditioning("x0"))


def make_phase(student, teacher, data=True, seed=1, rows=None):
    rows = slice(None) if rows is None else rows
    keys = torch.arange(len(normal(9)))[rows]
    return Phase(
        student,
        teacher,
        lambda start, conditions: 0.5 * start,
        normal(9)[rows],
        {"low": normal(8)[rows]},
        Draw(seed, keys),
        data=normal(7)[rows] if data else None,
    )


def built(teacher, **arguments):
    term = Adversarial(**{"hidden": 16, **arguments})
    term.build(teacher)
    return term


PROCESSES = {"ResShift": ResidualShift(), "DDPM": DDPMChain(40), "VP": VP()}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def times_of(process):
    return UniformLogSNR(0.05, 5.0) if isinstance(process, VP) else ChainTimes(last=-2)


@every_process
@pytest.mark.parametrize("training", [True, False])
def test_an_untrained_critic_loses_two_and_teaches_the_student_nothing(process, training):
    teacher, student = model(process, frozen=True), model(process)
    term = built(teacher, times=times_of(process)).train(training)
    phase = make_phase(student, teacher)
    loss = term.critic(phase)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, torch.full((6,), 2.0), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(term.student(phase).sum(), phase.sample)
    assert not gradient.any()


def test_losses_are_those_of_the_formula():
    # tad_sr.md 2.4, with a discriminator whose logits can be worked out.
    process, z, data = ResidualShift(), normal(2), normal(3)
    teacher = model(process, Same())
    term = built(teacher)
    term.heads = Linear(20.0, 0.3)
    phase = Phase(Still(process, z), teacher, None, z, {}, Draw(1), data=data)
    level, noise = phase.noise(term, term.times)
    real, fake = (20 * process.perturb(x, level, noise).mean((1, 2, 3)) + 0.3 for x in (data, z))
    assert real.abs().max() > 1
    critic, student = term.critic(phase), term.student(phase)
    torch.testing.assert_close(critic, (1 - real).clamp_min(0) + (1 + fake).clamp_min(0))
    torch.testing.assert_close(student, -fake)
    torch.testing.assert_close(phase.logged["logit_real"], real)
    torch.testing.assert_close(phase.logged["logit_fake"], fake)
    assert not phase.logged["logit_fake"].requires_grad
    assert torch.equal(term.heads.labels[0], process.index(level.t).float().repeat(2))
    assert torch.equal(term.heads.labels[1], process.index(level.t).float())
    (gradient,) = torch.autograd.grad(student.sum(), phase.sample)
    torch.testing.assert_close(gradient, (-20 / 48 * level.alpha).float()[:, None, None, None].expand(SHAPE))


class Still(BaseDenoiser):
    """A student that answers one tensor."""

    def __init__(self, process, z):
        super().__init__(process)
        self.z = z.clone().requires_grad_()

    def x0(self, x, t, **conditions):
        return self.z * 1.0


@pytest.mark.parametrize(("real", "fake", "moves"), [(1.5, -1.5, False), (0.5, -1.5, True), (1.5, -0.5, True)])
def test_outside_the_margin_the_critic_learns_nothing(real, fake, moves):
    process, shape = DDPMChain(1000), (4, 3, 4, 4)
    term, teacher = Adversarial(times=ChainTimes(first=0, last=0)), model(process, Same())
    term.build(teacher)
    term.heads = Linear()
    z, data = torch.full(shape, fake), torch.full(shape, real)
    phase = Phase(Still(process, z), teacher, None, z, {}, Draw(1), data=data)
    loss = term.critic(phase)
    gradients = torch.autograd.grad(loss.sum(), list(term.heads.parameters()))
    assert bool(loss.any()) == moves
    assert all(bool(gradient) == moves for gradient in gradients)


def test_times_that_are_given_stay():
    times = ChainTimes(first=3, last=3)
    assert built(model(ResidualShift(), Same()), times=times).times is times
    assert isinstance(built(model(VP(), Same())).times, UniformTime)


def test_the_largest_level_is_left_out_and_continuous_levels_are_told_as_times():
    process = ResidualShift()
    start = torch.zeros(1400, 1)
    teacher = model(process, Same())
    phase = Phase(Still(process, start), teacher, None, start, {}, Draw(1))
    level, noise = phase.noise("key", built(teacher).times)
    assert torch.equal(process.index(level.t), process.index(level.t).round())
    assert torch.bincount(process.index(level.t).long()).tolist() == [100] * 14
    assert abs(float(noise.mean())) < 4 / 1400**0.5
    teacher = model(VP(), Same())
    term = built(teacher, times=UniformLogSNR(0.1, 1.0))
    term.heads = Linear()
    z = normal(2)
    phase = Phase(Still(VP(), z), teacher, None, z, {}, Draw(1), data=z)
    term.student(phase)
    torch.testing.assert_close(term.heads.labels[0], 999 * phase.noise(term, term.times)[0].t.float())


def test_gradients_go_where_they_should():
    process = ResidualShift()
    teacher, student = model(process, frozen=True), model(process)
    term = built(teacher)
    with torch.no_grad():
        for head in term.heads.modules():
            if isinstance(head, nn.Conv2d):
                head.weight.normal_(0.0, 0.3)
    phase = make_phase(student, teacher)
    term.critic(phase).sum().backward()
    assert all(parameter.grad.any() for parameter in term.parameters() if parameter.grad is not None)
    assert any(parameter.grad is not None for parameter in term.parameters())
    assert all(parameter.grad is None for parameter in student.network.parameters())
    term.requires_grad_(False).zero_grad()
    term.student(phase).sum().backward()
    assert all(layer.weight.grad.any() for layer in (student.network.first, student.network.last))
    assert all(parameter.grad is None for parameter in [*term.parameters(), *teacher.network.parameters()])


def test_the_critics_step_between_the_two_losses_is_allowed_and_seen():
    process = ResidualShift()
    teacher, student = model(process, frozen=True), model(process)
    term = built(teacher)
    optimizer = torch.optim.AdamW(term.parameters(), lr=1e-2)
    phase = make_phase(student, teacher)
    before = term.critic(phase)
    before.mean().backward()
    optimizer.step()
    after = term.student(phase)
    assert after.abs().max() > 0
    after.mean().backward()  # a logit made before the step would be refused: it was modified in place
    # One sample of the student, features of one fake and one real.
    assert (student.network.calls, teacher.network.asked, teacher.network.calls) == (1, 2, 0)


def test_a_phase_of_its_own_for_the_critic_needs_no_graph():
    process = ResidualShift()
    teacher, student = model(process, frozen=True), model(process)
    term, phase = built(teacher), make_phase(student, teacher)
    with torch.no_grad():
        sample = phase.sample
    term.critic(phase).sum().backward()
    assert not sample.requires_grad
    assert student.network.first.weight.grad is None


def test_the_heads_learn_to_tell_and_the_student_to_be_taken_for_real():
    process, shape = ResidualShift(kappa=0.5), (16, 3, 4, 4)
    teacher = model(process, frozen=True)
    term = built(teacher, times=ChainTimes(first=0, last=2))
    optimizer = torch.optim.AdamW(term.parameters(), lr=5e-3)
    losses = []
    for step in range(100):
        data, z, low = normal(3 * step, shape) + 1.0, normal(3 * step + 1, shape) - 1.0, normal(3 * step + 2, shape)
        phase = Phase(Still(process, z), teacher, None, z, {"low": low}, Draw(step), data=data)
        loss = term.critic(phase).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(2.0, abs=1e-6)
    assert sum(losses[-5:]) / 5 < 0.7
    # Downhill is towards the data.
    (gradient,) = torch.autograd.grad(term.student(phase).sum(), phase.sample)
    assert float((-gradient).mean()) > 0


def test_exact_draws_give_each_example_its_loss_whatever_its_batch():
    process = ResidualShift()
    teacher, student = model(process, frozen=True), model(process)
    term = built(teacher).eval()
    with torch.no_grad():
        term.heads.heads[0].conv.weight.normal_(0.0, 0.3)

    def losses(rows):
        phase = make_phase(student, teacher, rows=rows)
        return torch.stack([term.critic(phase), term.student(phase)]).detach()

    whole = losses(torch.arange(6))
    parts = torch.cat([losses(torch.tensor([4, 0])), losses(torch.tensor([1, 5, 3, 2]))], 1)
    assert whole.std(1).min() > 1e-4
    torch.testing.assert_close(parts, whole[:, [4, 0, 1, 5, 3, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("real", "expected"), [("data", 7), ("solution", 9)])
def test_what_is_taken_for_real(real, expected):
    process = ResidualShift()
    teacher = model(process, Same())
    term = built(teacher, real=real)
    term.heads = Linear()
    phase = make_phase(Still(process, normal(2)), teacher, data=real == "data")
    z = normal(expected) * (0.5 if real == "solution" else 1.0)
    level, noise = phase.noise(term, term.times)
    term.critic(phase)
    torch.testing.assert_close(phase.logged["logit_real"], process.perturb(z, level, noise).mean((1, 2, 3)))


def test_the_critics_parameters_are_those_of_the_term():
    term = built(model(ResidualShift(), frozen=True))
    assert term.has_critic
    assert (term.weight, Adversarial().hidden) == (0.02, 64)
    assert {id(p) for p in term.parameters()} == {id(p) for p in term.heads.parameters()}
    assert not Regression().has_critic


def test_what_is_missing_is_said():
    process = ResidualShift()
    exact = GaussianMixtureDenoiser(process, torch.zeros(1, 2), torch.eye(2)[None])
    with pytest.raises(ValueError, match="GaussianMixtureDenoiser has no features and feature_channels"):
        Adversarial().build(exact)
    with pytest.raises(ValueError, match="Conv2d has no features and feature_channels: take a teacher with them"):
        Adversarial().build(model(process, nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="needs a frozen teacher"):
        Adversarial().build(model(process))
    teacher = model(process, frozen=True)
    with pytest.raises(RuntimeError, match=r"must call build\(teacher\) first"):
        Adversarial().student(make_phase(model(process), teacher))
    with pytest.raises(ValueError, match='choose reference="solution" and real="solution"'):
        built(teacher).critic(make_phase(model(process), teacher, data=False))
    with pytest.raises(ValueError, match="real must be data or solution"):
        Adversarial(real="noise")  # type: ignore[arg-type]
