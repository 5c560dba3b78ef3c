"""The named fields of a record, which remember what was read: nothing is dropped in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


class BadRowError(Exception):
    """A single record cannot be used; the message is the reason, such as an empty field."""


class Fields:
    """The fields of an object, which knows which of them were read.

    Args:
        value: what stands in the file.
        prefix: before the names of the fields, where the object is part of another.

    Raises:
        BadRowError: it is no object.
    """

    def __init__(self, value: Any, prefix: str = "") -> None:
        if not isinstance(value, dict):
            raise BadRowError(f"is {kind_of(value)}, not an object with fields")
        self._values: dict[str, Any] = value
        self._prefix = prefix
        self._read: set[str] = set()
        self._inner: list[Fields] = []
        self._left_out: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def has(self, name: str) -> bool:
        """Whether a field is there and says something; it does not count as read."""
        return _says_something(self._values.get(name))

    def get(self, name: str) -> Any:
        """What a field holds, or None."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str:
        """The text of a field that must not be empty.

        Raises:
            BadRowError: it is absent, missing, empty, or no text.
        """
        if name not in self._values:
            raise BadRowError(f"has no field {name!r}")
        text = self.optional_text(name)
        if not text:
            value = self._values[name]
            missing = isinstance(value, float) or value is None
            state = f"set to {_missing_as(value)}" if missing else "empty"
            raise BadRowError(f"has the field {name!r} {state}")
        return text

    def optional_text(self, name: str | None) -> str:
        """The text of a field, or an empty string where it is absent, missing or blank.

        Raises:
            BadRowError: it is neither text nor a number.
        """
        if name is None:
            return ""
        value = self.get(name)
        if is_missing(value):
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
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
        """The fields of an object inside a field.

        Raises:
            BadRowError: it is no object.
        """
        fields = Fields(value, f"{self._prefix}{name}.")
        self._inner.append(fields)
        return fields

    def leave_out(self, what: str) -> None:
        """Note that something is read and not used."""
        self._left_out.append(f"{self._prefix}{what}")

    def unused(self) -> Iterator[str]:
        """What says something and was not read, by name, and what was left out."""
        for name, value in self._values.items():
            if name not in self._read and _says_something(value):
                yield f"{self._prefix}{name}"
        yield from self._left_out
        for fields in self._inner:
            yield from fields.unused()


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, or what tables write for it."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", dict: "an object", bool: "true or false", str: "text"}
    return "null" if value is None else names.get(type(value), "a number")


def _missing_as(value: Any) -> str:
    if value is None:
        return "null"
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _says_something(value: Any) -> bool:
    return not is_missing(value) and (not isinstance(value, str | list | dict) or bool(value))
