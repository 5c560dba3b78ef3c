"""Holding out rows by the hash of their content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from kdrun.data.formats import ChatRow, Row, TextRow
from kdrun.errors import InputError

_AnyRow = TypeVar("_AnyRow", TextRow, ChatRow, Row)


def content_hash(row: Row) -> str:
    """A hash of what a row says, whatever its file, its place there, or its format."""
    content: object = (
        row.text
        if isinstance(row, TextRow)
        else [[message.role, message.content] for message in row.messages]
    )
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def hold_out(
    rows: Sequence[_AnyRow], fraction: float = 0.05
) -> tuple[list[_AnyRow], list[_AnyRow]]:
    """Split rows into those to train on and those to evaluate on.

    The rows with the smallest hashes are held out. So the order of the rows and the seed of a run
    have no say, equal rows stay together, and a grown data set keeps most of its held-out rows.

    Args:
        rows: All rows.
        fraction: The share to hold out; at least one row is, and at least one is not.

    Returns:
        The training rows and the held-out rows, both in the order of `rows`.

    Raises:
        InputError: There are not two rows that differ.
    """
    hashes = [content_hash(row) for row in rows]
    counts = Counter(hashes)
    if len(counts) < 2:
        raise InputError(
            f"{rows[0].position.file if rows else 'the data'}: at least two different rows are "
            "needed to hold some out for evaluation; add rows, or give --eval-data"
        )
    wanted = max(1, round(fraction * len(rows)))
    held_out: set[str] = set()
    number = 0
    for key in sorted(counts)[:-1]:
        if number >= wanted:
            break
        held_out.add(key)
        number += counts[key]
    train = [row for row, key in zip(rows, hashes, strict=True) if key not in held_out]
    evaluation = [row for row, key in zip(rows, hashes, strict=True) if key in held_out]
    return train, evaluation
