"""What rows become: examples, and what became of the rows that are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict


class Example(TypedDict):
    """One row as the models see it."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoding:
    """Examples, and what became of the other rows, by the rows' places in the list.

    Attributes:
        examples: In the order of the rows.
        skipped: Rows that became no example, and why.
        cut: Rows whose end did not fit.
        lost: Rows of which the chat template leaves something out, with each kind of loss.
        controls: Rows whose text holds a control token of the tokenizer, and the first such token.
        shortest: The fewest tokens that stand before an answer, and the fewest of a row.
        tokens: Tokens of all examples.
        supervised: Those of them that are targets.
    """

    examples: Sequence[Example]
    skipped: list[tuple[int, str]]
    cut: list[int]
    lost: list[tuple[int, str]]
    controls: list[tuple[int, str]]
    shortest: tuple[int, ...] | None
    tokens: int
    supervised: int
