"""Adds to datasets' Arrow files: rows with their places in the user's files and their hashes.

A row is an object only while it is looked at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kdrun.data.arrow_store import Stored, StoreWriter, digests, numbers, texts
from kdrun.data.formats import ChatRow, Row, TextRow
from kdrun.data.hashes import content_hash, prompt_hash
from kdrun.data.lazy import Lazy
from kdrun.data.messages import Message
from kdrun.data.records import Position

if TYPE_CHECKING:
    import numpy as np

BATCH = 1000
_DIGEST = 16
_UNITS: tuple[Any, ...] = ("line", "row")
_MESSAGE_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Message)}
_CONVERSATIONS = ("messages", "teacher")
_OF_CHATS = [
    f.name for f in dataclasses.fields(ChatRow) if f.name not in (*_CONVERSATIONS, "position")
]


class Rows(Lazy[Row]):
    """Rows of a store, or some of them.

    Args:
        stored: the store, whose batches but the last have :data:`BATCH` rows.
        numbers: which rows of the store, in order; None for all.
    """

    def __init__(self, stored: Stored, numbers: np.ndarray | None = None) -> None:
        self._stored, self._numbers = stored, numbers
        self._count = sum(len(batch) for batch in stored.batches)

    def __len__(self) -> int:
        return self._count if self._numbers is None else len(self._numbers)

    def element(self, number: int) -> Row:
        """Return a row."""
        if number % BATCH == BATCH - 1:
            self._stored.release()
        batch, place = self._find(number)
        content, is_text = (batch.column(name)[place].as_py() for name in ("content", "is_text"))
        return _load(content, is_text, self.position(number))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def position(self, number: int) -> Position:
        """Return where a row comes from, without reading it."""
        batch, place = self._find(number)
        file, line, unit = (batch.column(c)[place].as_py() for c in ("file", "number", "unit"))
        return Position(self._stored.about["files"][file], line, _UNITS[unit])

    def sources(self) -> np.ndarray:
        """Return the number of the source of each row."""
        import numpy as np

        parts = [
            np.frombuffer(batch.column("source").buffers()[1], np.int32)[: len(batch)]
            for batch in self._stored.batches
        ]
        found = np.concatenate(parts)
        return found if self._numbers is None else found[self._numbers]

    def hashes(self, name: str) -> np.ndarray:
        """Return ``own`` or ``prompt``: the first 16 bytes of content or prompt hashes."""
        import numpy as np

        found = np.empty(self._count, f"S{_DIGEST}")
        start = 0
        for batch in self._stored.batches:
            column = batch.column(name)
            part = np.frombuffer(column.buffers()[1], f"S{_DIGEST}")
            found[start : start + len(batch)] = part[column.offset : column.offset + len(batch)]
            start += len(batch)
        self._stored.release()
        return found if self._numbers is None else found[self._numbers]

    def characters(self) -> int:
        """Return about how many characters the rows have."""
        whole = int(sum(batch.column("content").nbytes for batch in self._stored.batches))
        return whole * len(self) // max(1, self._count)

    def some(self, numbers: np.ndarray) -> Rows:
        """Return the rows with these numbers."""
        kept = numbers if self._numbers is None else self._numbers[numbers]
        return Rows(self._stored, kept)

    def fingerprint(self) -> str:
        """Return a hash of the content of these rows, in their order."""
        which = b"" if self._numbers is None else self._numbers.astype("<i8").tobytes()
        return hashlib.sha256(self._stored.about["digest"].encode() + which).hexdigest()

    def _find(self, number: int) -> tuple[Any, int]:
        if self._numbers is not None:
            number = int(self._numbers[number])
        return self._stored.batches[number // BATCH], number % BATCH


class Places(Lazy[Position]):
    """Positions of some rows, read when they are needed.

    Args:
        rows: of a source.
        numbers: which of them, in order.
    """

    def __init__(self, rows: Rows, numbers: Any) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def element(self, number: int) -> Position:
        """Return a position."""
        return self._rows.position(int(self._numbers[number]))


def store_rows(rows: Sequence[Row]) -> Rows:
    """Return rows that are objects already as those of a store in memory."""
    if isinstance(rows, Rows):
        return rows
    with RowWriter(None) as writer:
        for row in rows:
            writer.add(row)
        return writer.finish({})


class RowWriter:
    """Writes rows to a store.

    Args:
        place: folder of the store; None keeps them in memory.
    """

    def __init__(self, place: Path | None) -> None:
        import pyarrow as pa

        self._schema = pa.schema(
            [
                ("content", pa.large_string()),
                ("is_text", pa.int8()),
                ("file", pa.int32()),
                ("number", pa.int64()),
                ("unit", pa.int8()),
                ("source", pa.int32()),
                ("own", pa.binary(_DIGEST)),
                ("prompt", pa.binary(_DIGEST)),
            ]
        )
        self._writer = StoreWriter(place, self._schema)
        self._files: dict[str, int] = {}
        self._waiting: list[tuple[Any, ...]] = []
        self._digest = hashlib.sha256()
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)

    def add(self, row: Row, source: int = 0) -> None:
        """Add a row.

        Args:
            row: the row.
            source: number of its source.
        """
        content = _dump(row)
        self._digest.update(content.encode("utf-8", "surrogatepass"))
        self._digest.update(b"\0")
        position = row.position
        self._waiting.append(
            (
                content,
                isinstance(row, TextRow),
                self._files.setdefault(position.file, len(self._files)),
                position.number,
                _UNITS.index(position.unit),
                source,
                bytes.fromhex(content_hash(row))[:_DIGEST],
                bytes.fromhex(prompt_hash(row))[:_DIGEST],
            )
        )
        self.count += 1
        if len(self._waiting) == BATCH:
            self._write()

    def finish(self, about: dict[str, Any]) -> Rows:
        """Write the last rows and return all.

        Args:
            about: what else belongs to them.
        """
        if self._waiting:
            self._write()
        own = {"files": list(self._files), "digest": self._digest.hexdigest()}
        return Rows(self._writer.finish({**about, **own}))

    def _write(self) -> None:
        import pyarrow as pa

        content, is_text, file, number, unit, source, own, prompt = zip(*self._waiting, strict=True)
        columns = [
            texts(content),
            numbers(is_text, "int8"),
            numbers(file, "int32"),
            numbers(number, "int64"),
            numbers(unit, "int8"),
            numbers(source, "int32"),
            digests(own),
            digests(prompt),
        ]
        self._writer.add(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._waiting = []


def _dump(row: Row) -> str:
    if isinstance(row, TextRow):
        return row.text
    talks = {name: getattr(row, name) for name in _CONVERSATIONS}
    found = {name: _as_dicts(talk) for name, talk in talks.items() if talk is not None}
    others = {name: getattr(row, name) for name in _OF_CHATS}
    return json.dumps({**found, **others}, ensure_ascii=False, default=str)


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages with the fields that differ from their defaults."""
    return [
        {
            name: value
            for name, default in _MESSAGE_DEFAULTS.items()
            if (value := getattr(message, name)) != default
        }
        for message in messages
    ]


def _load(content: str, is_text: bool, position: Position) -> Row:
    if is_text:
        return TextRow(content, position)
    found = json.loads(content)
    talks: dict[str, Any] = {
        name: tuple(Message(**message) for message in found.pop(name))
        for name in _CONVERSATIONS
        if name in found
    }
    return ChatRow(position=position, **talks, **found)
