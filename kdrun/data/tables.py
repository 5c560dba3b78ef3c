"""Adds to pyarrow and datasets: CSV with the line of each error, tables in batches of rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdrun.data.streams import TextFile

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_START = b"PAR1"
ARROW_START = b"ARROW1"

_LONGEST_FIELD = 2**31 - 1
_BATCH = 1000


def read_csv(file: TextFile, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield rows with the names of the first line, each with the line that it ends on.

    Args:
        file: the file.
        delimiter: separator of fields.

    Raises:
        InputError: no header, a field without a name, or a row with more fields than names.
    """
    limit = csv.field_size_limit(_LONGEST_FIELD)
    lines = (f"{line}\n" for _, line in file.lines())
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if not all(header) or len(set(header)) != len(header):
            raise InputError(
                f"{file.name}, line 1: the first line must name the fields, each once, such as "
                "prompt,response"
            )
        for values in reader:
            if len(values) > len(header):
                raise InputError(
                    f"{file.name}, line {reader.line_num}: {len(values)} fields, but the first "
                    f"line names {len(header)}; put fields that contain {delimiter!r} in double "
                    "quotes"
                )
            if values:
                yield reader.line_num, dict(zip(header, values, strict=False))
    except csv.Error as error:
        raise InputError(
            f"{file.name}, line {reader.line_num}: broken CSV ({error}); fix the line"
        ) from error
    finally:
        csv.field_size_limit(limit)


def read_table(path: Path, name: str, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet or Arrow file.

    Args:
        path: the file.
        name: its name for messages.
        kind: ``Parquet`` or ``Arrow``.

    Raises:
        InputError: it is broken.
    """
    from pyarrow import ipc, memory_map, parquet

    with _one_line(name, kind):
        if kind == "Parquet":
            for batch in parquet.ParquetFile(path).iter_batches(_BATCH):
                yield from batch.to_pylist()
            return
        with memory_map(str(path)) as source, ipc.open_file(source) as reader:
            for number in range(reader.num_record_batches):
                yield from reader.get_batch(number).to_pylist()


def columns_of(path: Path, name: str, kind: str) -> list[str]:
    """Return the columns of a Parquet or Arrow file.

    Raises:
        InputError: it is broken.
    """
    from pyarrow import ipc, memory_map, parquet

    with _one_line(name, kind):
        if kind == "Parquet":
            return list(parquet.read_schema(path).names)
        with memory_map(str(path)) as source, ipc.open_file(source) as reader:
            return list(reader.schema.names)


@contextmanager
def _one_line(name: str, kind: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: broken {kind} file ({reason}); write it again") from error
