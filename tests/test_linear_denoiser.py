"""LinearPreconditioning: exact for Gaussian data, EDM's for equal variances, and blind to nothing in between."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn

from lightning_sgm.callbacks import EMA
from lightning_sgm.denoiser import Denoiser, EDMPreconditioning, GaussianMixtureDenoiser
from lightning_sgm.linear_denoiser import LinearDenoiser, LinearPreconditioning, Moments
from lightning_sgm.methods import ScoreSDE
from lightning_sgm.networks.base import Network
from lightning_sgm.objectives import LogNormalRatio, OutputWeight, PopulationObjective
from lightning_sgm.processes import EDM, VP, Cosine, CosineChain
from lightning_sgm.random import Draw
from lightning_sgm.samplers import DPMpp2M, Euler, Karras, Sampler
from tests.callbacks.tiny import trainer
from tests.methods.series_models import data, model, moments

SHAPE, SIZE = (4, 2), 8
PROCESSES = {"EDM": EDM(0.002, 80.0), "VP": VP(), "cosine": Cosine()}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
times = st.floats(1e-4, 1.0)
BASIS = torch.linalg.qr(Draw(1).normal((SIZE, SIZE), torch.float64)).Q
MEAN = Draw(2).normal((SIZE,), torch.float64)
VARIANCES = torch.logspace(-6, 0, SIZE, dtype=torch.float64)  # a million apart


class Zero(Network):
    """Corrects nothing."""

    def forward(self, x, label, /):
        return torch.zeros_like(x)


class Wavy(Network):
    """Any function of state and label; remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(Draw(3).normal((SIZE, SIZE), torch.float64))
        self.shown = torch.empty(0)

    def forward(self, x, label, /):
        self.shown = x.detach().clone()
        mixed = torch.sin(x.flatten(1) @ self.weight.to(x) + label.to(x)[:, None] / 100)
        return mixed.view(x.shape)


def covariance(variances=VARIANCES):
    return BASIS @ torch.diag(variances) @ BASIS.T


def denoiser(process, network=None, variances=VARIANCES, mean=MEAN, label: Any = None):
    known = moments(mean, BASIS, variances, SHAPE)
    return LinearDenoiser(network or Zero(), process, LinearPreconditioning(label=label), known)


def states(process, t, rows=5, dtype=torch.float64, seed=0):
    """x_t of Gaussian data."""
    level = process.level(torch.as_tensor(t, dtype=torch.float64))
    draw = Draw(seed)
    x0 = MEAN + draw.normal((rows, SIZE), torch.float64) * VARIANCES.sqrt() @ BASIS.T
    x = process.perturb(x0, level, draw.normal((rows, SIZE), torch.float64))
    return x.view(rows, *SHAPE).to(dtype)


# What it says.


@every_process
@settings(max_examples=20)
@given(times, st.integers(0, 100))
def test_without_a_correction_it_is_the_exact_posterior_mean_of_gaussian_data(process, t, seed):
    x = states(process, t, seed=seed)
    exact = GaussianMixtureDenoiser(process, MEAN[None], covariance()[None])
    found, expected = denoiser(process).x0(x, t), exact.x0(x, t)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # A time for each row, and in single precision.
    rows = torch.full((5,), t, dtype=torch.float64)
    torch.testing.assert_close(denoiser(process).x0(x, rows), found, rtol=0, atol=1e-12)
    single = denoiser(process).x0(x.float(), t)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5)


@every_process
def test_it_is_exact_in_units_of_what_is_left_open(process):
    """1e-6 of the data's spread would hide the directions of small variance."""
    for t in (1e-3, 0.1, 0.4, 0.8):
        x, level = states(process, t), process.level(torch.tensor(t, dtype=torch.float64))
        total = level.alpha**2 * VARIANCES + level.sigma**2
        open_ = (VARIANCES / total).sqrt() * level.sigma
        gain = level.alpha * VARIANCES / total
        expected = MEAN + ((x.flatten(1) - level.alpha * MEAN) @ BASIS * gain) @ BASIS.T
        error = ((denoiser(process).x0(x, t).flatten(1) - expected) @ BASIS / open_).abs().max()
        assert float(error) < 1e-6


