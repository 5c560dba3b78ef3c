"""Adds to datasets' columns: which were read, so that none is dropped in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

# Checked in this order: true is also a number, and a datetime is also a date.
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    ((int, float, Decimal), "a number"),
    (str, "text"),
    (list, "a list"),
    (dict, "an object"),
    (datetime, "a date and time"),
    (date, "a date"),
    (time, "a time"),
    (bytes, "bytes"),
)


class BadRowError(Exception):
    """A single record cannot be used; the message is the reason, such as an empty field."""


class Fields:
    """The fields of an object, tracking which of them were read.

    Args:
        value: the value in the file.
        prefix: prefix of field names, if the object is part of another.

    Raises:
        BadRowError: it is not an object.
    """

    def __init__(self, value: Any, prefix: str = "") -> None:
        if not isinstance(value, dict):
            raise BadRowError(f"is {kind_of(value)}, not an object with fields")
        self._values: dict[str, Any] = value
        self._prefix = prefix
        self._read: set[str] = set()
        self._inner: list[Fields] = []
        self._left_out: list[str] = []
        self._said: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def has(self, name: str) -> bool:
        """Return whether a field exists with a value; it does not count as read."""
        return _says_something(self._values.get(name))

    def peek(self, name: str) -> Any:
        """Return the value of a field, or None; it does not count as read."""
        return self._values.get(name)

    def get(self, name: str) -> Any:
        """Return the value of a field, or None."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str:
        """Return the text of a field that must not be empty.

        Raises:
            BadRowError: it is absent, missing, empty, or not text.
        """
        if name not in self._values:
            raise BadRowError(f"has no field {name!r}")
        text = self.optional_text(name)
        if not text:
            value = self._values[name]
            state = f"set to {_missing_as(value)}" if is_missing(value) else "empty"
            raise BadRowError(f"has the field {name!r} {state}")
        return text

    def optional_text(self, name: str | None) -> str:
        """Return the text of a field, or an empty string if it is absent, missing or blank.

        Raises:
            BadRowError: it is neither text nor a number.
        """
        if name is None:
            return ""
        value = self.get(name)
        if is_missing(value):
            return ""
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise BadRowError(f"has the field {name!r} as {kind_of(value)}, not as text")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadRowError(f"has half of a character (a surrogate) in {name!r}") from error
        return value if value.strip() else ""

    def inner(self, value: Any, name: str) -> Fields:
        """Return the fields of an object inside a field.

        Raises:
            BadRowError: it is not an object.
        """
        fields = Fields(value, f"{self._prefix}{name}.")
        self._inner.append(fields)
        return fields

    def leave_out(self, what: str) -> None:
        """Note that something was read but not used."""
        self._left_out.append(f"{self._prefix}{what}")

    def say(self, what: str) -> None:
        """Note how something was used, which is told with the number of rows."""
        self._said[what] = None

    def said(self) -> tuple[str, ...]:
        """Return what was noted, each once."""
        return tuple(self._said)

    def unused(self) -> Iterator[str]:
        """Return the names of unread fields with a value, and of noted ones."""
        for name, value in self._values.items():
            if name not in self._read and _says_something(value):
                yield f"{self._prefix}{name}"
        yield from self._left_out
        for fields in self._inner:
            yield from fields.unused()


def is_missing(value: Any) -> bool:
    """Return whether a value is missing: null, or its equivalent in tables."""
    return value is None or (isinstance(value, float | Decimal) and not math.isfinite(value))


def kind_of(value: object) -> str:
    """Describe the type of a value of JSON or of a table."""
    if value is None:
        return "null"
    found = next((words for kind, words in _KINDS if isinstance(value, kind)), None)
    return found or f"a value of the type {type(value).__name__}"


def _missing_as(value: Any) -> str:
    if value is None:
        return "null"
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _says_something(value: Any) -> bool:
    return not is_missing(value) and (not isinstance(value, str | list | dict) or bool(value))
