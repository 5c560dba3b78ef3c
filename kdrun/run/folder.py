"""The folder of a run: its contents, and which folders a new run may use."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from kdrun.config.load import stated_values, validate
from kdrun.data.templates import USUAL_RENDERING, Rendering
from kdrun.errors import InputError, Interrupted, TrainingError, UnwritableError, signal_of
from kdrun.files import LOCK, remove
from kdrun.models.locate import STUDENT
from kdrun.paths import expand_home, make_output_folder
from kdrun.training.checkpoint import newest_complete

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
ANSWERS = "answers.jsonl"
CHECKPOINTS, BEFORE = "checkpoints", "before.json"
REHEARSAL = "rehearsal"
WEIGHTS = "written-with"
TENSORBOARD = "tensorboard"
INPUTS = "inputs.safetensors"
"""Record of the rows and models that the run began with."""
ADAPTER, BASE = "adapter", "base"
"""The adapter of a merged student; the initial weights of a built-in student with adapters."""
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def choose_folder(given: str | None, loss: str) -> Path:
    """Return the folder of a run: the one given, or a new ``runs/<time>-<loss>``."""
    if given is not None:
        return expand_home(given)
    from kdlosses import parse_spec

    parsed = parse_spec(loss)
    name = "+".join(term.short for term in parsed.terms) + ("_chunked" if parsed.chunked else "")
    base = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def rendering_in(folder: Path) -> Rendering:
    """Return how the run in a folder rendered its rows; the usual rendering if it has no run.

    Only the section ``data`` is read: a student can be used without the plugins of its training.

    Raises:
        InputError: the configuration is not one of a run.
    """
    if not (folder / CONFIG).is_file():
        return USUAL_RENDERING
    return Rendering.of(validate({"data": stated_values(folder / CONFIG).get("data", {})}).data)


def prepare_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Create the folder of a run, or refuse one with other contents; removes nothing.

    Raises:
        InputError: it contains another run or other files, or is not writable.
    """
    holds_run = (folder / CONFIG).is_file()
    if resume and not holds_run:
        raise InputError(f"--resume: {folder} contains no run to continue")
    if folder.is_dir() and not resume and _holds_anything(folder):
        if not holds_run:
            raise InputError(
                f"--output {folder} is not empty and contains no run; choose another folder"
            )
        if not overwrite:
            raise InputError(
                f"--output {folder} already contains a run; pass --resume to continue it, "
                "--overwrite to replace it, or choose another folder"
            )
    make_output_folder(folder)


def _holds_anything(folder: Path) -> bool:
    """Return whether a folder contains more than a refused start leaves behind."""
    left = folder / CHECKPOINTS
    return any(
        entry.name != LOCK and (entry != left or not _is_empty(entry)) for entry in folder.iterdir()
    )


def _is_empty(entry: Path) -> bool:
    return entry.is_dir() and not any(entry.iterdir())


def clear(folder: Path, keep: Collection[str]) -> None:
    """Remove what an earlier run wrote, and nothing else.

    Called only after all checks have passed, so wrong input cannot remove a finished run.

    Args:
        folder: folder of the run.
        keep: names of what the new run has just written, of :data:`BASE` and :data:`WEIGHTS`.
    """
    for path in written_by_runs(folder):
        if path.name not in keep:
            remove(path)


def written_by_runs(folder: Path) -> list[Path]:
    """Return the files that runs write, which a new run in the same folder removes."""
    files = (CONFIG, METRICS, SUMMARY, ANSWERS, INPUTS)
    folders = (STUDENT, CHECKPOINTS, ADAPTER, TENSORBOARD, f".{STUDENT}.partial", BASE, WEIGHTS)
    return [folder / name for name in (*files, *folders)]


@contextmanager
def one_line_where_nothing_can_be_written(folder: Path) -> Iterator[None]:
    """Turn errors that libraries raise on a full disk into one line that says how to continue.

    Args:
        folder: of the run.

    Raises:
        UnwritableError: instead of the error, which is its cause.
    """
    try:
        yield
    except Exception as error:
        reason = _storage_reason(error, folder)
        if reason is None:
            raise
        newest = newest_complete(folder / CHECKPOINTS)
        kept = "no checkpoint is complete yet" if newest is None else f"{newest.name} is complete"
        raise UnwritableError(
            f"{folder} cannot be written ({reason}); {kept}: free some space, and continue with "
            f"--resume --output {folder}"
        ) from error


@contextmanager
def saying_how_to_go_on(folder: Path) -> Iterator[None]:
    """Turn a signal after training into one line: the last checkpoint contains the student.

    Args:
        folder: of the run.

    Raises:
        Interrupted: instead of the interruption.
        TrainingError: a served teacher failed in the last evaluation.
    """
    try:
        yield
    except TrainingError as error:
        raise TrainingError(
            f"{error}; training is done and its last step saved; continue with --resume --output "
            f"{folder}"
        ) from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted after training, with the last step saved; continue with --resume "
            f"--output {folder}",
            signal_of(error),
        ) from error


def _storage_reason(error: Exception, folder: Path) -> str | None:
    """Return the system's reason why a file could not be written; None for other errors."""
    if isinstance(error, OSError) and error.errno in _STORAGE:
        inside = folder.resolve() in Path(error.filename or folder / "file").resolve().parents
        return os.strerror(error.errno) if inside else None
    # safetensors writes the error number into its message; torch does not report it.
    text = str(error)
    number = re.search(r"os error (\d+)", text)
    if number is not None and int(number[1]) in _STORAGE:
        return os.strerror(int(number[1]))
    if "PytorchStreamWriter" in text or "unexpected pos" in text:
        return "torch could not write all of a file"
    return None