@every_process
@settings(max_examples=20)
@given(times, st.floats(0.05, 3.0))
def test_with_equal_variances_it_is_the_preconditioning_of_edm(process, t, spread):
    linear = denoiser(process, Wavy(), torch.full((SIZE,), spread**2).double(), torch.zeros(SIZE).double(), "log_ratio")
    edm = Denoiser(linear.network, process, EDMPreconditioning(spread))
    x = 2.0 * states(process, t)
    found, expected = linear.x0(x, t), edm.x0(x, t)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, denoiser(process).x0(x, t), atol=1e-3)
    level = process.level(torch.full((5,), t, dtype=torch.float64))
    one, other = linear.in_output(x, level) @ BASIS.T, edm.in_output(x, level).flatten(1)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


@every_process
@settings(max_examples=20)
@given(times)
def test_what_the_network_is_shown_has_unit_variance_in_every_direction(process, t):
    """Cov(x_t) is the sum of the outer products of these states less the mean, so what is shown has covariance 1."""
    level = process.level(torch.tensor(t, dtype=torch.float64))
    roots = (level.alpha**2 * VARIANCES + level.sigma**2).sqrt()
    x = level.alpha * MEAN + roots[:, None] * BASIS.T
    network = Wavy()
    denoiser(process, network).x0(x.view(SIZE, *SHAPE), t)
    torch.testing.assert_close(network.shown.flatten(1), BASIS.T, rtol=0, atol=1e-7)


@every_process
@settings(max_examples=20)
@given(times)
def test_the_correction_counts_in_units_of_the_error(process, t):
    level = process.level(torch.full((5,), t, dtype=torch.float64))
    x, network = states(process, t), Wavy()
    with_, without = denoiser(process, network), denoiser(process)
    difference = with_.x0(x, t) - without.x0(x, t)
    output = network(network.shown, torch.full((5,), 999.0 * t)).flatten(1)
    torch.testing.assert_close(with_.in_output(difference, level), output @ BASIS, rtol=1e-5, atol=1e-5)


# Directions without variance.

DEAD = torch.cat([torch.zeros(3).double(), VARIANCES[3:]])


@every_process
def test_errors_are_averaged_over_the_directions_that_data_have(process):
    level = process.level(torch.linspace(0.01, 0.9, 6, dtype=torch.float64))
    error = Draw(5).normal((6, *SHAPE), torch.float64)
    linear = denoiser(process, variances=DEAD)
    found = linear.in_output(error, level)
    assert found.shape == (6, SIZE)
    assert (found[:, :3] == 0).all()
    total = level.alpha[:, None] ** 2 * DEAD + level.sigma[:, None] ** 2
    scale2 = DEAD * level.sigma[:, None] ** 2 / total
    expected = ((error.flatten(1) @ BASIS) ** 2)[:, 3:] / scale2[:, 3:]
    torch.testing.assert_close(found.square().mean(1), expected.mean(1), rtol=1e-8, atol=0)
    assert linear.in_output(error.float(), level).dtype == torch.float32


@every_process
@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1.0])
def test_without_variance_x0_is_the_mean_and_gradients_are_finite(process, t):
    network = Wavy()
    linear = denoiser(process, network, DEAD)
    x = states(process, t).requires_grad_()
    found = linear.x0(x, t)
    torch.testing.assert_close(((found - MEAN.view(SHAPE)).flatten(1) @ BASIS)[:, :3], torch.zeros(5, 3).double())
    assert ((found - MEAN.view(SHAPE)).flatten(1) @ BASIS)[:, 3:].abs().min() > 0
    found.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert network.weight.grad is not None
    assert network.weight.grad.isfinite().all()


def test_constant_values_stay_to_the_last_bit():
    """Here the mean is no sum that rounds, and eigenvectors have no traces of others."""
    x = states(VP(), 0.0, rows=50, dtype=torch.float32)
    x[:, 1, 1], x[:, 3, 0] = 0.1, -1e-3
    known = Moments(SHAPE)
    known.fit(x)
    assert int((known.variances == 0).sum()) == 2
    found = LinearDenoiser(Wavy(), VP(), LinearPreconditioning(), known).x0(3 * x.flip(0), 0.4)
    assert (found[:, 1, 1] == x[0, 1, 1]).all()
    assert (found[:, 3, 0] == x[0, 3, 0]).all()
    assert (found[:, 0].std(0) > 0).all()


# Sampling.


