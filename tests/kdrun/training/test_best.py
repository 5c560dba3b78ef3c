"""The best evaluation of a run as a function of what was logged."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrun.training.best import Best


def history(values: list[float | None], name: str = "eval_ce") -> list[dict[str, float | None]]:
    lines: list[dict[str, float | None]] = [{"step": 0, name: -100.0}]  # before training
    for number, value in enumerate(values, 1):
        lines += [{"step": 10.0 * number, "loss": 1.0}, {"step": 10.0 * number, name: value}]
    return lines


def test_the_first_of_the_best_counts() -> None:
    assert Best("eval_ce").find(history([3.0, 1.0, 2.0, 1.0])) == (20, 1.0)
    agreement = Best("eval_top1_agreement")
    assert agreement.find(history([0.2, 0.6, 0.6], "eval_top1_agreement")) == (20, 0.6)
    assert Best("eval_ce").find(history([])) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_is_not_finite_is_never_the_best(bad: float | None) -> None:
    assert Best("eval_ce").find(history([bad, 2.0, bad])) == (20, 2.0)


@pytest.mark.parametrize(
    ("values", "patience", "gain", "expected"),
    [
        ([3.0, 2.0, 2.0], 1, 0.0, True),
        ([3.0, 2.0, 2.0], 2, 0.0, False),
        ([3.0, 2.0, 2.1, 2.2], 2, 0.0, True),
        ([3.0, 2.9, 2.8], 2, 0.5, True),  # each is better, none by enough
        ([3.0, 2.9, 2.4], 2, 0.5, False),  # better than the last gain by enough, in two steps
        ([3.0, 2.0, 2.5, 1.5], 2, 0.0, False),
    ],
)
def test_when_training_stops(
    values: list[float | None], patience: int, gain: float, expected: bool
) -> None:
    assert Best("eval_ce", patience, gain).stops(history(values)) is expected


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_no_evaluation_is_better_than_the_best(values: list[float]) -> None:
    found = Best("eval_ce").find(history(list(values)))
    assert found is not None
    assert found[1] == min(values)
    assert values.index(found[1]) == found[0] // 10 - 1
