"""Adds to pyarrow's codecs: text line by line, with the line in every error.

Compression is recognised by content (gzip, zstd, bz2, xz).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from kdrun.errors import InputError

HEAD = 2**16
"""Bytes that are read at once, and looked at to recognise a file."""
_BINARY_STARTS = {
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\xff\xfe": "is UTF-16, not UTF-8; save it again as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8; save it again as UTF-8",
}
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError)
_BOM = b"\xef\xbb\xbf"


def _open_plain(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow as pa

    return cast("IO[bytes]", pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


_CODECS: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bz2", bz2.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("zstd", _open_zstd),
}


def inner_suffix(path: Path) -> str:
    """Return the suffix of a file's content, which a suffix of compression may follow."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in (".gz", ".zst", ".bz2", ".xz"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class TextFile:
    """A text file, possibly compressed, which can be read several times.

    Args:
        path: its place.
        name: its name for messages.

    Attributes:
        name: the same.
        suffix: of its content.

    Raises:
        InputError: it cannot be read, or is an archive or UTF-16.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self.name, self.suffix = path, name, inner_suffix(path)
        with self._reading():
            with open(path, "rb") as stream:
                start = stream.read(16)
            codecs = (codec for magic, codec in _CODECS.items() if start.startswith(magic))
        self._codec: str
        self._open: Callable[[Path], Any]
        self._codec, self._open = next(codecs, ("", _open_plain))
        self.head = self._read_head()
        for magic, cure in _BINARY_STARTS.items():
            if self.head.startswith(magic):
                raise InputError(f"{name} {cure}")
        # Files of old Macs, whose lines end with a carriage return alone.
        self._returns = b"\r" in self.head and b"\n" not in self.head

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield each line without its end, with its number from 1.

        Raises:
            InputError: a line is not UTF-8, or the compressed data are damaged.
        """
        number = 0
        try:
            with self._open(self._path) as stream:
                for raw in self._raw_lines(stream):
                    number += 1
                    yield number, self._decode(raw, number)
        except _BROKEN as error:
            raise self._damaged(number, error) from error

    def text(self) -> str:
        """Return the whole content, with line feeds as ends of lines.

        Raises:
            InputError: as for :meth:`lines`.
        """
        return "\n".join(line for _, line in self.lines())

    def pieces(self) -> Iterator[str]:
        """Yield the content in pieces of whole lines."""
        block: list[str] = []
        size = 0
        for _, line in self.lines():
            block.append(line)
            size += len(line)
            if size > HEAD:
                yield "\n".join([*block, ""])
                block, size = [], 0
        yield "\n".join(block)

    def _raw_lines(self, stream: IO[bytes]) -> Iterator[bytes]:
        if self._returns:
            yield from stream.read().removeprefix(_BOM).split(b"\r")
            return
        first = True
        for raw in _split(stream):
            yield (raw.removeprefix(_BOM) if first else raw).rstrip(b"\r")
            first = False

    def _decode(self, raw: bytes, number: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.name}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the "
                "file again as UTF-8"
            ) from error

    def _read_head(self) -> bytes:
        try:
            with self._open(self._path) as stream:
                return bytes(stream.read(HEAD)).removeprefix(_BOM)
        except _BROKEN as error:
            raise self._damaged(0, error) from error

    def _damaged(self, line: int, error: Exception) -> InputError:
        if not self._codec:
            reason = getattr(error, "strerror", None) or str(error)
            return InputError(f"{self.name}: cannot be read ({reason})")
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return InputError(
            f"{self.name}: its {self._codec} data are damaged after line {line} ({reason}); "
            "compress or copy the file again"
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror})") from error


def _split(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield lines without line feeds; streams of pyarrow are no iterators of lines."""
    rest = b""
    while block := stream.read(HEAD):
        *whole, rest = (rest + bytes(block)).split(b"\n")
        yield from whole
    if rest:
        yield rest
