"""The folder of a comparison: one atomic record a trial, and a lock while it runs."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdrun.compare.record import Record
from kdrun.errors import InputError
from kdrun.runs import write_text

COMPARISON, RECORDS, TRIALS, LOCKS = "comparison.yaml", "records", "trials", "locks"


class Ledger:
    """What is known of a comparison's trials.

    Args:
        folder: of the comparison; made where it is not there.

    Raises:
        InputError: it cannot be written, or holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_file():
            raise InputError(f"--output {folder} is a file; name a folder")
        foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / COMPARISON).is_file()
        if foreign:
            raise InputError(
                f"--output {folder} is not empty and holds no comparison; name another folder"
            )
        try:
            for name in (RECORDS, TRIALS, LOCKS):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--output {folder}: {error.strerror}; name a writable folder"
            ) from error

    def settings(self) -> dict[str, Any] | None:
        """What :meth:`declare` wrote, or None for a new comparison.

        Raises:
            InputError: the file was edited into something else.
        """
        path = self.folder / COMPARISON
        if not path.is_file():
            return None
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise InputError(f"{path}: expected the settings of a comparison; was it edited?")
        return found

    def declare(self, settings: dict[str, Any]) -> None:
        """Write the settings of the comparison, whole or not at all."""
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_text(self.folder / COMPARISON, text)

    def records(self) -> list[Record]:
        """All records, in the order of their names.

        Raises:
            InputError: a record was edited into something that is none, or belongs to another
                trial than its name says.
        """
        return [self._read(path) for path in sorted((self.folder / RECORDS).glob("*.json"))]

    def has(self, identity: str) -> bool:
        """Whether a trial has ended."""
        return self._path(identity).is_file()

    def add(self, record: Record) -> None:
        """Write a record, whole or not at all."""
        write_text(self._path(record.id), record.model_dump_json(indent=1) + "\n")

    def trial_folder(self, identity: str) -> Path:
        """Where a trial's run goes."""
        return self.folder / TRIALS / identity

    @contextmanager
    def claim(self, identity: str) -> Iterator[bool]:
        """Hold a trial while it runs; False where another process holds it or it has ended.

        The lock goes with its process, so a killed one leaves nothing behind.
        """
        with open(self.folder / LOCKS / identity, "w", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not self.has(identity)

    def _path(self, identity: str) -> Path:
        return self.folder / RECORDS / f"{identity}.json"

    def _read(self, path: Path) -> Record:
        try:
            record = Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValidationError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise InputError(
                f"{path}: not the record of a trial ({reason}); restore it, or delete it to have "
                "the trial run again"
            ) from error
        if record.id != path.stem:
            raise InputError(
                f"{path}: holds the record of {record.id}; restore it, or delete it to have the "
                "trial run again"
            )
        return record
