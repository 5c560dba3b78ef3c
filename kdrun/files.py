"""Atomic file writes, and folders that one process locks."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import math
import os
import shutil
import socket
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from kdrun.errors import InputError

LOCK = ".lock"
_BEAT_SECONDS = 10.0
_DEAD_AFTER = 60.0
"""A holder on another machine that has not touched its lock for this long is considered dead."""
_locked: weakref.WeakSet[IO[str]] = weakref.WeakSet()
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write an object as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write objects as JSON lines, atomically."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def remove(path: Path) -> None:
    """Remove a file, or a folder as far as possible; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file below a folder, after flushing each to disk."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(".partial"):
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                os.fsync(stream.fileno())
            name = path.relative_to(folder).as_posix()
            found[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def find_damage(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Describe the first file that differs from :func:`list_files`' record; None if all match."""
    for name, known in listed.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{name} is outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != known["bytes"]:
            return f"{name} has {size:,} bytes instead of {known['bytes']:,}"
    for name, known in listed.items():
        with open(folder / name, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != known["sha256"]:
                return f"{name} was changed (its SHA-256 differs)"
    return None


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, so that no other process on any machine writes to it.

    The system releases the lock of a dead process. For file systems without locks, or whose locks
    other machines cannot see, the lock file names its holder and is touched regularly.

    Args:
        folder: an existing folder.

    Raises:
        InputError: another process uses it; names its host and process id.
    """
    path = folder / LOCK
    stream = _take(path, folder)
    stop = threading.Event()
    beat = threading.Thread(target=_touch, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        with suppress(OSError):
            path.unlink()
        stream.close()


def _take(path: Path, folder: Path) -> IO[str]:
    while True:
        stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it is held open
        try:
            locked = lock_file(stream)
            holder = _holder(stream)
            if not locked or (holder is not None and _lives(holder, path)):
                raise _held(folder, holder)
            if _same_file(stream, path):  # otherwise the last holder has removed it
                stream.seek(0)
                stream.truncate()
                json.dump(_me(), stream)
                stream.flush()
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def lock_file(stream: IO[str], wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends.

    Args:
        stream: open for writing.
        wait: wait until it is free.

    Returns:
        Whether it is locked now; also True if the file system has no locks.
    """
    _locked.add(stream)
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(stream, wait)
    # flock first: unlike lockf, it distinguishes two holders in one process.
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def _drop_locks() -> None:
    """Close inherited files: a lock lasts as long as any process has its file open."""
    for stream in _locked:
        with suppress(OSError, ValueError):
            stream.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


def _lock_on_windows(stream: IO[str], wait: bool) -> bool:
    msvcrt: Any = importlib.import_module("msvcrt")
    stream.seek(2**30)  # beyond the content, which others read
    while True:
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            if wait:
                continue
            return False
        return True


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def _holder(stream: IO[str]) -> dict[str, Any] | None:
    stream.seek(0)
    try:
        found = json.loads(stream.read())
    except (ValueError, OSError):
        return None
    return found if isinstance(found, dict) else None


def _lives(holder: Mapping[str, Any], path: Path) -> bool:
    """Return whether the process that a lock file names still holds it."""
    if holder.get("host") != socket.gethostname():
        return _seconds_since_touched(path) < _DEAD_AFTER
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid() or pid <= 0:
        return False
    if sys.platform == "win32":  # its locks work across machines
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # Process ids are reused, but the new process began later.
    return _began(pid) == holder.get("began")


def _began(pid: int) -> str | None:
    """Return the system's start time of a process; None if it is not available."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19]


def _seconds_since_touched(path: Path) -> float:
    """Return the age by the file system's clock, which all machines that use it share."""
    probe = path.with_name(f"{path.name}.{os.getpid()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return math.inf
    finally:
        probe.unlink(missing_ok=True)


def _same_file(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:
        return False


def _held(folder: Path, holder: Mapping[str, Any] | None) -> InputError:
    who = "another process"
    if holder is not None:
        who = f"process {holder.get('pid')} on {holder.get('host')}"
    return InputError(
        f"{folder} is in use by {who}, which is still running; wait for it to end, stop it, or "
        "choose another folder"
    )


def _touch(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
