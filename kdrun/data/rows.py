"""Adds to datasets' rows: texts and conversations, each with its place in the user's files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from kdrun.data.arrow_store import open_store
from kdrun.data.fields import BadRowError, Fields
from kdrun.data.formats import (
    NO_ANSWERS,
    ChatRow,
    DataFormat,
    Row,
    TextRow,
    choose_converter,
    unanswered,
)
from kdrun.data.messages import NO_ANSWER, Message
from kdrun.data.records import Position, Record
from kdrun.data.row_store import BATCH, Rows, RowWriter
from kdrun.data.sources import Part, find_parts
from kdrun.data.teacher_prompt import STUDENTS_PROMPT, TeacherPrompt
from kdrun.errors import InputError
from kdrun.quiet import make_console, show_progress

_MOST_UNUSED = 12
_CODE = (
    "fields.py",
    "formats.py",
    "hashes.py",
    "messages.py",
    "records.py",
    "row_store.py",
    "shapes.py",
    "streams.py",
    "tables.py",
    "teacher_prompt.py",
    "tools.py",
)
"""The source files that determine what becomes of a record."""
_SHOWN = 50_000
LOOKED_AT = 1000
"""Records of a stream that are read first, to recognise its format and to check the run."""
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
        said: How something was used, with the number of objects.
    """

    rows: Rows
    data_format: DataFormat
    source: str
    bad: tuple[BadRow, ...] = ()
    unused: Mapping[str, int] = field(default_factory=dict)
    records: int = 0
    said: Mapping[str, int] = field(default_factory=dict)

    @property
    def unanswered(self) -> int:
        """How many rows are prompts alone."""
        return self.said.get(NO_ANSWERS, 0)

    def warnings(self) -> list[str]:
        """Return one line for each reason to skip rows, each use, and for unused fields."""
        lines = describe_bad_rows(self.bad, len(self.rows) + len(self.bad))
        lines += [
            f"{self.source}: {count} of {self.records} rows: {what}"
            for what, count in self.said.items()
        ]
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


@dataclass(frozen=True)
class SourceOf:
    """A source, and how its rows are read.

    Attributes:
        name: a file, glob, folder, or data set of the hub.
        data_format: ``auto`` detects it from the field names.
        prompt_field: the field of the prompt, if its name is not a common one.
        response_field: the field of the response, if its name is not a common one.
        prompts: whether rows without answers will do.
        teacher: what the teacher reads.
    """

    name: str
    data_format: DataFormat = "auto"
    prompt_field: str | None = None
    response_field: str | None = None
    prompts: bool = False
    teacher: TeacherPrompt = STUDENTS_PROMPT


def load_rows(
    source: str | Path,
    *,
    data_format: DataFormat = "auto",
    prompt_field: str | None = None,
    response_field: str | None = None,
    strict: bool = False,
) -> RowSet:
    """Read the rows of one source into memory; see :class:`SourceOf` and :func:`load_sources`."""
    one = SourceOf(str(source), data_format, prompt_field, response_field)
    return load_sources([one], strict=strict)


def load_sources(
    sources: Sequence[SourceOf],
    *,
    strict: bool = False,
    keep: Keep = keep_in_memory,
    limit: int | None = None,
) -> RowSet:
    """Read the rows of sources, one after another.

    Args:
        sources: at least one.
        strict: refuse the first row that cannot be used, rather than skipping such rows.
        keep: where rows are kept, by a hash of what they follow from and their size in bytes.
        limit: read only so many records of each source; None reads all.

    Returns:
        At least one usable row, and the skipped ones.

    Raises:
        InputError: a source cannot be read, no row of it is usable, a message has an unknown role,
            some sources are plain text and some not, or, with ``strict``, any row is unusable.
    """
    parts = [find_parts(source.name, streaming=limit is not None) for source in sources]
    name = ", ".join(source.name for source in sources)
    place = keep(lambda: _key(sources, parts, strict), _size(parts))
    found = None if place is None else open_store(place)
    if found is not None:
        return _row_set(Rows(found), name, found.about)
    tally = _Tally()
    with RowWriter(place) as writer:
        for number, (source, of_source) in enumerate(zip(sources, parts, strict=True)):
            _convert(source, of_source, strict, writer, number, tally, limit)
        _check_alike(sources, tally.formats)
        about = tally.as_json()
        return _row_set(writer.finish(about), name, about)


def _check_alike(sources: Sequence[SourceOf], formats: Sequence[DataFormat]) -> None:
    kinds = [found == "text" for found in formats]
    if any(kinds) and not all(kinds):
        text, chats = kinds.index(True), kinds.index(False)
        raise InputError(
            f"{sources[text].name} is plain text and {sources[chats].name} is not; train on them "
            "in separate runs, or convert one of them"
        )


