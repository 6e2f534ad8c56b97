import importlib.util
import math
from typing import get_args

import pytest
import torch

from lightning_sgm.processes.gaussian import EDM, VE, VP, Flow, SubVP
from lightning_sgm.samplers.evaluation import per_component
from lightning_sgm.samplers.integrators import Course, Integrator, Solver, size
from tests.samplers.exact import MEAN, PROCESSES, STD, ode_map

SOLVERS = get_args(Solver)
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def spiral(position, y):
    """Rows of pairs that turn by one radian and shrink by exp(-0.3) per unit."""
    a, b = y[:, ::2], y[:, 1::2]
    return torch.stack([-b - 0.3 * a, a - 0.3 * b], -1).flatten(1)


def spiral_from(y, distance):
    a, b = y[:, ::2], y[:, 1::2]
    c, s, shrink = math.cos(distance), math.sin(distance), math.exp(-0.3 * distance)
    return shrink * torch.stack([c * a - s * b, s * a + c * b], -1).flatten(1)


BEGIN = torch.tensor([[1.0, 0.0, -0.5, 2.0], [0.3, -0.7, 1.5, 0.1]], dtype=torch.float64)


@every_solver
@pytest.mark.parametrize(("begin", "end"), [(-1.0, 3.0), (3.0, -1.0)], ids=["up", "down"])
def test_a_spiral_in_both_directions(solver, begin, end):
    exact = spiral_from(BEGIN, end - begin)
    errors = []
    for tolerance in (1e-3, 1e-6):
        found = Integrator(solver, tolerance, tolerance)(spiral, BEGIN, begin, end)
        assert found.dtype == torch.float64
        errors.append(float((found - exact).abs().max()))
    assert errors[0] < 0.06
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 20


@every_solver
@pytest.mark.parametrize(("begin", "end"), [(0.0, 2.0), (2.0, 0.0)], ids=["up", "down"])
def test_nothing_is_asked_beyond_the_ends_and_every_step_is_told(solver, begin, end):
    asked, told = [], []

    def slope(position, y):
        asked.append(position)
        return spiral(position, y)

    found = Integrator(solver, 1e-6, 1e-6)(slope, BEGIN, begin, end, lambda position, y: told.append((position, y)))
    assert min(asked) >= 0.0
    assert max(asked) <= 2.0
    places = torch.tensor([begin, *(position for position, _ in told)])
    assert len(told) > 1
    assert ((places.diff() > 0) if end > begin else (places.diff() < 0)).all()
    assert told[-1][0] == end
    assert torch.equal(told[-1][1], found)
    for position, y in told:
        torch.testing.assert_close(y, spiral_from(BEGIN, position - begin), rtol=0, atol=2e-4)


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if not solver.startswith("scipy")])
def test_one_hard_row_among_many_easy_ones_is_as_exact_as_alone(solver):
    """With the mean error over all rows, 400 rows at rest would hide a tolerance 20 times as large in the one."""
    speeds = torch.zeros(400, 1, dtype=torch.float64)
    speeds[7] = 6.0
    counts, errors = [], []
    for speed in (speeds, speeds[7:8]):
        asked = 0

        def slope(position, y, speed=speed):
            nonlocal asked
            asked += 1
            return speed * torch.stack([-y[:, 1], y[:, 0]], 1)

        y = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(len(speed), 1)
        found = Integrator(solver, 1e-5, 1e-5)(slope, y, 0.0, 2.0)[speed[:, 0] > 0][0]
        errors.append(float((found - torch.tensor([math.cos(12.0), math.sin(12.0)])).norm()))
        counts.append(asked)
    assert counts[0] == counts[1]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    assert errors[0] < 2e-3


@every_solver
@pytest.mark.parametrize("kind", ["all", "one row", "infinite", "later"])
def test_answers_that_are_no_numbers_end_the_run(solver, kind):
    def slope(position, y):
        dy = -y
        if kind == "one row":
            dy[1] = math.nan
        elif kind != "later" or position > 0.7:
            dy = dy * (math.inf if kind == "infinite" else math.nan)
        return dy

    with pytest.raises(FloatingPointError, match=r"not finite.*train longer, or sample with a Sampler"):
        Integrator(solver, 1e-5, 1e-5)(slope, BEGIN, 0.0, 1.0)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@every_solver
