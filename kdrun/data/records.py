"""Adds to datasets' JSON reader: files judged by content, one row at a time, errors by line.

A file that begins like JSON (``[{``, ``["``, ``{"``) is a JSON list, a JSON object that contains
one, or JSON lines; everything else is plain text. The extension only decides what is an error: a
file called ``.json`` or ``.jsonl`` that is not JSON is broken, not plain text. Tables are the
exception: only the extension ``.csv`` or ``.tsv`` distinguishes them from text.

In a plain text file documents are separated by blank lines; if there is no blank line, every line
is a document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kdrun.data.streams import TextFile
from kdrun.data.tables import DELIMITERS, read_csv
from kdrun.errors import InputError

JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
_JSON_START = re.compile(r"""\s*(\[\s*[\[{"\]]|\{\s*["}])""")
_LIST_KEYS = ("data", "train", "rows", "examples")
_SPACE = re.compile(r"\s*")
_UNFINISHED = 64
"""A JSON error this close to the end of what was read may be due to the end."""


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


def read_text_file(file: TextFile, as_text: bool) -> Iterator[Record]:
    """Yield the records of a file.

    Args:
        file: not a Parquet file.
        as_text: treat it as plain text, even if it looks like JSON.

    Raises:
        InputError: it is empty or broken; names the line.
    """
    if not file.head.strip() and not any(line.strip() for _, line in file.lines()):
        raise InputError(f"{file.name}: the file is empty; it must contain at least one row")
    delimiter = DELIMITERS.get(file.suffix)
    if delimiter is not None:
        for line, row in read_csv(file, delimiter):
            yield Record(row, Position(file.name, line))
        return
    head = file.head.decode("utf-8", errors="replace")
    is_json_file = file.suffix in JSON_SUFFIXES
    if not _JSON_START.match(head) and not (is_json_file and not as_text):
        yield from _read_documents(file)
    elif as_text and not is_json_file:
        yield from _read_documents(file) if _is_broken(file, head) else _read_json(file, head)
    else:
        yield from _read_json(file, head)


def _is_broken(file: TextFile, head: str) -> bool:
    try:
        for _ in _read_json(file, head):
            pass
    except InputError:
        return True
    return False


def _read_documents(file: TextFile) -> Iterator[Record]:
    spread = _has_blank_lines(file)
    paragraph: list[str] = []
    first = 0
    for number, line in file.lines():
        if line.strip():
            if not spread:
                yield Record(line.strip(), Position(file.name, number))
                continue
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Record("\n".join(paragraph).strip(), Position(file.name, first))
            paragraph = []
    if paragraph:
        yield Record("\n".join(paragraph).strip(), Position(file.name, first))


def _has_blank_lines(file: TextFile) -> bool:
    """Return whether a blank line stands between others."""
    begun = blank = False
    for _, line in file.lines():
        if not line.strip():
            blank = begun
        elif blank:
            return True
        else:
            begun = True
    return False


def _read_json(file: TextFile, head: str) -> Iterator[Record]:
    if head.lstrip().startswith("["):
        yield from _read_list(file)
        return
    first = next((line for _, line in file.lines() if line.strip()), "")
    try:
        json.loads(first)
    except ValueError as error:
        if _ends_early(error, first):
            yield from _read_spread_out(file)
            return
    yield from _read_json_lines(file)


def _ends_early(error: ValueError, line: str) -> bool:
    """Return whether a line is JSON that continues on the next line."""
    return isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip())


def _read_spread_out(file: TextFile) -> Iterator[Record]:
    """Read one object on several lines, or else JSON lines whose first line is truncated."""
    try:
        document = _load_document(file)
    except InputError:
        if any(_is_object(line) for _, line in file.lines()):
            yield from _read_json_lines(file)
            return
        raise
    rows = [document]
    if isinstance(document, dict):
        lists = [document[key] for key in _LIST_KEYS if isinstance(document.get(key), list)]
        if len(lists) == 1:
            rows = lists[0]
    for number, row in enumerate(rows, 1):
        yield Record(row, Position(file.name, number, "row"))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_json_lines(file: TextFile) -> Iterator[Record]:
    for number, line in file.lines():
        if not line.strip():
            continue
        try:
            yield Record(json.loads(line), Position(file.name, number))
        except ValueError as error:
            raise _broken_json(file.name, number, error) from error


class _ListReader:
    """Reads the values of a JSON list one by one; ``json`` would hold all of them.

    Args:
        file: begins with a bracket.
    """

    def __init__(self, file: TextFile) -> None:
        self._name = file.name
        self._pieces = file.pieces()
        self._text, self._place = "", 0
        self._line, self._column = 1, 0  # of the beginning of the text
        self._decoder = json.JSONDecoder()

    def values(self) -> Iterator[Any]:
        """Yield the values.

        Raises:
            InputError: the JSON is broken; names the line.
        """
        self._next()
        self._place += 1
        if self._next() == "]":
            self._place += 1
        else:
            yield self._value()
            while self._next() == ",":
                self._place += 1
                self._next()
                yield self._value()
            if self._next() != "]":
                raise self._broken("Expecting ',' delimiter", self._place)
            self._place += 1
        if self._next():
            raise self._broken("Extra data", self._place)

    def _next(self) -> str:
        """Return the next character that is not white space; nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._place)
            assert found is not None, "the pattern matches nothing, too"
            self._place = found.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read_more():
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self._text) - _UNFINISHED or "Unterminated" in error.msg
                if not cut_off or not self._read_more():
                    raise self._broken(error.msg, error.pos) from error
            except ValueError as error:  # a number of too many digits
                raise self._broken(str(error).splitlines()[0], self._place) from error
            else:
                if end < len(self._text) or not self._read_more():  # a number may go on
                    self._place = end
                    return value

    def _read_more(self) -> bool:
        """Drop what was read and read as much again as is left; False at the end of the file."""
        left, pieces, size = len(self._text) - self._place, [], 0
        for piece in self._pieces:
            pieces.append(piece)
            size += len(piece)
            if size > left:
                break
        if not size:
            return False
        dropped = self._text[: self._place]
        lines = dropped.count("\n")
        self._line += lines
        self._column = len(dropped) - dropped.rfind("\n") - 1 + (0 if lines else self._column)
        self._text, self._place = "".join([self._text[self._place :], *pieces]), 0
        return True

    def _broken(self, what: str, place: int) -> InputError:
        before = self._text[:place]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") + (0 if lines else self._column)
        return _broken_json(self._name, self._line + lines, f"{what}, column {column}")


def _read_list(file: TextFile) -> Iterator[Record]:
    for number, value in enumerate(_ListReader(file).values(), 1):
        yield Record(value, Position(file.name, number, "row"))


def _load_document(file: TextFile) -> Any:
    text = file.text()
    try:
        return json.loads(text)
    except ValueError as error:
        raise _broken_json(file.name, getattr(error, "lineno", 1), error) from error


def _broken_json(name: str, line: int, error: ValueError | str) -> InputError:
    what = str(error).splitlines()[0]
    if isinstance(error, json.JSONDecodeError):
        what = f"{error.msg}, column {error.colno}"
    return InputError(
        f"{name}, line {line}: broken JSON ({what}); fix the line, or for plain text "
        "use the extension .txt and data.format=text"
    )
