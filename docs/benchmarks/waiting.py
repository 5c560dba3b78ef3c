"""``whole_run.py`` with a served teacher whose answers all wait before the first step.

    python docs/benchmarks/waiting.py --teacher ADDRESS [kdrun's options]

The server then does nothing while steps are timed, as one on another machine would.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from kdrun.served import teacher as served

inner = served.ServedTeacher.settle


def settle(self: served.ServedTeacher, batches: Iterable[Any]) -> None:
    """Wait for all that was asked for."""
    wait([expected.answer for expected in self._expected.values()])
    inner(self, batches)


served._ROWS_PER_REQUEST = 10**6
served.ServedTeacher.settle = settle  # type: ignore[method-assign]
runpy.run_path(str(Path(__file__).with_name("whole_run.py")), run_name="__main__")
