"""Forks a process for each command or script that standard input names; started by ``commands.py``.

One line is a list of jobs in JSON, which run at once; the answer is the list of their exit codes,
negative where a signal ended one. When one fails the others, which may wait for it, are ended. A
job has ``script`` (null for a command), ``arguments``, ``folder`` (the working one),
``environment``, ``files`` (for standard output and error) and ``kill_after``, a step or null. With
it the command kills itself by SIGKILL, in the middle of a run, when that step has ended: as
``kill -9`` does, nothing is flushed and no handler runs.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from kdrun.cli import main
from kdrun.quiet import quiet_environment

quiet_environment()  # as a command does before it imports

import datasets  # noqa: E402, F401 - these are what a command spends its first ten seconds on
import peft  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import kdrun.training.progress  # noqa: E402
import kdrun.training.trainer  # noqa: E402, F401

_LONGEST = 600  # seconds


def next_job() -> dict[str, Any] | None:
    """Waits for lines; the job in a child that is to do it, None in the end."""
    for line in sys.stdin:
        children = []
        job: dict[str, Any]
        for job in json.loads(line):
            child = os.fork()
            if child == 0:
                return job
            children.append(child)
        print(json.dumps(exit_codes(children)), flush=True)
    return None


def exit_codes(children: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] != 0:
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[child] for child in children]


def prepare(job: dict[str, Any]) -> None:
    signal.alarm(_LONGEST)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(job["files"], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = [job["script"] or "kdrun", *job["arguments"]]
    if job["kill_after"] is not None:
        _die_after(job["kill_after"])


def _die_after(step: int) -> None:
    ordinary = kdrun.training.progress.TokenRate.on_step_end

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ordinary(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    kdrun.training.progress.TokenRate.on_step_end = die  # type: ignore[method-assign]


if __name__ == "__main__":
    gc.freeze()  # each training ends with a collection, which need not look at modules
    todo = next_job()
    if todo is not None:
        prepare(todo)
        if todo["script"] is None:
            main()
        else:
            sys.path.insert(0, str(Path(todo["script"]).parent))
            runpy.run_path(todo["script"], run_name="__main__")
