"""Pack several examples into a row, so that short ones do not leave rows half empty.

A packed row has ``position_ids`` that restart with each example. From them, transformers infers
which tokens belong together and restricts attention to these; `kdrun.models.packing` checks that a
model does so. The first token of an example is not a target, as at the start of an unpacked row,
so nothing is learned across examples.
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
    """Pack examples into rows; see :func:`arrange`.

    Returns:
        Rows that contain every example once.
    """
    rows = arrange(examples, max_length)
    return [join([examples[number] for number in row]) for row in rows]


def arrange(examples: Sequence[Example], max_length: int) -> list[list[int]]:
    """Choose which examples share a row.

    The longest are placed first, each in the row where it leaves the least room, so that the result
    depends only on the lengths.

    Args:
        examples: examples no longer than `max_length`.
        max_length: maximum number of tokens in a row.

    Returns:
        For each row the numbers of its examples.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each row, ascending
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[number], 0))
        left, row = room.pop(place) if place < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        insort(room, (left - lengths[number], row))
    return rows


def join(examples: Sequence[Example]) -> PackedExample:
    """Build one row from several examples, in order."""
    joined = PackedExample(input_ids=[], labels=[], position_ids=[])
    for example in examples:
        joined["input_ids"] += example["input_ids"]
        joined["labels"] += [IGNORE_INDEX, *example["labels"][1:]]
        joined["position_ids"] += range(len(example["input_ids"]))
    return joined