@pytest.mark.parametrize(
    ("rule", "steps", "slack"), [(DPMpp2M(), 25, 0.1), (DPMpp2M(), 200, 0.01), (Euler(), 400, 0.03)]
)
@pytest.mark.parametrize("process", [EDM(5e-4, 40.0), VP()], ids=["EDM", "VP"])
def test_samples_without_a_correction_are_of_that_gaussian(process, rule, steps, slack):
    """But for what the grid leaves out and steps round: variances from 1e-4 to 1, at noise levels from 5e-4 on."""
    count, variances = 4000, VARIANCES ** (2 / 3)
    sampler = Sampler(rule, steps=steps, grid=Karras(ratio_min=5e-4))
    linear = denoiser(process, variances=variances)
    found = sampler(linear, (count, *SHAPE), Draw(0, torch.arange(count))).double().flatten(1)
    assert sampler.evaluations == steps
    unit = (found - MEAN) @ BASIS / variances.sqrt()
    assert (unit.mean(0).abs() < 4 / count**0.5 + slack / 2).all()
    error = torch.cov(unit.T) - torch.eye(SIZE).double()
    assert (error.diagonal().abs() < 4 * (2 / count) ** 0.5 + slack).all()
    assert (error - torch.diag(error.diagonal())).abs().max() < 5 / count**0.5


# Precision, files, mistakes.


def test_autocast_leaves_the_linear_part_exact():
    x = states(EDM(), 0.3, dtype=torch.float32)
    expected = denoiser(EDM()).x0(x, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = denoiser(EDM()).x0(x, 0.3)
        error = denoiser(EDM()).in_output(x, EDM().level(torch.full((5,), 0.3)))
        assert (x.flatten(1) @ BASIS.float()).dtype == torch.bfloat16  # what it is kept from
    assert torch.equal(found, expected)
    assert torch.equal(error, denoiser(EDM()).in_output(x, EDM().level(torch.full((5,), 0.3))))


def test_moments_stay_in_double_precision():
    known = moments(MEAN, BASIS, VARIANCES, SHAPE)
    before = {name: value.clone() for name, value in known.state_dict().items()}
    for change in (lambda: known.to(torch.bfloat16), known.half, known.float, lambda: known.to("cpu")):
        change()
        for name, value in known.state_dict().items():
            assert torch.equal(value, before[name]), name
    x = states(VP(), 0.3, dtype=torch.bfloat16)
    found = LinearDenoiser(Zero(), VP(), LinearPreconditioning(), known).x0(x, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), denoiser(VP()).x0(x.double(), 0.3), rtol=0.02, atol=0.02)


def fitted(x):
    known = Moments(SHAPE)
    assert not known.fitted
    known.fit(x)
    assert known.fitted
    return known


@given(st.integers(SIZE + 1, 3000), st.integers(0, 100))
@settings(max_examples=15)
def test_moments_are_those_of_the_examples(count, seed):
    x = states(VP(), 0.0, count, torch.float32, seed)
    known, x = fitted(x), x.double().flatten(1)
    torch.testing.assert_close(known.mean, x.mean(0))
    expected = torch.cov(x.T)
    found = known.basis @ torch.diag(known.variances) @ known.basis.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.diagonal().mean()))
    again = Moments(SHAPE)
    again.load_state_dict(known.state_dict())
    assert again.fitted


@pytest.mark.parametrize("count", [2, 5, SIZE])
def test_few_examples_do_not_show_all_directions(count):
    """Those not seen vary as the least of the others do."""
    x = states(VP(), 0.0, count)
    with pytest.warns(UserWarning, match=f"{count} examples of 8 values do not show their covariance"):
        known = fitted(x)
    expected = torch.cov(x.flatten(1).T)
    found = known.basis @ torch.diag(known.variances) @ known.basis.T
    least = torch.linalg.eigvalsh(expected)[SIZE - count + 1]
    seen = torch.linalg.svd(x.flatten(1) - x.flatten(1).mean(0)).Vh[: count - 1]
    torch.testing.assert_close(found, expected + least * (torch.eye(SIZE).double() - seen.T @ seen))


def test_small_variances_are_none_by_choice():
    x = states(VP(), 0.0, 500)
    counts = []
    for floor in (1e-9, 1e-4, 0.5):
        known = Moments(SHAPE, floor)
        known.fit(x)
        true = torch.linalg.eigvalsh(torch.cov(x.flatten(1).T))
        assert torch.equal(known.variances > 0, true > floor * true.mean())
        counts.append(int((known.variances > 0).sum()))
    assert counts[0] == SIZE > counts[1] > counts[2] > 0


