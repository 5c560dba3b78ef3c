"""Forks a process for each command that standard input names; started by ``commands.py``.

One line is one job in JSON: ``arguments``, ``folder`` (the working one), ``environment``, ``files``
(for standard output and error) and ``kill_after``, a step or null. Its exit code is the answer,
negative where a signal ended it. With ``kill_after`` the command kills itself by SIGKILL, in the
middle of a run, when that step has ended: as ``kill -9`` does, nothing is flushed and no handler
runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from kdrun.cli import main
from kdrun.quiet import quiet_environment

quiet_environment()  # as a command does before it imports

import datasets  # noqa: E402, F401 - these are what a command spends its first ten seconds on
import peft  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import kdrun.trainer  # noqa: E402

_LONGEST = 600  # seconds


def next_job() -> dict[str, Any] | None:
    """Waits for a line; the job in the child that is to do it, None in the end."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            job: dict[str, Any] = json.loads(line)
            return job
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def prepare(job: dict[str, Any]) -> None:
    signal.alarm(_LONGEST)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(job["files"], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = ["kdrun", *job["arguments"]]
    if job["kill_after"] is not None:
        _die_after(job["kill_after"])


def _die_after(step: int) -> None:
    ordinary = kdrun.trainer.TokenRate.on_step_end

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ordinary(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    kdrun.trainer.TokenRate.on_step_end = die  # type: ignore[method-assign]


if __name__ == "__main__":
    todo = next_job()
    if todo is not None:
        prepare(todo)
        main()
