"""Runs the workers: starts them one by one, then asks each in turn for one step a round."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrun.bench.cases import FLOOR, PLAIN, Case, Point
from kdrun.bench.plan import Plan
from kdrun.bench.worker import LOG, PEAK, TIME, Broken, Ready, Refused, serve

_SECONDS_TO_END = 5


@dataclass
class Measurement:
    """What came of a case.

    Attributes:
        case: what was measured.
        ready: figures of the warm-up; None where it did not come to that.
        seconds: of each round.
        floor_seconds: of the floor in the same rounds.
        peak_mib: highest memory in a step, over the inputs; None where it cannot be measured.
        skipped: why it was not tried.
        failed: why it ended early.
    """

    case: Case
    ready: Ready | None = None
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    skipped: str | None = None
    failed: str | None = None

    @property
    def measured(self) -> bool:
        """Whether all rounds were done."""
        return self.ready is not None and self.failed is None

    @property
    def ratios(self) -> list[float]:
        """Time over that of the floor, of each round."""
        pairs = zip(self.seconds, self.floor_seconds, strict=True)
        return [taken / floor for taken, floor in pairs]


def measure(plan: Plan, announce: Callable[[str], None]) -> Generator[list[Measurement]]:
    """Measure everything; yields the floor and each loss of a point as soon as they are done.

    Losses are taken one after the other, so that only the workers of one loss are in memory.

    Args:
        plan: what to measure.
        announce: is told what comes next.
    """
    total = len(plan.points) * len(plan.losses)
    with tempfile.TemporaryDirectory(prefix="kdrun-bench-") as scratch:
        number = 0
        for point in plan.points:
            with ExitStack() as stack:
                floor = _Worker(Case(plan.settings, point, FLOOR), Path(scratch))
                stack.callback(floor.close)
                floor.warm_up()
                for loss in plan.losses:
                    number += 1
                    size = f"{point.tokens} tokens, vocabulary {point.vocab}"
                    announce(f"{number}/{total} {loss}, {size}")
                    yield _measure_loss(plan, point, loss, floor, Path(scratch))
                floor.weigh()
                yield [floor.result]


def _measure_loss(
    plan: Plan, point: Point, loss: str, floor: _Worker, scratch: Path
) -> list[Measurement]:
    with ExitStack() as stack:
        workers = []
        for case in plan.cases(point, loss):
            worker = _Worker(case, scratch)
            stack.callback(worker.close)
            workers.append(worker)
        # The plain one last: whether it fits depends on what the others hold.
        for worker in sorted(
            workers, key=lambda worker: worker.result.case.implementation == PLAIN
        ):
            if floor.result.measured:
                worker.warm_up()
            else:
                worker.result.skipped = floor.result.skipped and f"the floor {floor.result.skipped}"
                worker.result.failed = floor.result.failed and f"the floor: {floor.result.failed}"
        for _ in range(plan.settings.rounds):
            base = floor.time()
            for worker in workers:
                if not worker.result.measured:
                    continue
                if base is None:
                    worker.result.failed = f"the floor: {floor.result.failed}"
                elif worker.time() is not None:
                    worker.result.floor_seconds.append(base)
        for worker in workers:
            worker.weigh()
        return [worker.result for worker in workers]


def _context() -> Any:
    """Processes are forked from one that has imported torch and done nothing with it.

    That saves each of them seconds; where the system cannot fork, they start from nothing.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch"])
    return context


class _Worker:
    """A process, and what it has measured."""

    def __init__(self, case: Case, scratch: Path) -> None:
        self.result = Measurement(case)
        self._scratch = scratch
        self._process: Any = None
        self._connection: Any = None
        self._folder = scratch

    def warm_up(self) -> None:
        """Start the process and wait until it is ready; a failure is in the result."""
        context = _context()
        self._folder = Path(tempfile.mkdtemp(dir=self._scratch))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.result.case, self._folder))
        self._process.start()
        theirs.close()  # so that the end of the process shows as the end of the pipe
        answer = self._answer()
        if isinstance(answer, Ready):
            self.result.ready = answer
        elif isinstance(answer, Refused):
            self.result.skipped = answer.reason

    def time(self) -> float | None:
        """Time one step; None where that failed, now or earlier."""
        taken: float | None = self._ask(TIME)
        if taken is not None:
            self.result.seconds.append(taken)
        return taken

    def weigh(self) -> None:
        """Measure the memory of a step."""
        self.result.peak_mib = self._ask(PEAK)

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._connection.close()
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, request: str) -> Any:
        if not self.result.measured:
            return None
        try:
            self._connection.send(request)
        except OSError:
            self.result.failed = self._ending()
            return None
        return self._answer()

    def _answer(self) -> Any:
        """What the process says; None where it failed."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self.result.failed = self._ending()
            return None
        if isinstance(answer, Broken):
            self.result.failed = answer.reason
            return None
        return answer

    def _ending(self) -> str:
        """How the process ended, and the last thing that it said."""
        self._process.join()
        code = self._process.exitcode
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += ", probably out of memory"
        else:
            how = f"ended with exit code {code}"
        log = (self._folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in log if line.strip()]
        return f"{how}: {said[-1]}" if said else how
