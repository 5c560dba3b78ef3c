"""The plan of packed rows: best fit, longest first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrun.data.pack import Packed, arrange
from kdrun.data.padding import padding_of


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """By trying every row for every example."""
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [room - sum(lengths[i] for i in row) for row in rows]
        fits = [(space, i) for i, space in enumerate(left) if space >= lengths[number]]
        if fits:
            rows[min(fits)[1]].append(number)
        else:
            rows.append([number])
    return rows


@given(st.integers(1, 30).flatmap(lambda m: st.tuples(st.lists(st.integers(1, m)), st.just(m))))
def test_the_plan_is_best_fit(given: tuple[list[int], int]) -> None:
    lengths, room = given
    assert [list(row) for row in arrange(lengths, room)] == best_fit(lengths, room)


def test_rows_are_joined_when_they_are_looked_at() -> None:
    examples = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate((2, 3, 1), 1)]
    packed = Packed(examples, arrange([2, 3, 1], 4))  # type: ignore[arg-type]
    assert len(packed) == 2
    assert packed[0] == {
        "input_ids": [2, 2, 2, 3],
        "labels": [-100, 2, 2, -100],
        "position_ids": [0, 1, 2, 0],
    }
    assert packed[-1]["input_ids"] == [1, 1]


def test_padding_by_hand() -> None:
    """Batches of two of lengths 1, 3 and 4, 4: two of fourteen places are empty."""
    assert padding_of(np.array([1, 3, 4, 4]), 2, np.arange(4)) == pytest.approx(2 / 14)
    assert padding_of(np.array([1, 3, 4]), 2, np.array([1, 0, 2])) == pytest.approx(2 / 10)
