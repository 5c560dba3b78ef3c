"""Hold out rows by the hash of their content, keeping rows with the same prompt together."""

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
    """Hash the content of a row, independent of its file, position and format."""
    return _hash(row.text if isinstance(row, TextRow) else _contents(row.messages))


def prompt_hash(row: Row) -> str:
    """Hash everything before a row's last answer, or all of a text."""
    return _hash(row.text if isinstance(row, TextRow) else _contents(row.messages[:-1]))


def shared_prompts(train: Sequence[Row], held_out: Sequence[Row]) -> int:
    """Return held-out rows with the same prompt as a training row."""
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

    The rows with the smallest hashes are held out. The split is therefore independent of the order
    of rows and the seed, and a data set that grows keeps most of its held-out rows. Rows with the
    same prompt (everything before the last answer) stay on one side: held-out prompts that were
    trained on would flatter the measures. If all prompts are equal, rows are split by answer.

    Args:
        rows: All rows.
        fraction: The share to hold out; at least one row stays on each side.
        by: ``content`` keeps only identical rows together, as earlier versions did.

    Returns:
        The training rows and the held-out rows, both in the order of `rows`.

    Raises:
        InputError: There are no two different rows.
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
    # A group is ordered by its first row's hash, so that single rows keep their order.
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
