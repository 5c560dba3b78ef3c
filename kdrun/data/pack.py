"""Several examples to a row, so that short ones do not leave rows half empty.

A packed row carries ``position_ids`` that start anew with each example. transformers reads from
them which tokens belong together and lets attention look at no others; `kdrun.models.packing`
checks that a model does so. The first token of an example is no target, as it is none at the start
of a row: nothing is learned across a seam.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from kdrun.data.collate import IGNORE_INDEX
from kdrun.data.encoding import Example


class PackedExample(Example):
    """A row of several examples."""

    position_ids: list[int]


def pack(examples: Sequence[Example], max_length: int) -> list[PackedExample]:
    """Put examples together into rows; see :func:`arrange`.

    Returns:
        Rows that hold every example once.
    """
    rows = arrange(examples, max_length)
    return [join([examples[number] for number in row]) for row in rows]


def arrange(examples: Sequence[Example], max_length: int) -> list[list[int]]:
    """Decide which examples go into a row together.

    The longest go first, each into the row where it leaves the least room, so that the result
    follows from the lengths alone.

    Args:
        examples: none is longer than `max_length`.
        max_length: the most tokens in a row.

    Returns:
        For each row the numbers of its examples.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each row, and which one it is, ascending
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[number], 0))
        left, row = room.pop(place) if place < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        insort(room, (left - lengths[number], row))
    return rows


def join(examples: Sequence[Example]) -> PackedExample:
    """One row of several examples, in their order."""
    joined = PackedExample(input_ids=[], labels=[], position_ids=[])
    for example in examples:
        joined["input_ids"] += example["input_ids"]
        joined["labels"] += [IGNORE_INDEX, *example["labels"][1:]]
        joined["position_ids"] += range(len(example["input_ids"]))
    return joined
