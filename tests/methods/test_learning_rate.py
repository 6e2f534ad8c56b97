"""What an update multiplies the learning rate by."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgm.methods.learning_rate import check, check_end, factor_of


def never() -> float:
    raise AssertionError("asked before the first update")


def factor(decay: Any, warmup: int = 0, total: float = 100.0, epoch: float = 7.0):
    return factor_of(warmup, decay, lambda: total, lambda: epoch)


@given(st.floats(0.5, 1.0), st.integers(1, 20), st.integers(0, 200))
def test_a_number_multiplies_once_an_epoch(decay: float, epoch: int, update: int):
    assert factor(decay, epoch=epoch)(update) == pytest.approx(decay ** (update // epoch))


def test_one_as_a_whole_number_is_constant_and_an_endless_epoch_never_decays():
    assert [factor(1)(update) for update in (0, 50, 500)] == [1.0, 1.0, 1.0]
    assert factor(0.5, epoch=float("inf"))(10**6) == 1.0


@given(st.sampled_from(["constant", "linear", "cosine", "trapezoid", 0.9]), st.integers(0, 100))
def test_warm_up_multiplies_what_comes_after(decay: Any, update: int):
    assert factor(decay, warmup=40)(update) == pytest.approx(min(1, (update + 1) / 40) * factor(decay)(update))


@pytest.mark.parametrize("decay", ["linear", "cosine", "trapezoid"])
def test_shapes_fall_from_one_to_zero_and_stay_there(decay: Any):
    values = [factor(decay)(update) for update in range(120)]
    assert values[0] == 1.0
    assert all(a >= b for a, b in pairwise(values))
    assert values[100:] == [0.0] * 20
    assert values[50] == pytest.approx(1.0 if decay == "trapezoid" else 0.5)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "trapezoid", 0.9])
def test_the_length_of_the_run_is_not_asked_before_the_first_update(decay: Any):
    """Asking sets up the data, which a resumed run must do where its checkpoint says."""
    assert factor_of(4, decay, never, never)(0) == 0.25


@pytest.mark.parametrize(
    ("warmup", "decay", "message"),
    [
        (-1, "constant", "warmup must be at least 0"),
        (0, 0.0, r"must lie in \(0, 1\], got 0.0"),
        (0, 1.5, r"must lie in \(0, 1\], got 1.5"),
        (0, 2, r"must lie in \(0, 1\], got 2"),
        (0, "cosin", "one of constant, linear, cosine, trapezoid, got 'cosin'"),
    ],
)
def test_what_has_no_meaning_is_refused(warmup: int, decay: Any, message: str):
    with pytest.raises(ValueError, match=message):
        check(warmup, decay)


def test_shapes_need_an_end_and_numbers_do_not():
    for decay in ("constant", 0.9):
        check_end(decay)
    with pytest.raises(ValueError, match=r"cosine needs an end of the run: set trainer.max_steps or"):
        check_end("cosine")
