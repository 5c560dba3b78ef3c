"""The adaptive schedule and the buffer, told made-up evaluations."""

from __future__ import annotations

import math

import pytest

from kdrun.procedures.distillm import DistiLLM


def after(evaluations: list[float], procedure: DistiLLM | None = None) -> dict[str, object]:
    procedure = procedure or DistiLLM()
    state = procedure.initial_state()
    for cross_entropy in evaluations:
        procedure.evaluated(state, cross_entropy)
    return state


@pytest.mark.parametrize(
    ("evaluations", "phi", "reference"),
    [
        ([3.0], 0.0, 3.0),
        ([3.0, 3.099], 0.0, 3.0),
        ([3.0, 3.25], 0.1, 3.25),
        ([3.0, 3.5, 3.55, 3.59], 0.1, 3.5),  # small rises do not add up: the reference stands
        ([3.0, 3.05, 3.0625, 3.125], 0.1, 3.125),  # nor does a small rise move it
        ([3.0, 2.0, 3.05], 0.0, 3.0),  # a fall moves nothing
        ([3.0, 3.5, 3.0, 3.5, 4.0], 0.2, 4.0),
    ],
)
def test_phi_rises_with_the_held_out_loss(
    evaluations: list[float], phi: float, reference: float
) -> None:
    state = after(evaluations)
    assert state["phi"] == pytest.approx(phi)
    assert state["reference"] == reference


def test_phi_ends_at_1() -> None:
    assert after([float(number) for number in range(30)])["phi"] == 1.0


@pytest.mark.parametrize("stored", [0, 999, 1000])
def test_each_step_takes_its_rows_from_where_the_draw_says(stored: int) -> None:
    procedure = DistiLLM()
    for phi in (0.0, 0.1, 0.5, 1.0):
        state = {"phi": phi, "buffer": [None] * stored}
        for step in range(10):
            for uniform in (0.0, 0.05, 0.0999, 0.1, 0.3, 0.4999, 0.5, 0.7, 0.999):
                if uniform < phi * (1 - step / 10) or (uniform < phi and stored < 1000):
                    expected = "fresh"
                elif uniform < phi:
                    expected = "buffer"
                else:
                    expected = "data"
                assert procedure.source(state, uniform, step / 10) == expected


def test_a_run_whose_phi_never_rose_says_so() -> None:
    procedure = DistiLLM()
    assert "phi never rose" in procedure.remarks(after([3.0, 2.0, 1.0]))[0]
    assert procedure.remarks(after([3.0, 4.0])) == []
    assert procedure.figures(after([3.0, 4.0])) == {"phi": 0.1, "buffer_rows": 0}


def test_an_evaluation_that_is_not_finite_raises_nothing() -> None:
    assert after([3.0, math.nan])["phi"] == 0.0