def test_one_value():
    known = Moments((1, 1))
    known.fit(torch.tensor([[[1.0]], [[3.0]], [[5.0]]]))
    assert known.mean.tolist() == [3.0]
    assert known.variances.tolist() == [4.0]
    found = LinearDenoiser(Zero(), VP(), LinearPreconditioning(), known).x0(torch.zeros(1, 1, 1), 1e-9)
    assert found.shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearPreconditioning(floor=0.0), "floor of LinearPreconditioning must lie strictly between 0 and 1"),
        (lambda: LinearPreconditioning(floor=1.0), "got 1.0"),
        (lambda: LinearPreconditioning(label="when"), "label one of"),  # type: ignore[arg-type]
        (lambda: Moments((8193,)), "at most 8192 values, these have 8193: choose EDMPreconditioning"),
        (
            lambda: Moments(SHAPE).fit(torch.ones(1, *SHAPE)),
            "at least 2 examples, finite and not all the same, which these 1 are not",
        ),
        (lambda: Moments(SHAPE).fit(torch.ones(9, *SHAPE)), "these 9 are not"),
        (lambda: Moments(SHAPE).fit(torch.tensor([0.0, torch.nan]).repeat(4, 4)), "these 4 are not"),
        (lambda: denoiser(VP(), label="index"), "the label index needs a discrete chain, and VP is none"),
        (
            lambda: Denoiser(Zero(), VP(), LinearPreconditioning()),
            "LinearPreconditioning needs a method that learns the covariance .*: choose EDMPreconditioning",
        ),
        (
            lambda: ScoreSDE(Zero(), spec={"shape": [2], "classes": 0}, preconditioning=LinearPreconditioning()),
            "choose EDMPreconditioning",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_most_values_are_allowed_and_indices_are_told_to_networks_of_chains():
    assert not Moments((0,)).fitted
    linear = denoiser(CosineChain(20), Wavy(), label="index")
    assert linear.x0(states(CosineChain(20), 0.5), 0.5).isfinite().all()


def test_nothing_is_said_before_data_are_known():
    linear = LinearDenoiser(Zero(), VP(), LinearPreconditioning(), Moments(SHAPE))
    with pytest.raises(RuntimeError, match="does not know the data yet: fit first, or load a checkpoint"):
        linear.x0(torch.zeros(1, *SHAPE), 0.5)


# Training.


def fine(of, **arguments):
    """As recipes/pad_ts_fine.yaml."""
    return model(
        of.spec,
        process=EDM(5e-4, 40.0),
        preconditioning=LinearPreconditioning(),
        objective=PopulationObjective(LogNormalRatio(-1.8, 2.0), OutputWeight(), population=None),
        sampler=Sampler(DPMpp2M(), steps=4, grid=Karras(ratio_min=5e-4)),
        **arguments,
    )


def test_the_average_of_weights_is_none_of_moments(tmp_path: Path):
    of = data()
    module = fine(of)
    run = trainer(tmp_path, EMA(0.5), max_steps=3, limit_val_batches=1)
    run.fit(module, of)
    known = Moments(module.shape)
    known.fit(of.examples("train", 20000)["x"])
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for name, value in known.state_dict().items():
        assert torch.equal(stored["state_dict"][f"moments.{name}"], value), name
    assert "raw_state" in str(stored.keys()) or "raw_state" in str(stored["callbacks"].keys())
    assert not [name for name in stored.get("raw_state", {}) if "moments" in name]
    assert all(p.isfinite().all() for p in module.parameters())
    assert module.generate(3)["x"].isfinite().all()


def _trained(folder: str, devices: int) -> dict[str, torch.Tensor]:
    of = data(batch_size=8)
    module = fine(of)
    options: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    trainer(Path(folder), max_steps=2, limit_val_batches=1, **options).fit(module, of)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _process(rank: int, folder: str, port: int) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ.update(where)
    torch.save(_trained(folder, 2), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_process, (str(tmp_path), port), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = _trained(str(tmp_path), 1)
    assert one["moments.variances"].any()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        if name.startswith("moments"):
            assert torch.equal(value, alone[name]), name
