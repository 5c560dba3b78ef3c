"""Threads that ask a server, and keep no process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """A few threads for tasks in their order.

    The pool of ``concurrent.futures`` is awaited when a process ends, for as long as a server that
    hangs is waited for.

    Args:
        count: of threads at most.
    """

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._count, self._started = count, 0
        self._closed = False

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call a function in one of the threads."""
        task: Future[T] = Future()
        self._tasks.put((task, lambda: function(*arguments)))
        if self._started < self._count:
            self._started += 1
            threading.Thread(target=self._work, name="kdrun-served", daemon=True).start()
        return task

    def close(self) -> None:
        """End the threads after what they are doing; tasks that wait are cancelled."""
        self._closed = True
        for _ in range(self._started):
            self._tasks.put(None)

    def _work(self) -> None:
        while (found := self._tasks.get()) is not None:
            task, call = found
            if self._closed:
                task.cancel()
            if not task.set_running_or_notify_cancel():
                continue
            try:
                task.set_result(call())
            except BaseException as error:  # whatever it is, who waits for the task must know
                task.set_exception(error)