@dataclass
class _Tally:
    """What becomes of the records of a source."""

    formats: list[DataFormat] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    said: Counter[str] = field(default_factory=Counter)
    records: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it in the form in which a store keeps it."""
        bad = [[b.position.file, b.position.number, b.position.unit, b.reason] for b in self.bad]
        return {
            "format": self.formats[0],
            "bad": bad,
            "unused": dict(self.unused),
            "records": self.records,
            "said": dict(self.said),
        }


def _row_set(rows: Rows, name: str, about: Mapping[str, Any]) -> RowSet:
    bad = tuple(
        BadRow(Position(file, number, unit), reason) for file, number, unit, reason in about["bad"]
    )
    return RowSet(
        rows, about["format"], name, bad, about["unused"], about["records"], about["said"]
    )


def reader_of(
    source: SourceOf, parts: Sequence[Part], limit: int | None = None
) -> tuple[DataFormat, Callable[[Record], tuple[list[Row], Fields]], int]:
    """Return how the records of a source are read.

    Args:
        source: the source.
        parts: its files.
        limit: look only at so many records; None looks at all.

    Returns:
        The format, never ``auto``, a function that returns the rows of a record and its fields,
        which know what was used, or raises ``BadRowError``, and the number of records.

    Raises:
        InputError: no format fits the fields.
    """
    as_text = source.data_format == "text"
    keys, any_text, number = _fields_of(islice(_records(parts, as_text), limit), source.name)
    fields_named = (source.prompt_field, source.response_field)
    chosen, convert = choose_converter(
        keys,
        any_text,
        source.data_format,
        *fields_named,
        source.name,
        source.prompts,
        source.teacher,
    )

    def read(record: Record) -> tuple[list[Row], Fields]:
        value = {"text": record.value} if isinstance(record.value, str) else record.value
        fields = Fields(value)
        return convert(fields, record.position), fields

    return chosen, read, number


def _convert(
    source: SourceOf,
    parts: Sequence[Part],
    strict: bool,
    writer: RowWriter,
    number: int,
    tally: _Tally,
    limit: int | None,
) -> None:
    """Convert the records of one source."""
    chosen, read, total = reader_of(source, parts, limit)
    tally.formats.append(chosen)
    written, skipped = writer.count, len(tally.bad)
    for record in _shown(islice(records_of(source, parts), limit), total):
        tally.records += 1
        try:
            rows, fields = read(record)
        except BadRowError as error:
            if strict:
                raise refusal(record.position, error) from error
            tally.bad.append(BadRow(record.position, str(error)))
            continue
        for row in rows:
            writer.add(row, number)
        tally.unused.update(set(fields.unused()))
        tally.said.update(fields.said())
    if writer.count == written:
        if all(bad.reason == NO_ANSWER for bad in tally.bad[skipped:]):
            raise unanswered(source.name)
        first = tally.bad[skipped]
        raise InputError(
            f"{source.name}: none of the {len(tally.bad) - skipped} rows can be used; "
            f"{first.position.unit} {first.position.number} {first.reason}"
        )


def _shown(records: Iterator[Record], total: int) -> Iterator[Record]:
    """Show the progress of reading where it takes more than a moment."""
    if total < _SHOWN:
        yield from records
        return
    with show_progress(make_console(), "reading rows", "rows") as report:
        for number, record in enumerate(records, 1):
            yield record
            if number % BATCH == 0:
                report(number, total, number)


def refusal(position: Position, error: BadRowError) -> InputError:
    """Return the error for a row that cannot be used, with ``data.strict``."""
    return InputError(
        f"{position}: the row {error}; fix it, or skip such rows with data.strict=false"
    )


def records_of(source: SourceOf, parts: Sequence[Part]) -> Iterator[Record]:
    """Yield the records of a source."""
    return _records(parts, source.data_format == "text")


def _records(parts: Sequence[Part], as_text: bool) -> Iterator[Record]:
    for part in parts:
        yield from part.records(as_text)


def _fields_of(records: Iterable[Record], name: str) -> tuple[list[str], bool, int]:
    """Return the fields that any record has, whether any record is text, and how many there are."""
    keys: dict[str, None] = {}
    any_text, number = False, 0
    for record in records:
        number += 1
        if isinstance(record.value, dict):
            keys.update(dict.fromkeys(record.value))
        any_text = any_text or isinstance(record.value, str)
    if not number:
        raise InputError(f"{name}: the file contains no rows")
    return list(keys), any_text, number


def _size(parts: Sequence[Sequence[Part]]) -> int:
    return sum(part.size for of_source in parts for part in of_source)


def _key(sources: Sequence[SourceOf], parts: Sequence[Sequence[Part]], strict: bool) -> str:
    """Return a hash of everything that the rows follow from."""
    files = [[(part.name, part.fingerprint()) for part in of_source] for of_source in parts]
    code = [(Path(__file__).parent / name).read_bytes() for name in _CODE]
    settings = [astuple(source) for source in sources]
    content = json.dumps([files, settings, strict, hashlib.sha256(b"".join(code)).hexdigest()])
    return hashlib.sha256(content.encode()).hexdigest()
