"""Paths as the user gives them, and help for those that do not exist."""

from __future__ import annotations

import difflib
import tempfile
from pathlib import Path

from kdrun.errors import InputError


def expand_home(given: str | Path) -> Path:
    """Return a path with ``~`` or ``~user`` replaced by the home folder.

    Raises:
        InputError: there is no such home folder.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{given}: no home folder is known for {Path(given).parts[0]}; write the full path, or "
            f"./{given} for a name in this folder"
        ) from error


def make_output_folder(folder: Path) -> None:
    """Create the output folder of a command, and check that files can be created in it.

    Raises:
        InputError: it is a file or cannot be written.
    """
    if folder.is_file():
        raise InputError(f"--output {folder} is a file; choose a writable folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--output {folder}: {reason}; choose a writable folder") from error


def close_paths(path: Path, limit: int = 3) -> list[str]:
    """Return existing paths whose last differing part is spelled like that of ``path``.

    Args:
        path: A path that does not exist.
        limit: The most paths to return.

    Returns:
        Paths as the user would write them, the closest first; empty if nothing is close.
    """
    missing = path
    while not missing.parent.is_dir():
        if missing.parent == missing:
            return []
        missing = missing.parent
    try:
        names = {entry.name.casefold(): entry.name for entry in missing.parent.iterdir()}
    except OSError:
        return []
    close = difflib.get_close_matches(missing.name.casefold(), names, n=limit, cutoff=0.6)
    return [str(missing.with_name(names[name])) for name in close]


def did_you_mean(path: Path) -> str:
    """``"; did you mean A or B?"`` for a missing path, or an empty string."""
    close = close_paths(path)
    return f"; did you mean {' or '.join(close)}?" if close else ""