def test_a_solution_that_does_not_exist_ends_the_run(solver):
    # y' = y^2 from 1 is 1 / (1 - p).
    with pytest.raises(FloatingPointError, match="ODE solver gave up"):
        Integrator(solver, 1e-3, 1e-3)(lambda position, y: y**2, torch.ones(2, 1, dtype=torch.float64), 0.0, 2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Integrator("euler", 1e-5, 1e-5), "solver must be one of dopri5, .*scipy_LSODA, got 'euler'"),  # type: ignore[arg-type]
        (lambda: Integrator("dopri5", 0.0, 1e-5), "rtol and atol"),
        (lambda: Integrator("dopri5", 1e-5, -1.0), "rtol and atol"),
        (lambda: Integrator("dopri5", math.nan, 1e-5), "rtol and atol"),
        (lambda: Course(VP(), 0.0), "no noise is left at t_min = 0.0"),
        (lambda: Course({"a": EDM(), "b": Flow()}, 0.0), "no noise is left"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("solver", "library"), [("dopri5", "torchdiffeq"), ("scipy_RK45", "scipy")])
def test_a_missing_library_is_named(solver, library, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    with pytest.raises(ValueError, match=f"needs {library}: pip install {library}"):
        Integrator(solver, 1e-5, 1e-5)


def course_of(process, t_min):
    return Course(process, t_min)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_positions_are_the_share_of_noise(process):
    course = course_of(process, 1e-3)
    assert torch.equal(course.level(course.begin).t, torch.ones((), dtype=torch.float64))
    assert float(course.level(course.end).t) == 1e-3
    times = []
    for share in torch.linspace(0.02, 0.98, 15).tolist():
        position = course.end + share * (course.begin - course.end)
        level = course.level(position)
        assert math.log(level.sigma / (level.alpha + level.sigma)) == pytest.approx(position, abs=1e-9)
        times.append(float(level.t))
    assert times == sorted(times)
    assert 1e-3 < times[0] < times[-1] < 1.0
    assert float(course_of(process, None).clean.t) == process.t_min


def path(process, t):
    """z of one solution of N(MEAN, STD^2)'s ODE at time t."""
    level, far = process.level(t), process.level(1.0)
    return ode_map(torch.tensor([[1.7], [-0.4]], dtype=torch.float64) * far.sigma, far, level) / size(level)


def posterior_mean(process, t):
    level = process.level(t)
    gain = level.alpha * STD**2 / ((level.alpha * STD) ** 2 + level.sigma**2)
    return MEAN + gain * (size(level) * path(process, t) - level.alpha * MEAN)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_slope_is_that_of_the_exact_solution(process, share):
    course = course_of(process, 1e-4)
    position = course.end + share * (course.begin - course.end)
    level = course.level(position)
    found = course.slope(level, path(process, level.t), posterior_mean(process, level.t))
    ahead, behind = (course.level(position + step).t for step in (1e-4, -1e-4))
    expected = (path(process, ahead) - path(process, behind)) / 2e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lead", [VP(), VE(0.01, 50.0)], ids=["VP first", "VE first"])
def test_components_move_under_the_time_of_the_first(lead):
    processes = {"lead": lead, "other": SubVP(), "flow": Flow()}
    course = course_of(processes, 1e-3)
    position = 0.5 * (course.begin + course.end)
    level = course.level(position)
    t = level["lead"].t
    found = course.slope(
        level,
        per_component(lambda process: path(process, t), processes),
        per_component(lambda process: posterior_mean(process, t), processes),
    )
    ahead, behind = (course.level(position + step)["lead"].t for step in (1e-4, -1e-4))
    for name, process in processes.items():
        expected = (path(process, ahead) - path(process, behind)) / 2e-4
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    assert float(course_of({"vp": VP(), "edm": EDM()}, None).clean["vp"].t) == VP().t_min
