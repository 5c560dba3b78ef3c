"""Adds to datasets' loaders: what a name stands for, and one line where it stands for nothing.

A source is a file, a glob, a folder of files, a folder that ``datasets`` saved, or a data set of
the Hugging Face hub: ``owner/name``, ``owner/name:configuration@split``.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrun.data.records import JSON_SUFFIXES, Position, Record, read_text_file
from kdrun.data.streams import TextFile, inner_suffix
from kdrun.data.tables import ARROW_START, DELIMITERS, PARQUET_START, columns_of, read_table
from kdrun.errors import InputError
from kdrun.paths import did_you_mean, expand_home

_SUFFIXES = JSON_SUFFIXES | {".txt", ".parquet", ".arrow", *DELIMITERS}
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?(?:#([\w./-]+))?")
_TRAIN = "train"


@dataclass(frozen=True)
class FilePart:
    """A file of a source.

    Attributes:
        path: its place.
        name: its name for messages.
    """

    path: Path
    name: str

    @property
    def kind(self) -> str | None:
        """``Parquet`` or ``Arrow`` for such a table."""
        with open(self.path, "rb") as stream:
            start = stream.read(8)
        if start.startswith(PARQUET_START):
            return "Parquet"
        return "Arrow" if start.startswith(ARROW_START) else None

    def records(self, as_text: bool) -> Iterator[Record]:
        """Yield its records."""
        try:
            kind = self.kind
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror})") from error
        if kind is None:
            yield from read_text_file(TextFile(self.path, self.name), as_text)
            return
        for number, row in enumerate(read_table(self.path, self.name, kind), 1):
            yield Record(row, Position(self.name, number, "row"))

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.path.stat().st_size

    def fingerprint(self) -> str:
        """Return a hash of its content."""
        try:
            with open(self.path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class TablePart:
    """A data set of the package ``datasets``, of the hub or from a folder.

    Attributes:
        table: the data set.
        name: its name for messages.
    """

    table: Any = field(repr=False)
    name: str

    def records(self, as_text: bool) -> Iterator[Record]:
        """Yield its rows; they are the same as text."""
        del as_text
        number = 0
        for batch in self.table.iter(1000):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                row = dict(zip(columns, values, strict=True))
                yield Record(row, Position(self.name, number, "row"))

    @property
    def size(self) -> int:
        """Its bytes."""
        return int(self.table.data.nbytes)

    def fingerprint(self) -> str:
        """Return the package's own fingerprint."""
        return str(self.table._fingerprint)


Part = FilePart | TablePart


def find_parts(source: str | Path, streaming: bool = False) -> list[Part]:
    """Return the files or the data set that a name stands for.

    Args:
        source: a file, glob, folder, or data set of the hub, if nothing on the disk has its name.
        streaming: whether a data set of the hub is fetched while it is read.

    Raises:
        InputError: there is none; gives similar names.
    """
    path = expand_home(source)
    named, split = _saved_split(path)
    if named is not None:
        return [_load_saved(named, split, str(source))]
    if path.is_dir():
        return _alike(_files_in(path, str(source)))
    if path.exists():
        return [FilePart(path, str(source))]
    if glob.has_magic(str(source)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            raise InputError(f"{source}: no file has a name of this form{_near_glob(path)}")
        return _alike([FilePart(file, str(file)) for file in files])
    if _is_hub_id(str(source)):
        return [_load_hub(str(source), streaming)]
    raise InputError(f"{source}: no such file{did_you_mean(path)}")


def _files_in(folder: Path, name: str) -> list[FilePart]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if inner_suffix(file) in _SUFFIXES
        and file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"{name}: the folder contains no data file ({_known_suffixes()})")
    suffixes = {inner_suffix(file) for file in files}
    if len({"JSON" if suffix in JSON_SUFFIXES else suffix for suffix in suffixes}) > 1:
        raise InputError(
            f"{name}: the folder contains files of several kinds ({', '.join(sorted(suffixes))}); "
            f"pass those of one kind, such as '{name}/*{min(suffixes)}'"
        )
    return [FilePart(file, str(Path(name) / file.relative_to(folder))) for file in files]


def _known_suffixes() -> str:
    return ", ".join(sorted(_SUFFIXES))


def _near_glob(path: Path) -> str:
    folder = path.parent
    if glob.has_magic(str(folder)) or not folder.is_dir():
        return ""
    names = sorted(file.name for file in folder.iterdir() if inner_suffix(file) in _SUFFIXES)
    return f"; {folder} contains {', '.join(names[:3])}" if names else ""


def _alike(files: list[FilePart]) -> list[Part]:
    """Refuse tables whose columns differ.

    Raises:
        InputError: names the file and the columns.
    """
    first: tuple[str, list[str]] | None = None
    for file in files:
        kind = file.kind
        if kind is None:
            continue
        columns = columns_of(file.path, file.name, kind)
        if first is None:
            first = file.name, columns
        elif set(columns) != set(first[1]):
            odd = ", ".join(sorted(set(columns) ^ set(first[1])))
            raise InputError(
                f"{file.name}: its columns are not those of {first[0]} (they differ in {odd}); "
                "pass files of one form as one source, and others as another"
            )
    return list(files)


def _saved_split(path: Path) -> tuple[Path | None, str | None]:
    """Return the folder and the split of a data set that ``datasets`` saved; None for another."""
    plain, _, split = path.name.partition("@")
    for folder, chosen in ((path, None), (path.with_name(plain) if split else path, split or None)):
        if folder.is_dir() and any((folder / name).is_file() for name in _SAVED):
            return folder, chosen
    return None, None


def _load_saved(folder: Path, split: str | None, name: str) -> Part:
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # of whatever version wrote it
        raise InputError(
            f"{name}: not a data set that this version of datasets ({datasets.__version__}) can "
            f"read ({_reason(error)}); save it again with this version"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        wanted = split or _TRAIN
        if wanted not in found:
            raise InputError(f"{name}: {_no_split(wanted, list(found))}")
        found = found[wanted]
    return TablePart(_some(found, name), name)


def _is_hub_id(source: str) -> bool:
    """Distinguish ``owner/name`` from a misspelled path."""
    if not _HUB_ID.fullmatch(source):
        return False
    path = Path(source)
    return not path.parent.is_dir() and inner_suffix(path) not in _SUFFIXES


def _load_hub(source: str, streaming: bool) -> Part:
    import datasets

    match = _HUB_ID.fullmatch(source)
    assert match is not None, "a hub id has been recognised"
    name, configuration, split, revision = match.groups()
    try:
        more: dict[str, Any] = {} if revision is None else {"revision": revision}
        if streaming:
            more["streaming"] = True
        table: Any = datasets.load_dataset(name, configuration, split=split or _TRAIN, **more)
    except Exception as error:
        # The package raises any error of its many back-ends; report it as one line.
        known = re.findall(r"'([\w.-]+)'", str(error)) if "Should be one of" in str(error) else []
        if known or "Unknown split" in str(error):
            raise InputError(f"{source}: {_no_split(split or _TRAIN, known)}") from error
        raise InputError(
            f"{source}: no such file, and not a data set that the hub can provide "
            f"({_reason(error)})"
        ) from error
    return TablePart(table if streaming else _some(table, source), source)


def _no_split(wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean @{close[0]}?" if close else f"there are {', '.join(known)}"
    return f"the data set has no split {wanted!r}; {hint}"


def _some(table: Any, name: str) -> Any:
    if not len(table):
        raise InputError(f"{name}: the data set contains no rows")
    return table


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
