"""Adds to datasets' rows: several in one, so that short ones do not leave batches half empty.

A packed row has ``position_ids`` that restart with each example. From them, transformers infers
which tokens belong together and restricts attention to these; `kdrun.models.packing` checks that a
model does so. The first token of an example is not a target, as at the start of an unpacked row,
so nothing is learned across examples.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired

from kdrun.data.collate import IGNORE_INDEX, TEACHER, teacher_side
from kdrun.data.encoding import Example
from kdrun.data.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np


class PackedExample(Example):
    """A row of several examples."""

    position_ids: list[int]
    teacher_position_ids: NotRequired[list[int]]


def pack(examples: Sequence[Example], max_length: int) -> Packed:
    """Pack examples into rows; see :func:`arrange`.

    Returns:
        Rows that contain every example once.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    return Packed(examples, arrange(lengths, max_length))


class Packed(Lazy[PackedExample]):
    """Rows of several examples, joined when they are looked at.

    Args:
        examples: the examples.
        members: for each row the numbers of its examples.
    """

    def __init__(self, examples: Sequence[Example], members: Sequence[Sequence[int]]) -> None:
        self._examples, self._members = examples, members

    def __len__(self) -> int:
        return len(self._members)

    def element(self, number: int) -> PackedExample:
        """Return one row."""
        return join([self._examples[member] for member in self._members[number]])


class Members(Lazy[Sequence[int]]):
    """The numbers of each row's examples, in two arrays.

    Args:
        rows: number of the row of each example.
        placed: numbers of the examples, in the order in which they were placed.
    """

    def __init__(self, rows: np.ndarray, placed: np.ndarray) -> None:
        import numpy as np

        by_row = np.argsort(rows[placed], kind="stable")
        self._numbers = placed[by_row]
        self._stops = np.concatenate([[0], np.cumsum(np.bincount(rows))])

    def __len__(self) -> int:
        return len(self._stops) - 1

    def element(self, number: int) -> list[int]:
        """Return the numbers of one row's examples."""
        found: list[int] = self._numbers[self._stops[number] : self._stops[number + 1]].tolist()
        return found


def arrange(lengths: Sequence[int] | np.ndarray, max_length: int) -> Members:
    """Choose which examples share a row.

    The longest are placed first, each in the row where it leaves the least room, so that the result
    depends only on the lengths.

    Args:
        lengths: of the examples, at most `max_length`.
        max_length: maximum number of tokens in a row.

    Returns:
        For each row the numbers of its examples.
    """
    import numpy as np

    given = np.asarray(lengths)
    placed = np.argsort(-given, kind="stable")
    rows = np.empty(len(given), np.int64)
    free: list[list[int]] = [[] for _ in range(max_length + 1)]  # rows by their room, as heaps
    rooms, count = 0, 0  # the rooms that some row has, as bits
    for number in placed.tolist():
        length = int(given[number])
        wide_enough = rooms >> length
        if wide_enough:
            room = length + (wide_enough & -wide_enough).bit_length() - 1
            row = heapq.heappop(free[room])
            if not free[room]:
                rooms &= ~(1 << room)
        else:
            room, row, count = max_length, count, count + 1
        rows[number] = row
        heapq.heappush(free[room - length], row)
        rooms |= 1 << (room - length)
    return Members(rows, placed)


def join(examples: Sequence[Example]) -> PackedExample:
    """Build one row from several examples, in order, on both sides if the teacher has its own."""
    ids, labels, positions = _joined(examples)
    joined = PackedExample(input_ids=ids, labels=labels, position_ids=positions)
    if any(f"{TEACHER}input_ids" in example for example in examples):
        seen = _joined([teacher_side(example) for example in examples])
        joined["teacher_input_ids"], joined["teacher_labels"] = seen[:2]
        joined["teacher_position_ids"] = seen[2]
    return joined


def _joined(examples: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int], list[int]]:
    """Return tokens, labels and positions of one side."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in examples:
        ids += example["input_ids"]
        labels += [IGNORE_INDEX, *example["labels"][1:]]
        positions += range(len(example["input_ids"]))
    return ids, labels, positions
