"""``kdrun`` as a process of its own that need not import its libraries first.

A new process spends ten seconds on imports. These are forked from one that has them done, and are
like new ones otherwise: with state, standard streams and an exit code of their own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = Path(__file__).with_name("forked.py")


def kdrun(
    *arguments: object, cwd: Path | None = None, kill_after: int | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        arguments: of the command line.
        cwd: its working folder.
        kill_after: a step after which the process is killed.
        variables: of its environment, besides those that are set.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "out", Path(folder) / "err"]
        job = {
            "arguments": words,
            "folder": str(cwd or Path.cwd()),
            "environment": os.environ | variables,
            "files": list(map(str, files)),
            "kill_after": kill_after,
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        said = (file.read_text(encoding="utf-8") for file in files)
        return subprocess.CompletedProcess(["kdrun", *words], code, *said)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, which closes its standard input."""
    return subprocess.Popen(
        [sys.executable, _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
