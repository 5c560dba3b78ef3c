"""``kdrun`` as a process of its own that need not import its libraries first.

A new process spends ten seconds on imports. These are forked from one that has them done, and are
like new ones otherwise: with state, standard streams and an exit code of their own.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVER = Path(__file__).with_name("forked.py")


Completed = subprocess.CompletedProcess


def kdrun(
    *arguments: object, cwd: Path | None = None, kill_after: int | None = None, **variables: str
) -> Completed[str]:
    """Run a command to its end.

    Args:
        arguments: of the command line.
        cwd: its working folder.
        kill_after: a step after which the process is killed.
        variables: of its environment, besides those that are set.
    """
    return _run(None, arguments, [variables], cwd, kill_after)[0]


def kdrun_in_processes(count: int, *arguments: object) -> list[Completed[str]]:
    """Run a command in so many processes at once, as torchrun starts them on one machine."""
    return _run(None, arguments, _ranks(count))


def script_in_processes(count: int, script: str, *arguments: object) -> list[Completed[str]]:
    """The same for a script, whose folder it can import from."""
    return _run(script, arguments, _ranks(count))


def heed_interrupts() -> None:
    """In a new process: take SIGINT as usual, also where the test runner was told to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ranks(count: int) -> list[dict[str, str]]:
    """The variables that torchrun sets for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{k: str(v) for k, v in rank.items()} for rank in ranks]


def _run(
    script: str | None,
    arguments: Sequence[object],
    variables: Sequence[Mapping[str, str]],
    cwd: Path | None = None,
    kill_after: int | None = None,
) -> list[Completed[str]]:
    """A process for each set of variables, all at once."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [
            [Path(folder) / f"{name}-{number}" for name in ("out", "err")]
            for number in range(len(variables))
        ]
        jobs = [
            {
                "script": script,
                "arguments": words,
                "folder": str(cwd or Path.cwd()),
                "environment": {**os.environ, **more},
                "files": list(map(str, own)),
                "kill_after": kill_after,
            }
            for more, own in zip(variables, files, strict=True)
        ]
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(jobs) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"{_SERVER.name} has ended; what it said stands in this test's output"
        codes = json.loads(answer)
        return [
            Completed([script or "kdrun", *words], code, *(file.read_text("utf-8") for file in own))
            for code, own in zip(codes, files, strict=True)
        ]


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, which closes its standard input."""
    return subprocess.Popen(
        [sys.executable, _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
