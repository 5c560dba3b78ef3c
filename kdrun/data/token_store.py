"""Adds to datasets' Arrow files: tokenised rows with hashes, and what became of the others."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.data.arrow_store import Stored, StoreWriter, lists, numbers, open_store
from kdrun.data.collate import IGNORE_INDEX
from kdrun.data.encoding import Encoding, Example
from kdrun.data.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np


_OF_TEACHER = ("teacher_input_ids", "teacher_labels")
_RELEASED_EVERY = 500
"""Examples; reading one may map 64 KiB around it."""


def hash_example(example: Mapping[str, Any]) -> int:
    """Return a hash of an example's tokens and targets on both sides, as a signed 64-bit number."""
    digest = hashlib.blake2b(array("i", example["input_ids"]).tobytes(), digest_size=8)
    digest.update(array("i", example["labels"]).tobytes())
    for column in _OF_TEACHER:
        if column in example:
            digest.update(array("i", example[column]).tobytes())
    return int.from_bytes(digest.digest(), "big", signed=True)


@dataclass(frozen=True)
class Chunk:
    """Tokenised rows on their way from a worker to the store.

    Attributes:
        ids: tokens of all examples.
        supervised: whether each of them is a target.
        lengths: of the examples.
        rows: number of the row of each example.
        hashes: of the examples.
        notes: lists by kind, for :class:`Encoding`; their rows are numbered as in ``rows``.
        shortest: the fewest tokens before an answer, and the fewest in a row.
        seen: tokens that the teacher reads of all examples.
        seen_supervised: whether each of them is a target.
        seen_lengths: of these examples; 0 where the teacher reads what the student reads.
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: list[int]
    rows: list[int]
    hashes: list[int]
    notes: dict[str, list[Any]]
    shortest: tuple[int, ...] | None
    seen: np.ndarray
    seen_supervised: np.ndarray
    seen_lengths: list[int]


def pack_chunk(
    examples: Sequence[Example],
    rows: Sequence[int],
    notes: dict[str, list[Any]],
    shortest: tuple[int, ...] | None = None,
) -> Chunk:
    """Return examples in the form of the store."""
    import numpy as np

    def joined(column: str) -> np.ndarray:
        return np.array([x for e in examples for x in e.get(column, ())], dtype=np.int32)  # type: ignore[attr-defined]

    return Chunk(
        ids=joined("input_ids"),
        supervised=(joined("labels") != IGNORE_INDEX).astype(np.int8),
        lengths=[len(e["input_ids"]) for e in examples],
        rows=list(rows),
        hashes=[hash_example(e) for e in examples],
        notes=notes,
        shortest=shortest,
        seen=joined("teacher_input_ids"),
        seen_supervised=(joined("teacher_labels") != IGNORE_INDEX).astype(np.int8),
        seen_lengths=[len(e.get("teacher_input_ids", ())) for e in examples],
    )


def store_tokens(place: Path | None, chunks: Iterable[Chunk]) -> Tokens:
    """Write chunks to a store.

    Args:
        place: folder of the store; None keeps them in memory.
        chunks: in the order of the rows.

    Raises:
        InputError: the disk is full.
    """
    import pyarrow as pa

    kind = pa.large_list
    schema = pa.schema(
        [
            ("ids", kind(pa.int32())),
            ("supervised", kind(pa.int8())),
            ("row", pa.int64()),
            ("hash", pa.int64()),
            ("seen", kind(pa.int32())),
            ("seen_supervised", kind(pa.int8())),
        ]
    )
    notes: dict[str, list[Any]] = {}
    shortest: tuple[int, ...] | None = None
    supervised = 0
    with StoreWriter(place, schema) as writer:
        for chunk in chunks:
            columns = [
                lists(chunk.ids, "int32", chunk.lengths),
                lists(chunk.supervised, "int8", chunk.lengths),
                numbers(chunk.rows, "int64"),
                numbers(chunk.hashes, "int64"),
                lists(chunk.seen, "int32", chunk.seen_lengths),
                lists(chunk.seen_supervised, "int8", chunk.seen_lengths),
            ]
            if chunk.lengths:
                writer.add(pa.RecordBatch.from_arrays(columns, schema=schema))
            supervised += _targets(chunk)
            for name, found in chunk.notes.items():
                notes.setdefault(name, []).extend(found)
            if chunk.shortest is not None:
                both = (chunk.shortest, shortest or chunk.shortest)
                shortest = tuple(map(min, zip(*both, strict=True)))
        about = {"notes": notes, "shortest": shortest, "supervised": supervised}
        return Tokens(writer.finish(about))


def _targets(chunk: Chunk) -> int:
    """Return the number of targets; the first token of a row has nothing to be predicted from."""
    starts = [0, *accumulate(chunk.lengths)][:-1]
    return int(chunk.supervised.sum()) - int(chunk.supervised[starts].sum() if starts else 0)


class Tokens(Lazy[Example]):
    """Tokenised rows of a store, converted to lists on access.

    Args:
        stored: the store.
    """

    def __init__(self, stored: Stored) -> None:
        self._about, self._stored, self._read = stored.about, stored, 0
        self._parts = [_Part(batch) for batch in stored.batches]
        self._starts = [0, *accumulate(len(part) for part in self._parts)]

    @classmethod
    def at(cls, place: Path) -> Tokens | None:
        """Open a store; None if it is absent or damaged."""
        stored = open_store(place)
        return None if stored is None else cls(stored)

    def __len__(self) -> int:
        return self._starts[-1]

    def element(self, number: int) -> Example:
        """Return one example."""
        self._read += 1
        if self._read % _RELEASED_EVERY == 0:
            self._stored.release()
        part = bisect_right(self._starts, number) - 1
        return self._parts[part].example(number - self._starts[part])

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example."""
        return self._joined([part.stops[1:] - part.stops[:-1] for part in self._parts])

    def teacher_lengths(self) -> np.ndarray:
        """Return the number of tokens that the teacher reads of each example."""
        import numpy as np

        own = self._joined([part.seen_stops[1:] - part.seen_stops[:-1] for part in self._parts])
        return np.where(own > 0, own, self.lengths())

    def has_view(self) -> bool:
        """Return whether the teacher reads another sequence of any example."""
        return any(int(part.seen_stops[-1]) > 0 for part in self._parts)

    def rows(self) -> np.ndarray:
        """Return the number of the row of each example."""
        return self._joined([part.column("row") for part in self._parts])

    def hashes(self) -> np.ndarray:
        """Return :func:`hash_example` of each example."""
        return self._joined([part.column("hash") for part in self._parts])

    def encoding(self) -> Encoding:
        """Return what became of the rows."""
        notes = self._about["notes"]
        shortest = self._about["shortest"]
        return Encoding(
            examples=self,
            skipped=[(number, reason) for number, reason in notes.get("skipped", [])],
            cut=notes.get("cut", []),
            lost=[(number, kind) for number, kind in notes.get("lost", [])],
            controls=[(number, token) for number, token in notes.get("controls", [])],
            shortest=None if shortest is None else tuple(shortest),
            tokens=int(self.lengths().sum()),
            supervised=self._about["supervised"],
            unknown=[(number, token) for number, token in notes.get("unknown", [])],
            reasoning=notes.get("reasoning", []),
            rewritten=notes.get("rewritten", []),
            teacher_tokens=int(self.teacher_lengths().sum()) if self.has_view() else 0,
        )

    def flat(self) -> FlatTokens:
        """Return the tokens of all examples as one list."""
        return FlatTokens(self._parts)

    @staticmethod
    def _joined(parts: list[np.ndarray]) -> np.ndarray:
        import numpy as np

        return np.concatenate(parts) if parts else np.empty(0, np.int64)


