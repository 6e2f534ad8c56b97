"""Denoisers of residuals against the reference's formulas for images (tad_sr.md 2.2, 2.4 and 10)."""

import pytest
import torch
from torch import nn

from lightning_sgm.denoiser import Denoiser, EDMPreconditioning, GaussianMixtureDenoiser, Preconditioning
from lightning_sgm.guidance import ResidualInRange
from lightning_sgm.objectives.denoising import ChainTimes, DenoisingObjective
from lightning_sgm.objectives.weights import EDMWeight
from lightning_sgm.processes import VP, ResidualShift
from lightning_sgm.random import Draw
from lightning_sgm.residual_denoiser import ResidualDenoiser, ResShiftPreconditioning

PROCESS = ResidualShift()
ETA = PROCESS.table**2
OUTPUTS = ("xstart", "residual", "epsilon", "epsilon_scale")
every_output = pytest.mark.parametrize("output", OUTPUTS)


class Toy(nn.Module):
    """Depends on all it is given, and keeps it."""

    def __init__(self, conditions=("low",)):
        super().__init__()
        self.conditions = conditions

    def forward(self, x, label, /, **conditions):
        self.seen = (x, label, conditions)
        extra = sum(value for value in conditions.values())
        return torch.sin(3 * x + extra) + 0.1 * label.to(x).reshape(-1, 1)


def images(rows=5):
    draw = Draw(2)
    x, y, low = (draw.normal((rows, 4), torch.float64) for _ in range(3))
    return x, y, low


def time(index):
    return PROCESS.time(index)


