import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgm.denoiser import BaseDenoiser, GaussianMixtureDenoiser
from lightning_sgm.guidance import Average, ClassifierFree, Gray, LinearOperator, Mask, Matrix, PosteriorMatching
from lightning_sgm.processes.gaussian import VE, VP, Cosine, Flow
from lightning_sgm.random import Draw
from lightning_sgm.samplers import (
    DPMpp2M,
    EulerMaruyama,
    Heun,
    LogUniform,
    ODESampler,
    ReverseDiffusion,
    Sampler,
    UniformTime,
)
from tests.samplers.exact import LAST_TIME, PROCESSES, SDES, gaussian

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


WIDE, TALL = randn(3, 8), randn(12, 8)
# Every operator with the shape of the examples it is for.
OPERATORS: dict[str, tuple[LinearOperator, tuple[int, ...]]] = {
    "pixels": (Mask(randn(4, 6) > 0), (5, 3, 4, 6)),
    "channels and pixels": (Mask(randn(3, 4, 6) > 0), (5, 3, 4, 6)),
    "pixels of each example": (Mask(randn(5, 1, 4, 6) > 0), (5, 3, 4, 6)),
    "everything": (Mask(torch.ones(7)), (5, 7)),
    "nothing": (Mask(torch.zeros(7)), (5, 7)),
    "gray": (Gray(), (5, 3, 4, 6)),
    "two channels": (Gray(2), (5, 2, 4, 6)),
    "blocks": (Average(2), (5, 3, 4, 6)),
    "one block": (Average(4), (5, 1, 4, 4)),
    "wide matrix": (Matrix(WIDE), (5, 8)),
    "tall matrix": (Matrix(TALL), (5, 8)),
    "matrix of deficient rank": (Matrix(torch.cat([WIDE, WIDE[:2] - WIDE[2]])), (5, 8)),
    "matrix on a series": (Matrix(WIDE, (4, 2)), (5, 4, 2)),
    "matrix in lists": (Matrix([[1.0, 0.5], [2.0, 1.0]]), (5, 2)),
}
every_operator = pytest.mark.parametrize(("operator", "shape"), OPERATORS.values(), ids=OPERATORS.keys())


@every_operator
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_adjoint_and_pseudo_inverse_are_what_they_are_called(operator, shape, seed):
    x = Draw(seed).normal(shape, torch.float64)
    y = Draw(seed + 1).normal(operator.measure(x).shape, torch.float64)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    def inner(a, b):
        return (a * b).flatten(1).sum(1)

    assert operator.adjoint(y).shape == operator.inverse(y).shape == shape
    close(inner(operator.measure(x), y), inner(x, operator.adjoint(y)))
    # The four conditions of Moore and Penrose.
    close(operator.measure(operator.inverse(operator.measure(x))), operator.measure(x))
    close(operator.inverse(operator.measure(operator.inverse(y))), operator.inverse(y))
    other_x, other_y = x.flip(-1) + 0.3, y.flip(-1) - 0.2
    close(inner(operator.measure(operator.inverse(y)), other_y), inner(y, operator.measure(operator.inverse(other_y))))
    close(inner(operator.inverse(operator.measure(x)), other_x), inner(x, operator.inverse(operator.measure(other_x))))
    close(operator.residual(x, y), y - operator.measure(x))


@every_operator
def test_replacing_changes_only_what_is_seen(operator, shape):
    x, truth = Draw(1).normal(shape, torch.float64), Draw(2).normal(shape, torch.float64)
    y = operator.measure(truth)
    found = operator.replace(x, y)
    torch.testing.assert_close(operator.measure(found), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.replace(found, y), found, rtol=0, atol=1e-12)
    # The shortest change that does it: nothing in the space that A does not see.
    change = found - x
    torch.testing.assert_close(operator.inverse(operator.measure(change)), change, rtol=0, atol=1e-12)
    # One measurement for all examples, in half the precision.
    if operator is not OPERATORS["pixels of each example"][0]:
        all_alike = operator.replace(x.float(), y[:1].float())
        assert all_alike.dtype == torch.float32
        torch.testing.assert_close(
            operator.measure(all_alike).double(), y[:1].expand_as(y), rtol=0, atol=1e-5 * float(1 + y.abs().max())
        )


