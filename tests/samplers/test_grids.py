import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgm.processes.gaussian import EDM, VE, VP, Cosine, Flow
from lightning_sgm.samplers import Karras, LogUniform, UniformTime
from tests.samplers.exact import PROCESSES

GRIDS = {"time": UniformTime(), "log": LogUniform(), "karras": Karras()}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_levels_are_host_scalars_of_the_process_and_decrease_to_t_min(process, grid):
    levels = grid(process, 12)
    assert len(levels) == 13
    for level in levels:
        expected = process.level(level.t)
        assert level.t.dtype == torch.float64
        assert level.t.ndim == 0
        assert level.t.device.type == "cpu"
        assert (level.alpha, level.sigma) == (expected.alpha, expected.sigma)
        assert level.sigma > 0
    times = torch.stack([level.t for level in levels])
    assert (times.diff() < 0).all()
    assert times[0] <= 1.0
    assert times[-1] >= process.t_min


@given(st.floats(1e-3, 0.5), st.floats(1.0, 100.0), st.integers(1, 40))
def test_log_uniform_has_equal_ratios(low, high, steps):
    levels = LogUniform(low, high)(Flow(), steps)
    log_ratio = torch.stack([level.ratio for level in levels]).log()
    expected = torch.linspace(math.log(high), math.log(low), steps + 1, dtype=torch.float64)
    torch.testing.assert_close(log_ratio, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("process", [VP(), VE(0.001, 100.0), Flow()])
def test_karras_is_their_table(process):
    # Karras et al. 2022, eq. 5, with 18 noisy levels.
    steps, rho = 18, 7
    expected = [
        (80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(steps)
    ]
    found = [float(level.ratio) for level in Karras(ratio_max=80.0)(process, steps - 1)]
    assert found == pytest.approx(expected, rel=1e-8)


def test_uniform_time_on_edm_is_karras():
    for a, b in zip(UniformTime()(EDM(), 9), Karras()(EDM(), 9), strict=True):
        assert float(a.sigma) == pytest.approx(float(b.sigma), rel=1e-9)


def test_ratios_are_clamped_to_the_reach_of_the_process():
    levels = LogUniform(1e-4, 1e4)(VE(0.02, 30.0), 5)
    assert float(levels[0].sigma) == pytest.approx(30.0, rel=1e-12)
    assert float(levels[-1].sigma) == pytest.approx(0.02, rel=1e-3)
    with pytest.raises(ValueError, match="no level of VE"):
        LogUniform(100.0, 200.0)(VE(0.02, 30.0), 5)


def test_uniform_time_ends():
    levels = UniformTime(1e-3)(VP(), 4)
    assert [float(level.t) for level in levels] == pytest.approx([1.0, 0.75025, 0.5005, 0.25075, 0.001])


def test_one_level_is_the_noisiest():
    for grid in GRIDS.values():
        assert float(grid(VP(), 0)[0].ratio) == pytest.approx(float(grid(VP(), 7)[0].ratio))


def test_components_share_times():
    processes = {"x": VP(), "adj": VE()}
    for level in LogUniform()(processes, 6):
        assert level["x"].t == level["adj"].t
        assert level["adj"].sigma == VE().sigma(level["x"].t)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformTime(1.0),
        lambda: UniformTime(-0.1),
        lambda: LogUniform(2.0, 1.0),
        lambda: Karras(ratio_min=0.0),
        lambda: Karras(rho=0.0),
    ],
)
def test_bad_values(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("grid", [LogUniform(), Karras()])
def test_grids_start_with_the_prior_where_it_is_finite(grid):
    for process, expected in (
        (VE(0.02, 756.0), 756.0),
        (VP(), 152.17),
        (EDM(), 80.0),
        (Flow(), 80.0),
        (Cosine(), 80.0),
    ):
        assert float(grid(process, 5)[0].ratio) == pytest.approx(expected, rel=1e-4)
