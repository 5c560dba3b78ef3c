"""The folder of a comparison: an atomic record per trial, and a lock while the trial runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdrun.compare.record import Record
from kdrun.errors import InputError
from kdrun.files import lock_file, write_text
from kdrun.paths import did_you_mean, make_output_folder
from kdrun.run.folder import CONFIG

COMPARISON, RECORDS, TRIALS, LOCKS = "comparison.yaml", "records", "trials", "locks"


class Ledger:
    """The records of a comparison's trials.

    Args:
        folder: folder of the comparison; created if it does not exist.

    Raises:
        InputError: the folder cannot be written, or contains something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_dir() and not (folder / COMPARISON).is_file() and _holds_more(folder):
            raise InputError(
                f"--output {folder} is not empty and contains no comparison; choose another folder"
            )
        for name in ("", RECORDS, TRIALS, LOCKS):
            make_output_folder(folder / name)

    @classmethod
    def of(cls, folder: Path) -> Ledger:
        """The ledger of a folder that contains a comparison.

        Raises:
            InputError: the folder contains no comparison.
        """
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder{did_you_mean(folder)}")
        if not (folder / COMPARISON).is_file():
            what = "is the folder of a run:" if (folder / CONFIG).is_file() else "is no comparison:"
            raise InputError(
                f"{folder} {what} it has no {COMPARISON}; pass the --output of kdrun compare-losses"
            )
        return cls(folder)

    def settings(self) -> dict[str, Any] | None:
        """The settings written by :meth:`declare`, or None for a new comparison.

        Raises:
            InputError: the file was edited and is not valid.
        """
        path = self.folder / COMPARISON
        if not path.is_file():
            return None
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise InputError(f"{path}: expected the settings of a comparison; was the file edited?")
        return found

    def declare(self, settings: dict[str, Any]) -> None:
        """Write the settings of the comparison atomically."""
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_text(self.folder / COMPARISON, text)

    def records(self) -> list[Record]:
        """All records, in the order of their names.

        Raises:
            InputError: a record was edited, or does not belong to the trial in its name.
        """
        return [self._read(path) for path in sorted((self.folder / RECORDS).glob("*.json"))]

    def has(self, identity: str) -> bool:
        """Whether a trial has a record."""
        return self._path(identity).is_file()

    def add(self, record: Record) -> None:
        """Write a record with its checksum atomically."""
        sealed = record.model_copy(update={"checksum": record.digest()})
        write_text(self._path(record.id), sealed.model_dump_json(indent=1) + "\n")

    def trial_folder(self, identity: str) -> Path:
        """The run folder of a trial."""
        return self.folder / TRIALS / identity

    @contextmanager
    def claim(self, identity: str) -> Iterator[bool]:
        """Lock a trial while it runs; yields False if another process holds it or it has a record.

        The lock is released when its process ends, even if the process is killed.
        """
        with open(self.folder / LOCKS / identity, "w", encoding="utf-8") as stream:
            if not lock_file(stream):
                yield False
                return
            yield not self.has(identity)

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Wait for a lock of the folder and hold it."""
        with open(self.folder / LOCKS / name, "w", encoding="utf-8") as stream:
            lock_file(stream, wait=True)
            yield

    def _path(self, identity: str) -> Path:
        return self.folder / RECORDS / f"{identity}.json"

    def _read(self, path: Path) -> Record:
        try:
            record = Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValidationError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise InputError(
                f"{path}: not the record of a trial ({reason}); restore it, or delete it to run "
                "the trial again"
            ) from error
        if record.id != path.stem:
            raise InputError(
                f"{path}: contains the record of {record.id}; restore it, or delete it to run the "
                "trial again"
            )
        if record.checksum not in (None, record.digest()):
            raise InputError(
                f"{path}: was edited, because its checksum does not match; restore it, or delete "
                "it to run the trial again"
            )
        return record


def _holds_more(folder: Path) -> bool:
    """Whether a folder contains more than a comparison that was killed at its start leaves."""
    ours = (RECORDS, TRIALS, LOCKS, f".{COMPARISON}.partial")
    if any(entry.name not in ours for entry in folder.iterdir()):
        return True
    return any((folder / name).is_dir() and any((folder / name).iterdir()) for name in ours[:2])
