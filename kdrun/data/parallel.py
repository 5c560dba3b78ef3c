"""Adds to concurrent.futures: jobs in worker processes, results in order, few of them at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from kdrun.errors import InputError

J = TypeVar("J")
R = TypeVar("R")

_WATCH_SECONDS = 1.0
_context: Any = None
"""In a worker: what all jobs share."""


def usual_workers() -> int:
    """Return the number of cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def run_in_order(
    function: Callable[[Any, J], R], shared: Any, jobs: Iterable[J], workers: int
) -> Iterator[R]:
    """Call a function for each job, and yield the results in the order of the jobs.

    Args:
        function: of a module; takes ``shared`` and the job.
        shared: what all jobs share; workers inherit it, or get a copy.
        jobs: small values.
        workers: number of processes; 1 runs the jobs in this one.

    Raises:
        InputError: a worker was killed.
    """
    if workers == 1:
        for job in jobs:
            yield function(shared, job)
        return
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (shared, os.getpid()))
    waiting: deque[Future[R]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_call, function, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            f"a worker of data.workers={workers} was ended by the system, perhaps for its memory; "
            "use fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(shared: Any, parent: int) -> None:
    global _context
    _context = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one of the cores
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed; its queues would never tell."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _call(function: Callable[[Any, J], R], job: J) -> R:
    return function(_context, job)
