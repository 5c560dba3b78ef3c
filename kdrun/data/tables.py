"""Read tables as named fields: CSV and Parquet."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from kdrun.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_START = b"PAR1"

_LONGEST_FIELD = 2**31 - 1


def parse_csv(text: str, name: str, delimiter: str) -> list[tuple[int, dict[str, str]]]:
    """Yield rows with the names of the first line, each with the line that it ends on.

    Args:
        text: the file's content.
        name: the file, for messages.
        delimiter: separator of fields.

    Raises:
        InputError: no header, a field without a name, or a row with more fields than names.
    """
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if not all(header) or len(set(header)) != len(header):
            raise InputError(
                f"{name}, line 1: the first line must name the fields, each once, such as "
                "prompt,response"
            )
        rows = []
        for values in reader:
            if len(values) > len(header):
                raise InputError(
                    f"{name}, line {reader.line_num}: {len(values)} fields, but the first line "
                    f"names {len(header)}; put fields that contain {delimiter!r} in double quotes"
                )
            if values:
                rows.append((reader.line_num, dict(zip(header, values, strict=False))))
    except csv.Error as error:
        raise InputError(
            f"{name}, line {reader.line_num}: broken CSV ({error}); fix the line"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def read_parquet(path: Path, name: str) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file.

    Raises:
        InputError: it is broken, or the package that reads it is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{name} is a Parquet file, which needs one more package: pip install 'kdlosses[data]'"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: broken Parquet file ({reason}); write it again") from error
    return rows
