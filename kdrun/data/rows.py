"""Reading rows: texts and conversations from a file or a hub data set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrun.data.arrow_store import open_store
from kdrun.data.fields import BadRowError, Fields
from kdrun.data.formats import ChatRow, DataFormat, Row, TextRow, choose_converter
from kdrun.data.messages import Message
from kdrun.data.records import Position, Record
from kdrun.data.row_store import Rows, RowWriter
from kdrun.data.sources import Part, find_parts
from kdrun.errors import InputError

_MOST_UNUSED = 12
_CODE = ("fields.py", "formats.py", "hashes.py", "messages.py", "records.py", "row_store.py")
"""The source files that determine what becomes of a record."""
Keep = Callable[[Callable[[], str], int], Path | None]

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

    rows: Rows
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


def keep_in_memory(key: Callable[[], str], size: int) -> Path | None:
    """Keep no rows on disk."""
    del key, size
    return None


def load_rows(
    source: str | Path | Sequence[str],
    *,
    data_format: DataFormat = "auto",
    prompt_field: str | None = None,
    response_field: str | None = None,
    strict: bool = False,
    keep: Keep = keep_in_memory,
) -> RowSet:
    """Read the rows of a source.

    Args:
        source: a file, glob, folder, or data set of the hub, or several.
        data_format: ``auto`` detects it from the field names.
        prompt_field: the field of the prompt, if its name is not a common one.
        response_field: the field of the response, if its name is not a common one.
        strict: refuse the first row that cannot be used, rather than skipping such rows.
        keep: where rows are kept, by a hash of what they follow from and their size in bytes.

    Returns:
        At least one usable row, and the skipped ones.

    Raises:
        InputError: the source cannot be read, no row is usable, a message has an unknown role,
            or, with ``strict``, any row is unusable.
    """
    names = [source] if isinstance(source, str | Path) else list(source)
    parts = {str(name): find_parts(name) for name in names}
    name = ", ".join(parts)
    settings = (data_format, prompt_field, response_field, strict)
    place = keep(lambda: _key(parts, settings), _size(parts))
    found = None if place is None else open_store(place)
    if found is not None:
        return _row_set(Rows(found), name, found.about)
    tally = _Tally()
    with RowWriter(place) as writer:
        for one, of_one in parts.items():
            _convert(one, of_one, settings, writer, tally)
        if not writer.count:
            first = tally.bad[0]
            raise InputError(
                f"{name}: none of the {len(tally.bad)} rows can be used; {first.position.unit} "
                f"{first.position.number} {first.reason}"
            )
        about = tally.as_json()
        return _row_set(writer.finish(about), name, about)


@dataclass
class _Tally:
    """What becomes of the records of a source."""

    formats: list[DataFormat] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    records: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it in the form in which a store keeps it."""
        bad = [[b.position.file, b.position.number, b.position.unit, b.reason] for b in self.bad]
        return {
            "format": self.formats[0],
            "bad": bad,
            "unused": dict(self.unused),
            "records": self.records,
        }


def _row_set(rows: Rows, name: str, about: Mapping[str, Any]) -> RowSet:
    bad = tuple(
        BadRow(Position(file, number, unit), reason) for file, number, unit, reason in about["bad"]
    )
    return RowSet(rows, about["format"], name, bad, about["unused"], about["records"])


def _convert(
    name: str,
    parts: Sequence[Part],
    settings: tuple[DataFormat, str | None, str | None, bool],
    writer: RowWriter,
    tally: _Tally,
) -> None:
    """Convert the records of one source."""
    data_format, prompt_field, response_field, strict = settings
    as_text = data_format == "text"
    keys, any_text = _fields_of(parts, as_text, name)
    chosen, convert = choose_converter(
        keys, any_text, data_format, prompt_field, response_field, name
    )
    tally.formats.append(chosen)
    for record in _records(parts, as_text):
        tally.records += 1
        value = {"text": record.value} if isinstance(record.value, str) else record.value
        try:
            fields = Fields(value)
            rows = convert(fields, record.position)
        except BadRowError as error:
            if strict:
                raise InputError(
                    f"{record.position}: the row {error}; fix it, or skip such rows with "
                    "data.strict=false"
                ) from error
            tally.bad.append(BadRow(record.position, str(error)))
            continue
        for row in rows:
            writer.add(row)
        tally.unused.update(set(fields.unused()))


def _records(parts: Sequence[Part], as_text: bool) -> Iterator[Record]:
    for part in parts:
        yield from part.records(as_text)


def _fields_of(parts: Sequence[Part], as_text: bool, name: str) -> tuple[list[str], bool]:
    """Return the fields of all records, since some may lack one, and whether any is text."""
    keys: dict[str, None] = {}
    any_text, number = False, 0
    for record in _records(parts, as_text):
        number += 1
        if isinstance(record.value, dict):
            keys.update(dict.fromkeys(record.value))
        any_text = any_text or isinstance(record.value, str)
    if not number:
        raise InputError(f"{name}: the file contains no rows")
    return list(keys), any_text


def _size(parts: Mapping[str, Sequence[Part]]) -> int:
    files = [part for of_one in parts.values() for part in of_one]
    return sum(part.size for part in files)


def _key(parts: Mapping[str, Sequence[Part]], settings: object) -> str:
    """Return a hash of everything that the rows follow from."""
    files = [(part.name, part.fingerprint()) for of_one in parts.values() for part in of_one]
    code = [(Path(__file__).parent / name).read_bytes() for name in _CODE]
    content = json.dumps([files, settings, hashlib.sha256(b"".join(code)).hexdigest()])
    return hashlib.sha256(content.encode()).hexdigest()
