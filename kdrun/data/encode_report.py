"""Adds to datasets' map: what became of every row, told once, with its share."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdrun.data.encoding import Encoding, Example
from kdrun.data.formats import ChatRow
from kdrun.data.lost import CONSEQUENCES
from kdrun.data.records import Position
from kdrun.data.row_store import Places, Rows
from kdrun.data.rows import BadRow, describe_bad_rows, name_positions
from kdrun.data.turn_ends import special_tokens
from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodeReport:
    """Report on encoded rows.

    Attributes:
        rows: Number of rows.
        kept: Number of rows that became examples.
        skipped: The other rows, with the reason.
        cut: The rows whose end did not fit.
        lost: The rows of each kind of loss in the chat template.
        controls: The rows whose text contains a control token of the tokenizer.
        control: The first such token.
        tokens: Number of tokens in all examples.
        supervised_tokens: Number of targets among them.
        rendered: Whether the rows were already rendered.
        rewritten: The rows of which the teacher's rendering has other answer tokens.
    """

    rows: int
    kept: int
    skipped: tuple[BadRow, ...]
    cut: Sequence[Position]
    lost: Mapping[str, Sequence[Position]]
    controls: Sequence[Position]
    control: str
    tokens: int
    supervised_tokens: int
    rendered: bool = False
    rewritten: Sequence[Position] = ()

    def warnings(self) -> list[str]:
        """Return one line for each kind of loss, with the numbers of the first five rows."""
        lines = describe_bad_rows(self.skipped, self.rows)
        if self.cut:
            lines.append(
                f"{self.cut[0].file}: cut the end of {len(self.cut)} of {self.rows} rows at "
                f"data.max_length: {name_positions(self.cut)}"
            )
        for kind, found in self.lost.items():
            lines.append(
                f"{found[0].file}: the chat template omits or changes {kind} in {len(found)} "
                f"of {self.rows} rows ({len(found) / self.rows:.0%}): {name_positions(found)}: "
                f"{CONSEQUENCES[kind]}"
            )
        if self.rewritten:
            lines.append(
                f"{self.rewritten[0].file}: the teacher's rendering writes the answers of "
                f"{len(self.rewritten)} of {self.rows} rows with other tokens: "
                f"{name_positions(self.rewritten)}; the teacher reads the student's"
            )
        if self.controls and not self.rendered:
            lines.append(
                f"{self.controls[0].file}: the text of {len(self.controls)} of {self.rows} rows "
                f"contains control tokens of the tokenizer, such as {self.control!r}: "
                f"{name_positions(self.controls)}; if the rows are already rendered, set "
                "data.rendered=true to concatenate them unchanged"
            )
        return lines


@dataclass(frozen=True)
class EncodedRows:
    """Examples, in the order of the rows, and the report on them."""

    examples: Sequence[Example]
    report: EncodeReport


def report_on(
    rows: Sequence[ChatRow],
    encoding: Encoding,
    max_length: int,
    rendered: bool = False,
    strict: bool = False,
    part: str = "",
) -> EncodedRows:
    """Report the rows that were skipped, cut, or not written in full by the chat template.

    Args:
        rows: The encoded rows.
        encoding: The result of `encode`.
        max_length: Its maximum length.
        rendered: Whether the rows were already rendered, so that they may contain control tokens.
        strict: Refuse the first row that the chat template rejects or does not write in full;
            rows that are too long are no errors.
        part: Kind of rows, such as ``held-out``.

    Raises:
        InputError: No row remains, or with ``strict`` one is incomplete.
    """
    examples = encoding.examples
    skipped = [BadRow(rows[number].position, reason) for number, reason in encoding.skipped]
    if strict:
        _refuse_losses(rows, encoding, max_length)
    if not examples:
        raise _nothing_left(skipped, encoding.shortest, max_length, f"{part} " if part else "")
    lost: dict[str, list[int]] = defaultdict(list)
    for number, kind in encoding.lost:
        lost[kind].append(number)
    report = EncodeReport(
        rows=len(rows),
        kept=len(examples),
        skipped=tuple(skipped),
        cut=_places(rows, encoding.cut),
        lost={kind: _places(rows, found) for kind, found in lost.items()},
        controls=_places(rows, [number for number, _ in encoding.controls]),
        control=encoding.controls[0][1] if encoding.controls else "",
        tokens=encoding.tokens,
        supervised_tokens=encoding.supervised,
        rendered=rendered,
        rewritten=_places(rows, encoding.rewritten),
    )
    return EncodedRows(examples, report)


def _places(rows: Sequence[ChatRow], numbers: Sequence[int]) -> Sequence[Position]:
    """Return the positions of rows; those of a store are read when they are needed."""
    if isinstance(rows, Rows):
        return Places(rows, numbers)
    return tuple(rows[number].position for number in numbers)


def find_controls(
    rows: Sequence[ChatRow], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, str]]:
    """Return rows whose own text contains control tokens of the tokenizer."""
    tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
    if not tokens:
        return []
    pattern = re.compile("|".join(map(re.escape, tokens)))
    found = []
    for number, row in enumerate(rows):
        hits = (pattern.search(message.content) for message in row.messages)
        first = next((hit for hit in hits if hit is not None), None)
        if first is not None:
            found.append((number, first[0]))
    return found


def _refuse_losses(rows: Sequence[ChatRow], encoding: Encoding, max_length: int) -> None:
    too_large = (too_long(max_length), no_room(max_length))
    found = [
        (number, reason)
        for number, reason in encoding.skipped
        if reason not in too_large and not _too_large_for_teacher(reason)
    ]
    found += [(number, f"loses {kind} in the chat template") for number, kind in encoding.lost]
    if found:
        number, reason = min(found)
        raise InputError(
            f"{rows[number].position}: the row {reason}; fix the row or the template, or "
            "set data.strict=false"
        )


def _nothing_left(
    skipped: Sequence[BadRow], shortest: tuple[int, ...] | None, max_length: int, part: str
) -> InputError:
    if not skipped:
        return InputError("there are no rows to encode")
    if shortest is None:
        return InputError(
            f"{skipped[0].position}: none of the {len(skipped)} {part}rows can be used; "
            f"this one {skipped[0].reason}"
        )
    of_teacher = next((row for row in skipped if _too_large_for_teacher(row.reason)), None)
    if of_teacher is not None:
        return InputError(
            f"{of_teacher.position}: none of the {len(skipped)} {part}rows can be used; this one "
            f"{of_teacher.reason}; raise data.teacher_max_length"
        )
    start = f"{skipped[0].position.file}: data.max_length={max_length}: all {len(skipped)} {part}"
    if any(row.reason == too_long(max_length) for row in skipped):
        return InputError(
            f"{start}rows are skipped, since none fits (the shortest has {shortest[1]} tokens); "
            "raise it, or set data.long_rows=cut"
        )
    return InputError(
        f"{start}rows are skipped, since no prompt leaves room for an answer (the shortest has "
        f"{shortest[0]} tokens); raise it"
    )


def _too_large_for_teacher(reason: str) -> bool:
    number = re.search(r"\d+", reason)
    size = int(number[0]) if number else 0
    return reason in (too_long_for_teacher(size), no_room_for_teacher(size))


def no_room(max_length: int) -> str:
    """Return the reason for skipping a row whose prompt fills the maximum length."""
    return f"has a prompt that leaves no room for an answer in {max_length} tokens"


def too_long(max_length: int) -> str:
    """Return the reason for skipping a row with ``data.long_rows=skip``."""
    return f"has more than {max_length} tokens"


def no_room_for_teacher(max_length: int) -> str:
    """Return the reason for skipping a row whose prompt for the teacher fills its length."""
    return f"has a prompt for the teacher that leaves no room for an answer in {max_length} tokens"


def too_long_for_teacher(max_length: int) -> str:
    """Return the reason for skipping what the teacher would have to cut."""
    return f"has more than {max_length} tokens for the teacher (data.teacher_max_length)"
