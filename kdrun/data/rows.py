"""Reading rows: texts and conversations from a file or a hub data set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdrun.data.fields import BadRowError, Fields
from kdrun.data.formats import ChatRow, DataFormat, Row, TextRow, choose_converter
from kdrun.data.messages import Message
from kdrun.data.records import Position, read_records
from kdrun.errors import InputError

_MOST_UNUSED = 12

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
        data_format: Their format; never ``auto``.
        source: The file or data set, as the user named it.
        bad: The rows that were skipped.
        unused: Fields that were not read, with the number of rows that have them.
        records: Number of objects in the source.
    """

    rows: tuple[Row, ...]
    data_format: DataFormat
    source: str
    bad: tuple[BadRow, ...] = ()
    unused: Mapping[str, int] = field(default_factory=dict)
    records: int = 0

    def warnings(self) -> list[str]:
        """Return one line for each reason for skipping rows, and one for unused fields."""
        lines = describe_bad_rows(self.bad, len(self.rows) + len(self.bad))
        if self.unused:
            shares = [
                f"{name} ({_share(count, self.records)})"
                for name, count in sorted(self.unused.items(), key=lambda item: -item[1])
            ]
            more = f" and {len(shares) - _MOST_UNUSED} more" if len(shares) > _MOST_UNUSED else ""
            lines.append(f"{self.source}: not used: {', '.join(shares[:_MOST_UNUSED])}{more}")
        return lines


def describe_bad_rows(bad: Sequence[BadRow], total: int) -> list[str]:
    """Return one line per reason, with the file, the count and the first five row numbers."""
    by_reason: dict[tuple[str, str], list[Position]] = defaultdict(list)
    for row in bad:
        by_reason[row.position.file, row.reason].append(row.position)
    return [
        f"{file}: skipped {len(found)} of {total} rows: {name_positions(found)}: {reason}"
        for (file, reason), found in by_reason.items()
    ]


def _share(count: int, total: int) -> str:
    """Format a number of rows as a share of all."""
    if count == total:
        return "all rows"
    return f"{count} of {total} rows" if count * 100 < total else f"{count / total:.0%} of rows"


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
        data_format: ``auto`` detects it from the field names.
        prompt_field: The field of the prompt, if its name is not a common one.
        response_field: The field of the response, if its name is not a common one.
        strict: Refuse the first row that cannot be used, rather than skipping such rows.

    Returns:
        At least one usable row, and the skipped ones.

    Raises:
        InputError: The source cannot be read, no row is usable, a message has an unknown role,
            or, with ``strict``, any row is unusable.
    """
    name = str(source)
    records = read_records(source, as_text=data_format == "text")
    chosen, convert = choose_converter(records, data_format, prompt_field, response_field, name)
    rows: list[Row] = []
    bad: list[BadRow] = []
    unused: Counter[str] = Counter()
    for record in records:
        value = {"text": record.value} if isinstance(record.value, str) else record.value
        try:
            fields = Fields(value)
            rows.extend(convert(fields, record.position))
            unused.update(set(fields.unused()))
        except BadRowError as error:
            if strict:
                raise InputError(
                    f"{record.position}: the row {error}; fix it, or skip such rows with "
                    "data.strict=false"
                ) from error
            bad.append(BadRow(record.position, str(error)))
    if not rows:
        first = bad[0]
        raise InputError(
            f"{name}: none of the {len(bad)} rows can be used; {first.position.unit} "
            f"{first.position.number} {first.reason}"
        )
    return RowSet(tuple(rows), chosen, name, tuple(bad), unused, len(records))
