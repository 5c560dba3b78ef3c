"""Jobs of ``kdrun`` in processes of their own, forked from one that has the imports done.

Run as ``python survive.py FILE``; the file holds a list of jobs, each ``{"arguments": [...],
"kill_after": step or null}``. Prints the jobs' exit codes (negative: the signal) and what they said
as JSON. A job with ``kill_after`` kills itself by SIGKILL, in the middle of a run, when that step
has ended: as ``kill -9`` does, nothing is flushed and no handler runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - so that no job has to import it
import torch
import transformers

import kdrun.trainer
from kdrun.cli import main


def run(job: dict[str, Any]) -> None:
    """In the child: never returns."""
    if job["kill_after"] is not None:
        ordinary = kdrun.trainer.TokenRate.on_step_end

        def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ordinary(self, args, state, control, **kwargs)
            if state.global_step == job["kill_after"]:
                os.kill(os.getpid(), signal.SIGKILL)

        kdrun.trainer.TokenRate.on_step_end = die  # type: ignore[method-assign]
    sys.argv = ["kdrun", *job["arguments"]]
    main()
    sys.exit(0)


def outcome(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            run(job)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "said": said.read()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([outcome(job) for job in jobs]))