@every_output
@pytest.mark.parametrize("scaling", ["latent", "pixel", "none"])
@pytest.mark.parametrize("i", [0, 7, 14])
def test_networks_see_and_say_what_the_references_do(output, scaling, i):
    network, (x, y, low) = Toy(), images()
    denoiser = ResidualDenoiser(network, PROCESS, ResShiftPreconditioning(output, scaling))
    eta = ETA[i]
    shown = {"latent": x / torch.sqrt(4 * eta + 1), "pixel": x / (6 * eta.sqrt() + 1), "none": x}[scaling]
    said = network(shown, torch.full((5,), float(i)), low=low)
    x0 = {
        "xstart": said,
        "residual": y - said,
        "epsilon": (x - 2 * eta.sqrt() * said - eta * y) / (1 - eta),
        "epsilon_scale": (x - said - eta * y) / (1 - eta),
    }[output]
    noise = (x - (1 - eta) * x0 - eta * y) / (2 * eta.sqrt())
    given = {"low": low, "origin": y}
    assert denoiser.conditions == ("low", "origin")
    found = denoiser.x0(x - y, time(i), **given)
    torch.testing.assert_close(found, x0 - y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoiser.noise(x - y, time(i), **given), noise, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(network.seen[0], shown)
    assert network.seen[1].tolist() == [i] * 5
    assert set(network.seen[2]) == {"low"}


@every_output
def test_targets_are_the_references(output):
    # A network that says the target makes a perfect denoiser.
    (x0, y, _), eps = images(), Draw(3).normal((5, 4), torch.float64)
    for i in (0, 4, 14):
        level = PROCESS.level(time(i))
        target = {"xstart": x0, "residual": y - x0, "epsilon": eps, "epsilon_scale": eps * level.sigma}[output]
        network = nn.Module()
        network.forward = lambda x, label, target=target: target
        denoiser = ResidualDenoiser(network, PROCESS, ResShiftPreconditioning(output))
        x = PROCESS.perturb(x0 - y, level, eps)
        torch.testing.assert_close(denoiser.x0(x, level.t, origin=y), x0 - y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(denoiser.noise(x, level.t, origin=y), eps, rtol=1e-9, atol=1e-9)


def test_times_differ_within_a_batch():
    network, (x, y, low) = Toy(), images()
    denoiser = ResidualDenoiser(network, PROCESS)
    t = time(torch.tensor([0, 3, 14, 7, 1]))
    whole = denoiser.x0(x - y, t, low=low, origin=y)
    for row in range(5):
        one = slice(row, row + 1)
        alone = denoiser.x0((x - y)[one], t[row], low=low[one], origin=y[one])
        torch.testing.assert_close(whole[one], alone)


def test_a_network_is_given_the_origin_only_if_it_asks():
    x, y, low = images()
    for conditions, known in ((("low", "origin"), {"low", "origin"}), (("origin",), {"origin"}), ((), set())):
        network = Toy(conditions)
        for preconditioning in (ResShiftPreconditioning(), EDMPreconditioning(0.1)):
            denoiser = ResidualDenoiser(network, PROCESS, preconditioning)
            edm = isinstance(preconditioning, EDMPreconditioning)
            assert set(denoiser.conditions) == (known if edm else known | {"origin"})
            given = {"low": low} if "low" in known else {}
            denoiser.x0(x, 0.3, origin=y, **given)
            assert set(network.seen[2]) == known
    with pytest.raises(ValueError, match="ResidualDenoiser needs the condition origin"):
        ResidualDenoiser(Toy(), PROCESS).x0(x, 0.3, low=low)


# Residual preconditioning.


@pytest.mark.parametrize("spread", [0.086, 0.5])
def test_residual_preconditioning_is_edms_on_residuals(spread):
    process, network, (x, _, low) = ResidualShift(kappa=0.3), Toy(), images()
    denoiser, weight = ResidualDenoiser(network, process, EDMPreconditioning(spread)), EDMWeight(spread)
    for i in (0, 5, 14):
        level = process.level(process.time(i))
        eta = process.table[i] ** 2
        v = (1 - eta) ** 2 * spread**2 + 0.09 * eta
        found = denoiser.x0(x, level.t, low=low)
        expected = (1 - eta) * spread**2 / v * x + spread * 0.3 * eta.sqrt() / v.sqrt() * network(
            x / v.sqrt(), network.seen[1], low=low
        )
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(weight(level, process), 1 / (spread**2 * 0.09 * eta / v))


def test_a_network_that_starts_at_zero_is_the_wiener_estimate():
    spread, process = 0.086, ResidualShift(kappa=0.3)
    network = nn.Module()
    network.forward = lambda x, label: torch.zeros_like(x)
    denoiser = ResidualDenoiser(network, process, EDMPreconditioning(spread))
    exact = GaussianMixtureDenoiser(process, torch.zeros(1, 4).double(), spread**2 * torch.eye(4)[None].double())
    x = images()[0]
    for t in (0.05, 0.5, 1.0):
        torch.testing.assert_close(denoiser.x0(x, t), exact.x0(x, t), rtol=1e-7, atol=1e-12)
    # Bicubic at t = 1: of the residual hardly anything is seen there.
    assert float(denoiser.x0(process.prior((1000, 4), Draw(0)), 1.0).std()) < 0.03 * spread


def test_its_loss_is_the_error_in_units_of_what_is_unknown():
    process, spread = ResidualShift(kappa=0.3), 0.086
    network = nn.Module()
    network.forward = lambda x, label: torch.zeros_like(x)
    denoiser = ResidualDenoiser(network, process, EDMPreconditioning(spread))
    objective = DenoisingObjective(ChainTimes(), EDMWeight(spread))
    loss = objective(denoiser, spread * Draw(0).normal((2000, 8)), Draw(1))["loss"]
    # The Wiener estimate's error is s^2 sigma^2 / v, at all levels.
    assert float(loss.mean()) == pytest.approx(1.0, rel=0.03)


# Score distillation.


def distil(denoiser, z_s, z_t, y, low, i, noise):
    """HSD's g of tad_sr.md 2.4 from two noise estimates, and both states."""
    level, given = PROCESS.level(time(i)), {"low": low, "origin": y}
    states = [PROCESS.perturb(z - y, level, noise) for z in (z_s, z_t)]
    estimates = [denoiser.noise(state, level.t, **given) for state in states]
    return estimates[0] - estimates[1], states, given


@every_output
def test_difference_of_two_noise_estimates_in_closed_form(output):
    (z_s, y, low), z_t, noise = images(), Draw(5).normal((5, 4), torch.float64), Draw(6).normal((5, 4), torch.float64)
    denoiser = ResidualDenoiser(Toy(), PROCESS, ResShiftPreconditioning(output))
    factors = {0: 24.99, 1: 4.21, 2: 2.75, 3: 2.02, 14: 0.010}
    for i, printed in factors.items():
        found, states, given = distil(denoiser, z_s, z_t, y, low, i, noise)
        factor = (1 - ETA[i]) / (2 * ETA[i].sqrt())
        assert float(factor) == pytest.approx(printed, rel=0.01)
        x0_s, x0_t = (denoiser.x0(state, time(i), **given) for state in states)
        torch.testing.assert_close(found, factor * ((z_s - z_t) - (x0_s - x0_t)), rtol=1e-8, atol=1e-8)
        same = distil(denoiser, z_s, z_s, y, low, i, noise)[0]
        assert not same.any()


def test_without_a_state_the_difference_is_all_of_it():
    (z_s, y, low), z_t, noise = images(), Draw(5).normal((5, 4), torch.float64), Draw(6).normal((5, 4), torch.float64)
    network = nn.Module()
    network.conditions = ("low",)  # type: ignore[assignment]
    network.forward = lambda x, label, low: torch.cos(low)
    denoiser = ResidualDenoiser(network, PROCESS)
    for i in (0, 1, 2):
        found = distil(denoiser, z_s, z_t, y, low, i, noise)[0]
        torch.testing.assert_close(found, (1 - ETA[i]) / (2 * ETA[i].sqrt()) * (z_s - z_t), rtol=1e-9, atol=1e-9)


def test_a_perfect_denoiser_has_no_hsd_but_sds_where_student_and_reference_agree():
    exact = GaussianMixtureDenoiser(PROCESS, torch.zeros(1, 4).double(), torch.eye(4)[None].double())
    (z, y, low), noise = images(), Draw(6).normal((5, 4), torch.float64)
    found, states, _ = distil(exact, z, z, y, low, 2, noise)
    assert not found.any()
    assert (exact.noise(states[0], time(2)) - noise).abs().mean() > 0.1


# Clipping.


def test_images_are_kept_in_range():
    network, (x, y, low) = Toy(), images()
    inner = ResidualDenoiser(network, PROCESS, EDMPreconditioning(0.5))
    denoiser = ResidualInRange(inner)
    assert denoiser.conditions == ("low", "origin")
    found, free = (d.x0(x - y, 0.4, low=low, origin=y) for d in (denoiser, inner))
    image = y + free
    torch.testing.assert_close(y + found, image.clamp(-1, 1))
    assert (image.abs() > 1).any()
    assert (image.abs() < 1).any()
    level = PROCESS.level(0.4)
    noise = (x - y - level.alpha * found) / level.sigma
    torch.testing.assert_close(denoiser.noise(x - y, 0.4, low=low, origin=y), noise)
    inner.cost = 2
    denoiser.x0(x - y, 0.4, low=low, origin=y)
    assert denoiser.cost == 2
    with pytest.raises(ValueError, match="ResidualInRange needs the condition origin"):
        denoiser.x0(x, 0.4, low=low)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResShiftPreconditioning("x0"), "output must be xstart, residual"),  # type: ignore[arg-type]
        (lambda: ResShiftPreconditioning(scaling="unit"), "scaling must be latent"),  # type: ignore[arg-type]
        (lambda: ResidualDenoiser(Toy(), VP()), "the label index needs a discrete chain"),
        (lambda: ResidualInRange(Denoiser(Toy(), VP(), Preconditioning()), 1.0, 1.0), "InRange needs low < high"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
