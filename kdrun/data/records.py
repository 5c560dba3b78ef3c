"""Raw records of a data set: the contents of a file, before interpretation.

The file type is detected from the content. A file that begins like JSON (``[{``, ``["``, ``{"``)
is a JSON list, a JSON object that contains one, or JSON lines; everything else is plain text. The
extension only decides what is an error: a file called ``.json`` or ``.jsonl`` that is not JSON is
broken, not plain text. Tables are the exception: only the extension ``.csv`` or ``.tsv``
distinguishes them from text. A Parquet file is recognised by its first bytes.

In a plain text file documents are separated by blank lines; if there is no blank line, every line
is a document.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdrun.data.tables import DELIMITERS, PARQUET_START, parse_csv, read_parquet
from kdrun.errors import InputError
from kdrun.paths import did_you_mean, expand_home

_JSON_START = re.compile(r"""\s*(\[\s*[\[{"\]]|\{\s*["}])""")
_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
_SUFFIXES = _JSON_SUFFIXES | {".txt", ".parquet", *DELIMITERS}
_LIST_KEYS = ("data", "train", "rows", "examples")
_BINARY_STARTS = {
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it first",
    b"\xff\xfe": "is UTF-16, not UTF-8; save it again as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8; save it again as UTF-8",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a row, for messages: a file (or data set) and a number from 1."""

    file: str
    number: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        """The position as messages name it, such as ``train.jsonl, line 12``."""
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON value or a document of plain text, and its position."""

    value: Any
    position: Position


def read_records(source: str | Path, *, as_text: bool = False) -> list[Record]:
    """Read every record of a file, or of a data set of the Hugging Face hub.

    Args:
        source: A file; or ``owner/name`` or ``owner/name:configuration``, if no such file
            exists, for a data set that the optional package ``datasets`` loads.
        as_text: Treat the file as plain text, even if it looks like JSON.

    Returns:
        At least one record, in the order of the file.

    Raises:
        InputError: It does not exist, is empty, is not UTF-8, or its JSON is broken.
    """
    path = expand_home(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder; choose one data file in it{_files_in(path)}")
    if not path.exists():
        if _is_hub_id(str(source)):
            return _read_hub(str(source))
        raise InputError(f"{source}: no such file{did_you_mean(path)}")
    name = str(source)
    data = _read_bytes(path, name)
    if data.startswith(PARQUET_START):
        return _numbered(read_parquet(path, name), name)
    text = _decode(data, name)
    if not text.strip():
        raise InputError(f"{name}: the file is empty; it must contain at least one row")
    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is not None:
        rows = parse_csv(text, name, delimiter)
        return _some([Record(row, Position(name, line)) for line, row in rows], name)
    is_json_file = path.suffix.lower() in _JSON_SUFFIXES
    if _JSON_START.match(text) or (is_json_file and not as_text):
        try:
            records = _parse_json(text, name)
        except InputError:
            if not as_text or is_json_file:
                raise
            records = _parse_text(text, name)
    else:
        records = _parse_text(text, name)
    return _some(records, name)


def _some(records: list[Record], name: str) -> list[Record]:
    if not records:
        raise InputError(f"{name}: the file contains no rows")
    return records


def _numbered(rows: list[Any], name: str) -> list[Record]:
    return _some([Record(row, Position(name, i, "row")) for i, row in enumerate(rows, 1)], name)


def _files_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    return f" ({', '.join(names[:3])})" if names else ""


def _is_hub_id(source: str) -> bool:
    """Distinguish ``owner/name`` from a misspelled path."""
    if not _HUB_ID.fullmatch(source):
        return False
    path = Path(source)
    return not path.parent.is_dir() and path.suffix.lower() not in _SUFFIXES


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error


def _decode(data: bytes, name: str) -> str:
    for start, cure in _BINARY_STARTS.items():
        if data.startswith(start):
            raise InputError(f"{name} {cure}")
    try:
        # Decode bytes instead of opening as text, to be independent of the platform's encoding;
        # "utf-8-sig" removes the byte-order mark that Windows editors write.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); "
            "save the file again as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_text(text: str, name: str) -> list[Record]:
    lines = text.split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    first, last = numbered[0][0], numbered[-1][0]
    if last - first + 1 == len(numbered):
        return [Record(line.strip(), Position(name, number)) for number, line in numbered]
    records: list[Record] = []
    paragraph: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            position = Position(name, number - len(paragraph))
            records.append(Record("\n".join(paragraph).strip(), position))
            paragraph = []
    return records


def _parse_json(text: str, name: str) -> list[Record]:
    if text.lstrip().startswith("["):
        return _from_document(_load_document(text, name), name)
    first = next(line for line in text.split("\n") if line.strip())
    try:
        json.loads(first)
    except ValueError as error:
        if _ends_early(error, first):
            return _parse_spread_out(text, name)
    return _parse_json_lines(text, name)


def _ends_early(error: ValueError, line: str) -> bool:
    """Return whether a line is JSON that continues on the next line."""
    return isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip())


def _parse_spread_out(text: str, name: str) -> list[Record]:
    """Parse one object on several lines, or else JSON lines whose first line is truncated."""
    try:
        return _from_document(_load_document(text, name), name)
    except InputError:
        if any(_is_object(line) for line in text.split("\n")):
            return _parse_json_lines(text, name)
        raise


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse_json_lines(text: str, name: str) -> list[Record]:
    records = []
    # Not splitlines(), which also splits at U+2028 and others that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(Record(json.loads(line), Position(name, number)))
        except ValueError as error:
            raise _broken_json(name, number, error) from error
    return records


def _load_document(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _broken_json(name, getattr(error, "lineno", 1), error) from error


def _broken_json(name: str, line: int, error: ValueError) -> InputError:
    what = (
        f"{error.msg}, column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else str(error).splitlines()[0]
    )
    return InputError(
        f"{name}, line {line}: broken JSON ({what}); fix the line, or for plain text "
        "use the extension .txt and data.format=text"
    )


def _from_document(document: Any, name: str) -> list[Record]:
    rows = document if isinstance(document, list) else [document]
    if isinstance(document, dict):
        lists = [document[key] for key in _LIST_KEYS if isinstance(document.get(key), list)]
        if len(lists) == 1:
            rows = lists[0]
    return [Record(row, Position(name, number, "row")) for number, row in enumerate(rows, 1)]


def _read_hub(source: str) -> list[Record]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{source}: no such file; to read it as a data set of the Hugging Face hub, "
            "install the package that loads them: pip install 'kdlosses[data]'"
        ) from error
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:
        # The package raises any error of its many back-ends; report it as one line.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{source}: no such file, and not a data set that the hub can provide ({reason})"
        ) from error
    records = [Record(dict(row), Position(source, i, "row")) for i, row in enumerate(rows, 1)]
    if not records:
        raise InputError(f"{source}: the data set's split 'train' contains no rows")
    return records