class _Part:
    """The columns of a batch as arrays, without copies."""

    def __init__(self, batch: Any) -> None:
        import numpy as np

        self._batch = batch
        ids, supervised = batch.column("ids"), batch.column("supervised")
        self.stops = np.frombuffer(ids.buffers()[1], np.int64)[: len(batch) + 1]
        self.ids = np.frombuffer(ids.values.buffers()[1], np.int32)
        self._supervised = np.frombuffer(supervised.values.buffers()[1], np.int8)
        seen, targets = batch.column("seen"), batch.column("seen_supervised")
        self.seen_stops = np.frombuffer(seen.buffers()[1], np.int64)[: len(batch) + 1]
        self._seen = np.frombuffer(seen.values.buffers()[1] or b"", np.int32)
        self._seen_supervised = np.frombuffer(targets.values.buffers()[1] or b"", np.int8)

    def __len__(self) -> int:
        return len(self._batch)

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers."""
        import numpy as np

        return np.frombuffer(self._batch.column(name).buffers()[1], np.int64)[: len(self)]

    def example(self, number: int) -> Example:
        ids, labels = _cut(self.ids, self._supervised, self.stops, number)
        seen, targets = _cut(self._seen, self._seen_supervised, self.seen_stops, number)
        if not seen:
            return Example(input_ids=ids, labels=labels)
        return Example(input_ids=ids, labels=labels, teacher_input_ids=seen, teacher_labels=targets)


def _cut(
    ids: np.ndarray, supervised: np.ndarray, stops: np.ndarray, number: int
) -> tuple[list[int], list[int]]:
    """Return the tokens and labels of one example of a batch."""
    part = slice(stops[number], stops[number + 1])
    found: list[int] = ids[part].tolist()
    kept = supervised[part].tolist()
    return found, [token if k else IGNORE_INDEX for token, k in zip(found, kept, strict=True)]


class FlatTokens(Sequence[int]):
    """The tokens of all examples, one after another.

    Args:
        parts: the batches of a store.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = [part.ids[: int(part.stops[-1])] for part in parts]
        self._starts = [0, *accumulate(len(part) for part in self._parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        """Return a token, or a list of them."""
        if not isinstance(index, slice):
            return self[index : index + 1][0]
        start, stop, _ = index.indices(len(self))
        found: list[int] = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first = self._starts[number]
            part = self._parts[number][start - first : stop - first]
            found += part.tolist()
            start += len(part)
            number += 1
        return found
