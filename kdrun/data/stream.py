"""Adds to datasets' streaming: tokenised rows, each with its place in the user's files."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from kdrun.data.collate import ROW
from kdrun.data.fields import BadRowError
from kdrun.data.formats import ChatRow, Row
from kdrun.data.records import Position, Record
from kdrun.data.rows import LOOKED_AT, SourceOf, reader_of, records_of, refusal
from kdrun.data.sources import find_parts
from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdrun.data.encoder import Encoder

_BATCH = 64
_REMEMBERED = 100_000


class StreamedRows(IterableDataset[dict[str, Any]]):
    """Examples of conversations without end, read and tokenised when they are needed.

    The order follows from the sources and the seed alone, so that a resumed run can go over the
    rows that were trained on, and continue after them.

    Args:
        sources: read one after another, again and again.
        encoder: encodes their rows; what cannot be used is passed over.
        buffer: examples from which the next one is drawn.
        seed: of the run.

    Attributes:
        skipped: rows that could not be used so far.
    """

    def __init__(
        self, sources: Sequence[SourceOf], encoder: Encoder, buffer: int, seed: int
    ) -> None:
        self._sources, self._encoder, self._buffer, self._seed = sources, encoder, buffer, seed
        self._places: OrderedDict[int, Position] = OrderedDict()
        self.skipped = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        draw = random.Random(self._seed)
        waiting: list[tuple[dict[str, Any], Position]] = []
        numbers = count()
        for example in self._examples():
            waiting.append(example)
            if len(waiting) < self._buffer:
                continue
            place = draw.randrange(len(waiting))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            yield self._numbered(next(numbers), *waiting.pop())

    def name(self, numbers: Sequence[int]) -> str:
        """Describe rows by the numbers that examples carry."""
        found = [self._places.get(number) for number in numbers]
        return ", ".join(str(place or "a row that was read earlier") for place in found)

    def _numbered(self, number: int, example: dict[str, Any], place: Position) -> dict[str, Any]:
        self._places[number] = place
        if len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)
        return {**example, ROW: number}

    def _examples(self) -> Iterator[tuple[dict[str, Any], Position]]:
        """Yield all examples, over and over."""
        opened = []
        for source in self._sources:
            parts = find_parts(source.name, streaming=True)
            opened.append((source, parts, reader_of(source, parts, LOOKED_AT)[1]))
        while True:
            found = 0
            for source, parts, read in opened:
                rows = self._rows(records_of(source, parts), read)
                while batch := list(islice(rows, _BATCH)):
                    examples = self._encoder.some(batch)
                    self.skipped += len(batch) - len(examples)
                    found += len(examples)
                    yield from examples
            if not found:
                raise InputError(f"{self._sources[0].name}: no row can be used")

    def _rows(self, records: Iterator[Record], read: Any) -> Iterator[Row]:
        for record in records:
            try:
                rows, _ = read(record)
            except BadRowError as error:
                if self._encoder.strict:
                    raise refusal(record.position, error) from error
                self.skipped += 1
                continue
            for row in rows:
                if not isinstance(row, ChatRow):
                    raise InputError(
                        f"{row.position}: data.streaming=true reads conversations only"
                    )
                yield row
