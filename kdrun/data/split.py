"""Holding out rows by the hash of their content, rows of one prompt together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeVar

from kdrun.data.formats import ChatRow, Row, TextRow
from kdrun.data.messages import Message
from kdrun.errors import InputError

_AnyRow = TypeVar("_AnyRow", TextRow, ChatRow, Row)


def content_hash(row: Row) -> str:
    """A hash of what a row says, whatever its file, its place there, or its format."""
    return _hash(row.text if isinstance(row, TextRow) else _contents(row.messages))


def prompt_hash(row: Row) -> str:
    """A hash of all that stands before a row's last answer; of a text, of all of it."""
    return _hash(row.text if isinstance(row, TextRow) else _contents(row.messages[:-1]))


def shared_prompts(train: Sequence[Row], held_out: Sequence[Row]) -> int:
    """Held-out rows that ask what a training row asks too."""
    asked = {prompt_hash(row) for row in train}
    return sum(prompt_hash(row) in asked for row in held_out)


def _contents(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def hold_out(
    rows: Sequence[_AnyRow], fraction: float = 0.05, by: Literal["prompt", "content"] = "prompt"
) -> tuple[list[_AnyRow], list[_AnyRow]]:
    """Split rows into those to train on and those to evaluate on.

    The rows with the smallest hashes are held out. So the order of the rows and the seed of a run
    have no say, and a grown data set keeps most of its held-out rows. Rows that ask the same, all
    before the last answer, go to one side: a prompt that was trained on with another answer would
    flatter the measures. Where all rows ask the same, they are split by their answers.

    Args:
        rows: All rows.
        fraction: The share to hold out; at least one row is, and at least one is not.
        by: ``content`` keeps only equal rows together, as runs of earlier versions did.

    Returns:
        The training rows and the held-out rows, both in the order of `rows`.

    Raises:
        InputError: There are not two rows that differ.
    """
    hashes = [content_hash(row) for row in rows]
    if len(set(hashes)) < 2:
        raise InputError(
            f"{rows[0].position.file if rows else 'the data'}: at least two different rows are "
            "needed to hold some out for evaluation; add rows, or pass --eval-data"
        )
    prompts = [prompt_hash(row) for row in rows]
    groups = prompts if by == "prompt" and len(set(prompts)) > 1 else hashes
    sizes = Counter(groups)
    # A group stands where its first row by content does, so that single rows keep their order.
    place: dict[str, str] = {}
    for group, own in zip(groups, hashes, strict=True):
        place[group] = min(own, place.get(group, own))
    wanted = max(1, round(fraction * len(rows)))
    held_out: set[str] = set()
    number = 0
    for group in sorted(sizes, key=place.__getitem__)[:-1]:
        if number >= wanted:
            break
        held_out.add(group)
        number += sizes[group]
    train = [row for row, group in zip(rows, groups, strict=True) if group not in held_out]
    evaluation = [row for row, group in zip(rows, groups, strict=True) if group in held_out]
    return train, evaluation
