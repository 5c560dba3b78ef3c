"""Adds to pyarrow: tables that appear on disk whole or not at all, and what belongs to them.

A store is a folder with ``table.arrow`` and ``about.json``. It is written beside its place and
moved there when it is complete. Without a place it is kept in memory.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kdrun.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_TABLE, _ABOUT = "table.arrow", "about.json"


@dataclass(frozen=True)
class Stored:
    """A complete store.

    Attributes:
        batches: its table, memory-mapped unless it is in memory.
        about: what belongs to it.
        mapping: of the file into memory; None for a table in memory.
    """

    batches: Sequence[Any]
    about: Any
    mapping: mmap.mmap | None = None

    def release(self) -> None:
        """Let go of pages that were read; the system keeps them as long as it has room.

        Otherwise they count as memory of this process, up to the size of the file.
        """
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


def texts(values: Sequence[str]) -> pa.Array:
    """Return an Arrow column of texts; ``pyarrow.array`` would import pandas first."""
    import numpy as np
    import pyarrow as pa

    encoded = [value.encode("utf-8") for value in values]
    stops = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    buffers = [None, pa.py_buffer(stops), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(encoded), buffers)


def numbers(values: Any, kind: str) -> pa.Array:
    """Return an Arrow column of numbers of a type of NumPy, such as ``int64``."""
    import numpy as np
    import pyarrow as pa

    found = np.asarray(values, dtype=kind)
    return pa.Array.from_buffers(
        pa.type_for_alias(kind), len(found), [None, pa.py_buffer(np.ascontiguousarray(found))]
    )


def lists(flat: Any, kind: str, lengths: Sequence[int]) -> pa.Array:
    """Return an Arrow column of lists of numbers.

    Args:
        flat: all of them.
        kind: their type in NumPy.
        lengths: of each list.
    """
    import numpy as np
    import pyarrow as pa

    inner = numbers(flat, kind)
    stops = np.cumsum([0, *lengths], dtype=np.int64)
    buffers = [None, pa.py_buffer(stops)]
    return pa.Array.from_buffers(pa.large_list(inner.type), len(lengths), buffers, children=[inner])


def digests(values: Sequence[bytes]) -> pa.Array:
    """Return an Arrow column of byte strings of one length."""
    import pyarrow as pa

    kind = pa.binary(len(values[0]))
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(b"".join(values))])


def open_store(place: Path) -> Stored | None:
    """Open a store; None if it is absent or damaged."""
    import pyarrow as pa

    try:
        about = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
        with open(place / _TABLE, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapping)))
        return Stored(_batches(reader), about, mapping)
    except (OSError, ValueError, pa.ArrowException):
        return None


def _batches(reader: Any) -> list[Any]:
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


class StoreWriter:
    """Writes a store, batch by batch.

    Args:
        place: its folder, which does not exist yet; None keeps it in memory.
        schema: of the table.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, place: Path | None, schema: pa.Schema) -> None:
        import pyarrow as pa

        self._place, self._schema = place, schema
        self._partial: Path | None = None
        if place is None:
            self._sink: Any = pa.BufferOutputStream()
        else:
            self._partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
            try:
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir(parents=True)
                self._sink = pa.OSFile(str(self._partial / _TABLE), "wb")
            except OSError as error:
                raise self._unwritable(error) from error
        self._writer = pa.ipc.new_file(self._sink, schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, batch: pa.RecordBatch) -> None:
        """Add a batch of rows.

        Raises:
            InputError: the disk is full.
        """
        try:
            self._writer.write_batch(batch)
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self, about: Any) -> Stored:
        """Complete the store and open it.

        Args:
            about: what belongs to it, as JSON can hold it.

        Raises:
            InputError: the disk is full.
        """
        import pyarrow as pa

        try:
            self._writer.close()
            if self._place is None or self._partial is None:
                return Stored(_batches(pa.ipc.open_file(self._sink.getvalue())), about)
            self._sink.close()
            (self._partial / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
            self._move(self._partial, self._place)
        except OSError as error:
            raise self._unwritable(error) from error
        found = open_store(self._place)
        if found is None:
            raise InputError(f"{self._place}: was removed while it was written; start again")
        return found

    def _move(self, partial: Path, place: Path) -> None:
        """Put the store in its place, where another process may have put the same one."""
        if place.is_dir() and open_store(place) is None:
            shutil.rmtree(place, ignore_errors=True)
        try:
            os.replace(partial, place)
        except OSError:
            if open_store(place) is None:
                raise

    def _unwritable(self, error: OSError) -> InputError:
        place = self._place.parent if self._place is not None else "memory"
        return InputError(
            f"{place}: the rows cannot be kept there ({error.strerror or error}); free some space, "
            "or choose another folder with data.cache_dir"
        )
