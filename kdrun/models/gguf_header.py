"""One number out of the head of a GGUF file, without the seconds that reading all of it takes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_LONGEST_KEY = 2**16  # as the format has it; a damaged length would take all memory
# Of the types of values, the format and the size of those that have one.
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
    """The longest row that a GGUF file's model was made for; None where the file does not tell.

    Args:
        file: little-endian, of version 2 or later, as they are today.
    """
    try:
        with open(file, "rb") as stream:
            if stream.read(4) != _MAGIC or _number(stream, "I") < 2:
                return None
            _number(stream, "Q")  # the count of tensors
            for _ in range(_number(stream, "Q")):
                key = stream.read(min(_number(stream, "Q"), _LONGEST_KEY))
                kind = _number(stream, "I")
                if key.endswith(b".context_length") and kind in _FORMATS:
                    return _number(stream, _FORMATS[kind])
                _skip(stream, kind)
    except (OSError, struct.error, KeyError, ValueError, OverflowError, RecursionError):
        return None  # a damaged file is told of where it is loaded
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
