"""Which prompt a row gives, and what a written answer becomes."""

from __future__ import annotations

import pytest
import torch

from kdrun.data.collate import Collator
from kdrun.data.encoding import Example
from kdrun.procedures.base import ROLLOUT, Origin
from kdrun.procedures.sampling import (
    Sample,
    Sampling,
    collate,
    draw,
    examples_of,
    sample_of,
    shuffled,
    uniforms,
)

N = -100


def row(labels: list[int]) -> Example:
    return Example(input_ids=list(range(10, 10 + len(labels))), labels=labels)


@pytest.mark.parametrize(
    ("labels", "prompt"),
    [
        ([N, N, 12, 13], [10, 11]),
        ([N, 11, N, N, 14, 15, N], [10, 11, 12, 13]),  # the last of two answers
        ([N, N, N], []),
        ([10, 11, 12, 13, 14], [10, 11]),  # a window of text: room for an answer
        ([10, 11, 12], []),
        ([N] * 6 + [16], []),  # 6 and 3 are more than 8
        ([N] * 5 + [15], [10, 11, 12, 13, 14]),
    ],
)
def test_the_prompt_is_what_stands_before_the_last_answer(
    labels: list[int], prompt: list[int]
) -> None:
    assert Sampling(max_new_tokens=3, max_length=8).prompt_of(row(labels)) == prompt


def test_an_answer_is_supervised_to_its_end_and_its_numbers_stand_at_the_shifted_labels() -> None:
    samples = [
        Sample([5, 6, 7], [8, 9, 2], Origin.STUDENT, {"old": [-1.0, -2.0, -3.0]}),
        Sample([5], [], Origin.STUDENT),
        Sample([4], [3, 2], Origin.TEACHER, {"old": [-4.0, -5.0]}),
    ]
    data = row([N, 11])
    batch = collate([*samples, data], pad=2)
    assert batch["labels"].tolist() == [
        [N, N, N, 8, 9, 2],
        [N] * 6,
        [N, 3, 2, N, N, N],
        [N, 11, N, N, N, N],
    ]
    assert batch["attention_mask"].sum(-1).tolist() == [6, 1, 3, 2]
    assert batch[ROLLOUT]["origins"] == (1, 1, 2, 0)
    assert batch[ROLLOUT]["values"]["old"].tolist() == [
        [0, 0, -1, -2, -3, 0],
        [0] * 6,
        [-4, -5, 0, 0, 0, 0],
        [0] * 6,
    ]
    supervised = batch["shift_labels"] != N
    assert (batch[ROLLOUT]["values"]["old"] != 0)[supervised].sum() == 5


def test_rows_come_back_from_a_batch() -> None:
    rows = [row([N, 11, 12]), row([N, N, 12, 13, 14])]
    assert examples_of(Collator(0)(rows)) == rows
    assert sample_of(rows[1], Origin.TEACHER) == Sample([10, 11], [12, 13, 14], Origin.TEACHER)


def test_random_numbers_follow_from_seed_step_and_row() -> None:
    whole = uniforms(1, 2, [0, 1, 2, 3], 5, "answer")
    assert torch.equal(uniforms(1, 2, [2, 3], 5, "answer"), whole[2:])
    for other in ((2, 2, "answer"), (1, 3, "answer"), (1, 2, "other")):
        assert not torch.equal(uniforms(other[0], other[1], [0], 5, other[2]), whole[:1])
    numbers = [draw(0, step, "gkd", 0) for step in range(4000)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert sum(number < 0.3 for number in numbers) / 4000 == pytest.approx(0.3, abs=0.03)
    assert sorted(shuffled(9, 0, 1)) == list(range(9))
    assert shuffled(9, 0, 1) != shuffled(9, 0, 2)
