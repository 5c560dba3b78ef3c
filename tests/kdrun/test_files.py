"""Files that are written whole, and folders that one process holds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kdrun import files
from kdrun.errors import InputError
from kdrun.files import LOCK, find_damage, hold_folder, list_files, write_text

HOLDER = (
    "import sys, time; from pathlib import Path; from kdrun.files import hold_folder\n"
    "with hold_folder(Path(sys.argv[1])):\n"
    "    print('held', flush=True); time.sleep(60)\n"
)


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_told_who_holds_a_folder(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        told = (
            f"is in use by process {process.pid} on {socket.gethostname()}, which is still running"
        )
        with pytest.raises(InputError, match=told), hold_folder(tmp_path):
            pass
    # A dead holder keeps nothing, and leaves nothing once the next is done.
    with hold_folder(tmp_path):
        assert (tmp_path / LOCK).is_file()
    assert not (tmp_path / LOCK).exists()


def test_without_locks_of_the_system_the_files_content_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "lock_file", lambda stream, wait=False: True)
    with holder(tmp_path) as process:  # noqa: SIM117
        with pytest.raises(InputError, match=f"process {process.pid}"), hold_folder(tmp_path):
            pass
    with hold_folder(tmp_path):
        pass


def test_a_process_that_got_the_number_of_a_dead_one_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "lock_file", lambda stream, wait=False: True)
    dead = {"host": socket.gethostname(), "pid": os.getppid(), "began": "1"}
    (tmp_path / LOCK).write_text(json.dumps(dead), encoding="utf-8")
    with hold_folder(tmp_path):
        pass


@pytest.mark.parametrize(("seconds", "free"), [(5, False), (300, True)])
def test_another_machine_holds_a_folder_as_long_as_it_touches_its_lock(
    tmp_path: Path, seconds: int, free: bool
) -> None:
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "began": "1"}), encoding="utf-8")
    ago = time.time() - seconds
    os.utime(path, (ago, ago))
    if free:
        with hold_folder(tmp_path):
            pass
        return
    with pytest.raises(InputError, match="process 7 on elsewhere"), hold_folder(tmp_path):
        pass


def test_damage_is_found_by_size_and_by_content(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "in/b"):
        write_text(tmp_path / name, "content")
    listed = list_files(tmp_path)
    assert set(listed) == {"a", "in/b"}
    # sha256 of the seven letters
    assert listed["a"]["sha256"].startswith("ed7002b439e9ac845f22357d822bac14")
    assert find_damage(tmp_path, listed) is None
    write_text(tmp_path / "in/b", "Content")
    assert find_damage(tmp_path, listed) == "in/b was changed (its SHA-256 differs)"
    write_text(tmp_path / "in/b", "cont")
    assert find_damage(tmp_path, listed) == "in/b has 4 bytes instead of 7"
    (tmp_path / "a").unlink()
    assert find_damage(tmp_path, listed) == "a is missing"


WORKERS = """
import os, sys, time
from pathlib import Path
from kdrun.data.parallel import run_in_order
from kdrun.files import hold_folder

def work(shared, job):
    time.sleep(0.01)
    return os.getpid()

with hold_folder(Path(sys.argv[1])):
    for number, worker in enumerate(run_in_order(work, None, range(10**6), 2)):
        if number < 20:
            print(worker, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked")
def test_workers_of_a_killed_process_do_not_keep_its_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", WORKERS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        workers = {int(holder.stdout.readline()) for _ in range(20)}
        assert holder.pid not in workers
        with (
            pytest.raises(InputError, match=f"in use by process {holder.pid}"),
            hold_folder(tmp_path),
        ):
            pass
        holder.kill()
        holder.wait()
        with hold_folder(tmp_path):
            pass
        # Nor do they stay.
        deadline = time.monotonic() + 20
        while any(is_alive(worker) for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # one that has ended may wait for its parent
    return not status.exists() or status.read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