def test_matrix_is_the_matrix():
    matrix = torch.cat([WIDE, WIDE[:2] - WIDE[2]])
    x, y = randn(4, 8), randn(4, 5)
    torch.testing.assert_close(Matrix(matrix).measure(x), torch.stack([matrix @ row for row in x]))
    torch.testing.assert_close(Matrix(matrix).adjoint(y), torch.stack([matrix.T @ row for row in y]))
    pinv = torch.linalg.pinv(matrix)
    torch.testing.assert_close(Matrix(matrix).inverse(y), torch.stack([pinv @ row for row in y]))


def test_means_are_means():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    assert Gray().measure(x)[1, 0, 2, 3] == x[1, :, 2, 3].mean()
    assert Average(2).measure(x)[1, 2, 1, 0] == x[1, 2, 2:4, 0:2].mean()
    assert Average(1).measure(x).equal(x)


def test_known_values_are_kept_bit_by_bit_whatever_is_in_the_unknown_ones():
    x, known = randn(2, 3, 4, 6), randn(4, 6) > 0
    y = randn(2, 3, 4, 6).masked_fill(~known, math.nan)
    found = Mask(known).replace(x, y)
    assert torch.equal(found[..., known], y[..., known])
    assert torch.equal(found[..., ~known], x[..., ~known])
    assert Mask(known).measure(y).isfinite().all()
    # Any number but 0 says that a value is known.
    assert torch.equal(Mask(known * -2.5).measure(x), Mask(known).measure(x))


