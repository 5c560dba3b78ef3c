"""The folder of a run: what is in it, and which folder a new run may take."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdrun.errors import InputError, UnwritableError
from kdrun.paths import expand_home

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
ANSWERS = "answers.jsonl"
STUDENT, CHECKPOINTS = "student", "checkpoints"
TENSORBOARD = "tensorboard"
ADAPTER, BASE = "adapter", "base"
"""The adapter of a merged student; the initial weights of a built-in student with adapters."""
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
SHARDS = "shards"
"""In a checkpoint of models that were spread over processes: weights and optimiser in parts."""
COMPLETE = "complete"
"""A file that is written last into a checkpoint: without it the checkpoint is not whole."""


def choose_folder(given: str | None, loss: str) -> Path:
    """The folder of a run: the one given, or a new ``runs/<time>-<loss>``."""
    if given is not None:
        return expand_home(given)
    from kdlosses import parse_spec

    parsed = parse_spec(loss)
    name = "+".join(term.name for term in parsed.terms) + ("_chunked" if parsed.chunked else "")
    base = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def prepare_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Create the folder of a run, or refuse one that holds something else; removes nothing.

    Raises:
        InputError: it holds another run or foreign files, or cannot be written.
    """
    if folder.is_file():
        raise InputError(f"--output {folder} is a file; name a folder")
    holds_run = (folder / CONFIG).is_file()
    if resume and not holds_run:
        raise InputError(f"--resume: {folder} holds no run to continue")
    if folder.is_dir() and not resume and _holds_anything(folder):
        if not holds_run:
            raise InputError(
                f"--output {folder} is not empty and holds no run; name another folder"
            )
        if not overwrite:
            raise InputError(
                f"--output {folder} holds a run; add --resume to continue it, --overwrite to "
                "replace it, or name another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}; name a writable folder") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {folder} cannot be written; name another folder")


def _holds_anything(folder: Path) -> bool:
    """Whether there is more in a folder than a start that was refused leaves."""
    left = folder / CHECKPOINTS
    return any(entry != left or not _is_empty(entry) for entry in folder.iterdir())


def _is_empty(entry: Path) -> bool:
    return entry.is_dir() and not any(entry.iterdir())


def clear(folder: Path, keep_base: bool) -> None:
    """Remove what an earlier run wrote, and nothing else.

    Called only once nothing can be refused any more: wrong input costs no finished run.

    Args:
        folder: of the run.
        keep_base: leave :data:`BASE` as it is, which the new run has just written.
    """
    for name in (CONFIG, METRICS, SUMMARY, ANSWERS):
        (folder / name).unlink(missing_ok=True)
    for name in (STUDENT, CHECKPOINTS, ADAPTER, TENSORBOARD, *(() if keep_base else (BASE,))):
        shutil.rmtree(folder / name, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    complete = [path for path in _checkpoints(folder) if (path / COMPLETE).is_file()]
    return complete[-1] if complete else None


def broken_checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints after the newest complete one: a run was cut off in writing them."""
    names = [path.name for path in _checkpoints(folder)]
    newest = newest_checkpoint(folder)
    return names if newest is None else names[names.index(newest.name) + 1 :]


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in the order of their steps."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in (folder / CHECKPOINTS).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    return [path for _, path in sorted(found)]


@contextmanager
def one_line_where_nothing_can_be_written(folder: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk into one line that says how to go on.

    Args:
        folder: of the run.

    Raises:
        UnwritableError: in place of the error, which is its cause.
    """
    try:
        yield
    except Exception as error:
        reason = _storage_reason(error, folder)
        if reason is None:
            raise
        newest = newest_checkpoint(folder)
        kept = "no checkpoint was complete yet" if newest is None else f"{newest.name} is complete"
        raise UnwritableError(
            f"{folder} cannot be written ({reason}); {kept}: make room, and continue with "
            f"--resume --output {folder}"
        ) from error


def _storage_reason(error: Exception, folder: Path) -> str | None:
    """Why a folder did not take a file, in the words of the system; None for other errors."""
    if isinstance(error, OSError) and error.errno in _STORAGE:
        inside = folder.resolve() in Path(error.filename or folder / "file").resolve().parents
        return os.strerror(error.errno) if inside else None
    # safetensors writes the number into its message; torch tells it to nobody.
    text = str(error)
    number = re.search(r"os error (\d+)", text)
    if number is not None and int(number[1]) in _STORAGE:
        return os.strerror(int(number[1]))
    if "PytorchStreamWriter" in text or "unexpected pos" in text:
        return "torch could not write all of a file"
    return None


def is_finished(checkpoint: Path, max_steps: int | None, num_epochs: float) -> bool:
    """Whether a checkpoint is that of the last step, so that nothing is left to train.

    Args:
        checkpoint: its folder.
        max_steps: steps to do, whatever the epochs; None counts epochs.
        num_epochs: epochs to do.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if max_steps is not None:
        return bool(state["global_step"] >= max_steps)
    return bool(state["epoch"] >= num_epochs)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write an object as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write objects as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


class MetricsFile:
    """``metrics.jsonl``: one object a line, each flushed when written.

    Args:
        path: the file.
        from_step: lines of later steps are dropped, since a resumed run writes them again.
    """

    def __init__(self, path: Path, from_step: int = 0) -> None:
        self._path = path
        kept = [line for line in self._lines() if json.loads(line)["step"] <= from_step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        if not self._path.is_file():
            return []
        lines = self._path.read_text(encoding="utf-8").split("\n")
        return [line for line in lines if line.endswith("}")]  # a killed run may leave half a line

    def append(self, values: dict[str, Any]) -> None:
        """Add a line."""
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(values, ensure_ascii=False) + "\n")
