"""Reading rows: from a file or a hub data set to texts and conversations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrun.data.formats import (
    BadRowError,
    ChatRow,
    DataFormat,
    Message,
    Row,
    TextRow,
    choose_converter,
)
from kdrun.data.records import Position, read_records
from kdrun.errors import InputError

__all__ = [
    "BadRow",
    "ChatRow",
    "DataFormat",
    "Message",
    "Position",
    "Row",
    "RowSet",
    "TextRow",
    "describe_bad_rows",
    "load_rows",
    "name_positions",
]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    position: Position
    reason: str


@dataclass(frozen=True)
class RowSet:
    """The rows of one source.

    Attributes:
        rows: The usable rows, in the source's order.
        data_format: How they were read; never ``auto``.
        source: The file or data set, as the user named it.
        bad: The rows that were left out.
    """

    rows: tuple[Row, ...]
    data_format: DataFormat
    source: str
    bad: tuple[BadRow, ...] = ()

    def warnings(self) -> list[str]:
        """One line for each reason that rows were left out for, with the first five numbers."""
        return describe_bad_rows(self.bad, len(self.rows) + len(self.bad))


def describe_bad_rows(bad: Sequence[BadRow], total: int) -> list[str]:
    """One line for each reason, with the file, the count and the numbers of the first five rows."""
    by_reason: dict[tuple[str, str], list[Position]] = defaultdict(list)
    for row in bad:
        by_reason[row.position.file, row.reason].append(row.position)
    return [
        f"{file}: left out {len(found)} of {total} rows: {name_positions(found)}: {reason}"
        for (file, reason), found in by_reason.items()
    ]


def name_positions(positions: Sequence[Position], limit: int = 5) -> str:
    """Name the first few positions of one file, such as ``lines 2, 3, 9 and 4 more``."""
    shown = ", ".join(str(position.number) for position in positions[:limit])
    more = f" and {len(positions) - limit} more" if len(positions) > limit else ""
    return f"{positions[0].unit}{'s' if len(positions) > 1 else ''} {shown}{more}"


def load_rows(
    source: str | Path,
    *,
    data_format: DataFormat = "auto",
    prompt_field: str | None = None,
    response_field: str | None = None,
    strict: bool = False,
) -> RowSet:
    """Read the rows of a file or of a hub data set.

    Args:
        source: A text file, a JSON list, JSON lines, or ``owner/name`` of a hub data set.
        data_format: ``auto`` decides by the names of the fields.
        prompt_field: The field of the prompt, where it has an unusual name.
        response_field: The field of the response, likewise.
        strict: Refuse the first row that cannot be used, rather than leaving such rows out.

    Returns:
        At least one usable row, and the ones that were left out.

    Raises:
        InputError: The source cannot be read, no row is usable, a message has an unknown role,
            or, with ``strict``, any row is unusable.
    """
    name = str(source)
    records = read_records(source, as_text=data_format == "text")
    chosen, convert = choose_converter(records, data_format, prompt_field, response_field, name)
    rows: list[Row] = []
    bad: list[BadRow] = []
    for record in records:
        try:
            rows.extend(convert(record))
        except BadRowError as error:
            if strict:
                raise InputError(
                    f"{record.position}: the row {error}; mend it, or leave such rows out "
                    "with data.strict=false"
                ) from error
            bad.append(BadRow(record.position, str(error)))
    if not rows:
        first = bad[0]
        raise InputError(
            f"{name}: none of the {len(bad)} rows can be used; {first.position.unit} "
            f"{first.position.number} {first.reason}"
        )
    return RowSet(tuple(rows), chosen, name, tuple(bad))
