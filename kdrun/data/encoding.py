"""Adds to datasets' map: examples beside the reasons for rows without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict


class Example(TypedDict):
    """One row as models receive it.

    The teacher's columns are there if it reads another prompt; both sequences have the same
    targets, in the same order.
    """

    input_ids: list[int]
    labels: list[int]
    teacher_input_ids: NotRequired[list[int]]
    teacher_labels: NotRequired[list[int]]


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
        rewritten: Rows of which the teacher's rendering has other answer tokens.
        teacher_tokens: Number of tokens that the teacher reads; 0 if it reads what the student
            reads.
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
    rewritten: list[int] = field(default_factory=list)
    teacher_tokens: int = 0
