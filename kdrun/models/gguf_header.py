"""Read one number from the header of a GGUF file, much faster than the whole file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_LONGEST_KEY = 2**16  # limit of the format; a damaged length would take all memory
# Format and size of each value type of fixed size.
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def context_length(file: Path) -> int | None:
    """Return the maximum row length of a GGUF file's model; None if the file does not state it.

    Args:
        file: little-endian, version 2 or later, as all current files are.
    """
    try:
        with open(file, "rb") as stream:
            if stream.read(4) != _MAGIC or _number(stream, "I") < 2:
                return None
            _number(stream, "Q")  # the number of tensors
            for _ in range(_number(stream, "Q")):
                key = stream.read(min(_number(stream, "Q"), _LONGEST_KEY))
                kind = _number(stream, "I")
                if key.endswith(b".context_length") and kind in _FORMATS:
                    return _number(stream, _FORMATS[kind])
                _skip(stream, kind)
    except (OSError, struct.error, KeyError, ValueError, OverflowError, RecursionError):
        return None  # damage is reported when the file is loaded
    return None


def _number(stream: BinaryIO, kind: str) -> int:
    (value,) = struct.unpack(f"<{kind}", stream.read(struct.calcsize(f"<{kind}")))
    return int(value)


def _skip(stream: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        stream.seek(_number(stream, "Q"), 1)
    elif kind != _ARRAY:
        stream.seek(struct.calcsize(f"<{_FORMATS[kind]}"), 1)
    else:
        inner, count = _number(stream, "I"), _number(stream, "Q")
        if inner in _FORMATS:
            stream.seek(count * struct.calcsize(f"<{_FORMATS[inner]}"), 1)
        else:
            for _ in range(count):
                _skip(stream, inner)