def test_gray_is_the_first_axis_of_the_papers_rotation():
    # score_sde.md 2.6: rotate the channels by M, replace channel 0, rotate back by M^T; M built exactly.
    third, sixth, half = 3**-0.5, 6**-0.5, 2**-0.5
    rotation = torch.tensor(
        [[third, -2 * sixth, 0.0], [third, sixth, half], [third, sixth, -half]], dtype=torch.float64
    )
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-15)
    x, truth = randn(4, 3, 5, 5), randn(4, 3, 5, 5)
    rotated, known = (torch.einsum("bihw,ij->bjhw", image, rotation) for image in (x, truth))
    rotated[:, 0] = known[:, 0]
    expected = torch.einsum("bjhw,ij->bihw", rotated, rotation)
    found = Gray().replace(x, Gray().measure(truth))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.mean(1), truth.mean(1), rtol=0, atol=1e-14)
    # Noise of unit variance in channel 0 is noise of the mean of the channels: what Replacement adds.
    noise = randn(4, 3, 5, 5)
    torch.testing.assert_close(
        torch.einsum("bihw,i->bhw", noise, rotation[:, 0]) / 3**0.5, Gray().measure(noise)[:, 0], rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(torch.ones(4, 5)).measure(torch.ones(2, 3, 4, 6)), r"mask of shape \(4, 5\).*\(3, 4, 6\)"),
        (lambda: Mask(torch.ones(3, 4, 1)).measure(torch.ones(2, 3, 4, 6)), "mask of shape"),
        (lambda: Mask(torch.ones(1)).measure(torch.ones(2, 6)), "mask of shape"),
        (lambda: Mask(torch.ones(3, 1, 4, 6)).measure(torch.ones(2, 3, 4, 6)), "mask of shape"),
        (lambda: Mask(torch.ones(2, 2, 6)).measure(torch.ones(2, 6)), "mask of shape"),
        (lambda: Mask(torch.ones(6)).replace(torch.ones(2, 6), torch.ones(3, 6)), r"\(2, 6\), got \(3, 6\)"),
        (lambda: Mask(torch.ones(6)).replace(torch.ones(2, 6), torch.ones(6)), r"got \(6,\)"),
        (lambda: Gray(1), "at least 2 channels"),
        (lambda: Gray().measure(torch.ones(2, 4, 4, 4)), r"Gray needs images \(B, 3, H, W\)"),
        (lambda: Gray().measure(torch.ones(2, 3, 4)), "Gray needs images"),
        (lambda: Gray().replace(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)), r"\(2, 1, 4, 4\).*got \(2, 3, 4, 4\)"),
        (lambda: Average(0), "at least 1"),
        (lambda: Average(3).measure(torch.ones(2, 3, 6, 4)), "whose sides 3 divides"),
        (lambda: Average(2).measure(torch.ones(2, 6)), "Average needs images"),
        (lambda: Matrix([1.0, 2.0]), r"shape \(M, D\), got \(2,\)"),  # type: ignore[list-item]
        (lambda: Matrix(torch.ones(2, 6), (2, 2)), r"\(2, 6\).*6 values.*\(2, 2\)"),
        (lambda: Matrix(torch.ones(2, 6)).measure(torch.ones(2, 3, 2)), r"measures examples of shape \(6,\), got"),
        (lambda: Matrix(torch.ones(2, 6)).replace(torch.ones(3, 6), torch.ones(2, 2)), r"\(3, 2\).*got \(2, 2\)"),
        (lambda: PosteriorMatching(gaussian(VP()), Gray(), torch.ones(1), noise=-1.0), "noise >= 0"),
        (lambda: PosteriorMatching(gaussian(VP()), Gray(), torch.ones(1), iterations=0), "iterations >= 1"),
        (
            lambda: PosteriorMatching(gaussian(Flow(), 2), Mask(torch.ones(2)), torch.ones(1, 2)).x0(
                torch.ones(2, 2, dtype=torch.float64), 1.0
            ),
            "nothing of the data is left at t = 1 under Flow.*LogUniform or Karras",
        ),
        (
            lambda: PosteriorMatching(gaussian(VP(), 2), Mask(torch.ones(2)), torch.ones(3, 2)).x0(
                torch.ones(2, 2, dtype=torch.float64), 0.5
            ),
            r"got \(3, 2\)",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


DATA_MEAN, DATA_ROOT = randn(5), 0.5 * randn(5, 5)
COVARIANCE = DATA_ROOT @ DATA_ROOT.T + 0.05 * torch.eye(5, dtype=torch.float64)


def data(process):
    return GaussianMixtureDenoiser(process, DATA_MEAN[None], COVARIANCE[None])


def conditional(process, matrix, y, noise):
    """Denoiser of p(x_0 | y) for each row of ``y``: the data conditioned first, in closed form."""
    gain = (
        COVARIANCE
        @ matrix.T
        @ torch.linalg.pinv(matrix @ COVARIANCE @ matrix.T + noise**2 * torch.eye(len(matrix), dtype=torch.float64))
    )
    covariance = COVARIANCE - gain @ matrix @ COVARIANCE
    covariance = 0.5 * (covariance + covariance.T)
    return [
        GaussianMixtureDenoiser(process, (DATA_MEAN + gain @ (row - matrix @ DATA_MEAN))[None], covariance[None])
        for row in y
    ]


every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@every_process
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("t", [0.02, 0.5, 0.9])
def test_gaussian_data_are_conditioned_exactly(process, noise, t):
    matrix = randn(3, 5)
    y = randn(6, 3)
    level = process.level(t)
    x = level.alpha * DATA_MEAN + torch.sqrt(level.alpha**2 + level.sigma**2) * randn(6, 5)
    matched = PosteriorMatching(data(process), Matrix(matrix), y, noise, iterations=3)
    exact = conditional(process, matrix, y, noise)
    for quantity in ("x0", "noise", "score", "velocity"):
        found = getattr(matched, quantity)(x, t)
        expected = torch.cat([getattr(part, quantity)(x[i : i + 1], t) for i, part in enumerate(exact)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(1 + expected.abs().max()))
    # Fewer iterations than numbers in y are an approximation, which a measurement without noise still satisfies.
    if not noise:
        rough = PosteriorMatching(data(process), Matrix(matrix), y, iterations=1).x0(x, t)
        torch.testing.assert_close(rough @ matrix.T, y)
        assert t < 0.5 or float((rough - matched.x0(x, t)).abs().max()) > 1e-3
    # More change nothing.
    more = PosteriorMatching(data(process), Matrix(matrix), y, noise, iterations=9).x0(x, t)
    torch.testing.assert_close(more, matched.x0(x, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_times_of_single_rows_and_one_measurement_for_all(noise):
    process, matrix, y = VP(), randn(2, 5), randn(1, 2)
    matched = PosteriorMatching(data(process), Matrix(matrix), y, noise, iterations=2)
    x, t = randn(4, 5), torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    (exact,) = conditional(process, matrix, y, noise)
    torch.testing.assert_close(matched.x0(x, t), exact.x0(x, t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_what_no_example_could_measure_is_left_aside(noise):
    """Repeated rows of a matrix, and values where a mask knows nothing, mislead no iteration."""
    process = VP()
    x, y, known = randn(6, 5), randn(6, 5), torch.tensor([True, False, True, False, False])
    whole = PosteriorMatching(data(process), Mask(known), y, noise, iterations=2)
    torch.testing.assert_close(
        whole.x0(x, 0.4), PosteriorMatching(data(process), Mask(known), torch.where(known, y, 0.0), noise, 2).x0(x, 0.4)
    )
    exact = conditional(process, torch.eye(5, dtype=torch.float64)[known], y[:, known], noise)
    expected = torch.cat([part.x0(x[i : i + 1], 0.4) for i, part in enumerate(exact)])
    torch.testing.assert_close(whole.x0(x, 0.4), expected, rtol=1e-6, atol=1e-6)
    row, values = randn(1, 5), randn(6, 2)
    twice = PosteriorMatching(data(process), Matrix(torch.cat([row, row])), values, noise, iterations=2)
    # Two measurements of one number are their mean, with 1 / sqrt(2) of the noise.
    exact = conditional(process, row, values.mean(1, keepdim=True), noise / math.sqrt(2.0))
    expected = torch.cat([part.x0(x[i : i + 1], 0.4) for i, part in enumerate(exact)])
    torch.testing.assert_close(twice.x0(x, 0.4), expected, rtol=1e-6, atol=1e-6)


def two_pixels(process):
    covariance = 0.25 * torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    return GaussianMixtureDenoiser(process, torch.zeros(1, 2), covariance)


def samplers(name):
    sde = UniformTime(LAST_TIME[name])
    return {
        "DPM++2M": Sampler(DPMpp2M(), 20, LogUniform()),
        "Heun": Sampler(Heun(), 40),
        "Euler-Maruyama": Sampler(EulerMaruyama(), 200, sde),
        "reverse diffusion": Sampler(ReverseDiffusion(), 200, sde, finish="mean"),
        "ODE": ODESampler(),
    }


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("kind", ["DPM++2M", "Heun", "Euler-Maruyama", "reverse diffusion", "ODE"])
def test_two_pixels_have_no_bias(name, kind):
    """score_sde.md 2.6: exact mean 0.54 and sd 0.218, where overwriting gives 0.37 and 0.28 (test_known.py)."""
    known = PosteriorMatching(two_pixels(SDES[name]), Mask(torch.tensor([1, 0])), torch.tensor([[0.6, 0.0]]))
    # 8000 samples: standard errors 0.0024 and 0.0017.
    x = samplers(name)[kind](known, (8000, 2), Draw(1))
    print(name, kind, x.mean(0), x.std(0))
    assert float(x[:, 1].mean()) == pytest.approx(0.54, abs=0.01)
    assert float(x[:, 1].std()) == pytest.approx(0.218, abs=0.01)
    if kind != "reverse diffusion":
        assert torch.equal(x[:, 0], torch.full((8000,), 0.6))


@pytest.mark.parametrize("process", [Flow(), Cosine()], ids=["flow", "cosine"])
def test_processes_that_end_in_pure_noise_are_sampled_from_just_before(process):
    known = PosteriorMatching(two_pixels(process), Mask(torch.tensor([1, 0])), torch.tensor([[0.6, 0.0]]))
    x = Sampler(DPMpp2M(), 20, LogUniform())(known, (8000, 2), Draw(1))
    assert float(x[:, 1].mean()) == pytest.approx(0.54, abs=0.01)
    assert float(x[:, 1].std()) == pytest.approx(0.218, abs=0.01)


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_samples_of_a_noisy_measurement_have_the_posteriors_law(noise):
    matrix, y = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([[0.4]])
    process = VP()
    x = Sampler(DPMpp2M(), 30, LogUniform())(
        PosteriorMatching(two_pixels(process), Matrix(matrix), y, noise, 1), (8000, 2), Draw(1)
    )
    covariance = 0.25 * torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    gain = covariance @ matrix.T / (matrix @ covariance @ matrix.T + noise**2)
    expected = covariance - gain @ matrix @ covariance
    torch.testing.assert_close(x.mean(0).double(), (gain * 0.4)[:, 0], rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(x.T).double(), expected, rtol=0.06, atol=0.002)


def test_colours_of_gray_pictures():
    """Each pixel a Gaussian with correlated channels: the gray is kept, the colours have their conditional law."""
    covariance = torch.tensor([[1.0, 0.6, 0.2], [0.6, 1.0, 0.5], [0.2, 0.5, 1.0]]) / 9
    means = torch.tensor([[0.2, 0.0, -0.1]])
    denoiser = GaussianMixtureDenoiser(VP(), means, covariance[None])
    y = torch.full((1, 1, 1, 1), 0.3)
    x = Sampler(DPMpp2M(), 20, LogUniform())(PosteriorMatching(denoiser, Gray(), y, 0.0, 1), (8000, 3, 1, 1), Draw(1))
    torch.testing.assert_close(x.mean(1), torch.full((8000, 1, 1), 0.3), rtol=0, atol=1e-6)
    row = torch.full((1, 3), 1 / 3)
    gain = covariance @ row.T / (row @ covariance @ row.T)
    torch.testing.assert_close(
        x.mean(0).flatten(), means[0] + gain[:, 0] * (0.3 - float(means.mean())), rtol=0, atol=0.01
    )
    found, expected = torch.cov(x.flatten(1).T), covariance - gain @ row @ covariance
    torch.testing.assert_close(found, expected, rtol=0.08, atol=0.003)


class Costly(BaseDenoiser):
    """x_0 = x / 2, two evaluations at a time; counts how often it is asked."""

    cost = 2
    conditions = ("label",)
    classes = 3

    def __init__(self):
        super().__init__(VP())
        self.calls: list[dict] = []

    def x0(self, x, t, **conditions):
        self.calls.append(conditions)
        return 0.5 * x


def test_cost_and_conditions():
    denoiser = Costly()
    matched = PosteriorMatching(denoiser, Mask(torch.tensor([1, 0])), torch.ones(1, 2), iterations=4)
    assert (matched.conditions, matched.classes) == (("label",), 3)
    label = torch.tensor([1, 2, 0])
    matched.x0(torch.ones(3, 2), 0.5, label=label)
    # The network runs once, and four times backwards.
    assert len(denoiser.calls) == 1
    assert torch.equal(denoiser.calls[0]["label"], label)
    assert matched.cost == 2 * (1 + 4)
    sampler = Sampler(Heun(), 5)
    sampler(matched, (3, 2), Draw(0), label=label)
    assert sampler.evaluations == 9 * 10


def test_inference_mode_and_gradients():
    known = PosteriorMatching(two_pixels(VP()), Mask(torch.tensor([1, 0])), torch.tensor([[0.6, 0.0]]))
    x = torch.randn(3, 2, generator=GENERATOR)
    plain = known.x0(x, 0.5)
    assert not plain.requires_grad
    with torch.inference_mode():
        inside = known.x0(x.clone(), 0.5)
        assert Sampler(Heun(), 3)(known, (2, 2), Draw(0)).isfinite().all()
    torch.testing.assert_close(inside, plain)
    # A caller who wants gradients has them: for Gaussian data x_0 is affine in x.
    leaf = x.clone().requires_grad_()
    known.x0(leaf, 0.5)[:, 1].sum().backward()
    shifted = known.x0(x + torch.tensor([0.0, 1e-2]), 0.5) - plain
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, 1], 100 * shifted[:, 1], rtol=1e-3, atol=1e-4)


def test_guidance_by_a_class_goes_inside():
    """Its rows are asked twice, so measurements of each example belong around it."""
    label, y = torch.tensor([0, 1]), torch.ones(2, 2)
    inside = PosteriorMatching(ClassifierFree(Costly()), Mask(torch.tensor([1, 0])), y)
    assert torch.equal(inside.x0(torch.zeros(2, 2), 0.5, label=label)[:, 0], torch.ones(2))
    with pytest.raises(ValueError, match=r"\(4, 2\).*got \(2, 2\)"):
        ClassifierFree(PosteriorMatching(Costly(), Mask(torch.tensor([1, 0])), y)).x0(
            torch.zeros(2, 2), 0.5, label=label
        )


@every_process
def test_nothing_breaks_where_nothing_is_left_to_say(process):
    """A point of data (no covariance), and a measurement that the estimate already has."""
    mask, y = Mask(torch.tensor([1, 0])), torch.tensor([[0.6, 0.0]])
    point = GaussianMixtureDenoiser(process, torch.tensor([[0.3, -0.2]]), torch.zeros(1, 2, 2))
    found = PosteriorMatching(point, mask, y).x0(torch.ones(3, 2), 0.3)
    torch.testing.assert_close(found, torch.tensor([[0.6, -0.2]]).expand(3, 2))
    same = PosteriorMatching(two_pixels(process), mask, torch.zeros(1, 2), noise=0.1).x0(torch.zeros(3, 2), 0.3)
    assert torch.equal(same, torch.zeros(3, 2))
    for tiny in (1e-6, process.t_min + 1e-6):
        near = PosteriorMatching(two_pixels(VE(0.01, 50.0)), mask, y).x0(torch.ones(3, 2), tiny)
        assert near.isfinite().all()
