"""Adds to datasets' map: examples beside the reasons for rows without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict


class Example(TypedDict):
    """One row as models receive it."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoding:
    """Examples and other results, by the rows' positions in the list.

    Attributes:
        examples: In the order of the rows.
        skipped: Rows without an example, and why.
        cut: Rows whose end did not fit.
        lost: Rows that the chat template does not write in full, with each kind of loss.
        controls: Rows whose text contains a control token of the tokenizer, and the first one.
        shortest: The fewest tokens before an answer, and the fewest in a row.
        tokens: Number of tokens in all examples.
        supervised: Number of targets among them.
        unknown: Rows left out for a token that only one model knows, and the token.
        reasoning: Rows with reasoning in an answer.
    """

    examples: Sequence[Example]
    skipped: list[tuple[int, str]]
    cut: list[int]
    lost: list[tuple[int, str]]
    controls: list[tuple[int, str]]
    shortest: tuple[int, ...] | None
    tokens: int
    supervised: int
    unknown: list[tuple[int, str]] = field(default_factory=list)
    reasoning: list[int] = field(default_factory=list)
