"""Run the workers: start them one by one, then run one step of each in turn per round."""

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
from kdrun.bench.exact import GradientErrors
from kdrun.bench.plan import Plan
from kdrun.bench.worker import ERROR, LOG, PEAK, TIME, Broken, Ready, Refused, serve

_SECONDS_TO_END = 5


@dataclass
class Measurement:
    """The result of a case.

    Attributes:
        case: the case.
        ready: figures of the warm-up; None if it was not reached.
        seconds: seconds of each round.
        floor_seconds: seconds of the floor in the same rounds.
        peak_mib: peak memory of a step beyond the inputs; None if it cannot be measured.
        errors: errors of its gradients against float64; None if not measured.
        skipped: why it was skipped.
        failed: why it failed.
    """

    case: Case
    ready: Ready | None = None
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    errors: GradientErrors | None = None
    skipped: str | None = None
    failed: str | None = None

    @property
    def measured(self) -> bool:
        """Whether all rounds are finished."""
        return self.ready is not None and self.failed is None

    @property
    def ratios(self) -> list[float]:
        """Time divided by the floor's time, for each round."""
        pairs = zip(self.seconds, self.floor_seconds, strict=True)
        return [taken / floor for taken, floor in pairs]


def measure(plan: Plan, announce: Callable[[str], None]) -> Generator[list[Measurement]]:
    """Measure everything; yields the floor and each loss of a point as they finish.

    Losses are measured one after another, so that only the workers of one loss use memory.

    Args:
        plan: the plan of measurements.
        announce: called with the next measurement.
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
        # Plain is last, because whether it fits depends on the memory of the others.
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
            if plan.settings.gradient_error:
                worker.compare()
        return [worker.result for worker in workers]


def _context() -> Any:
    """Fork processes from one that has only imported torch.

    This saves seconds per process; if the system cannot fork, processes are spawned.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch"])
    return context


class _Worker:
    """A process and its measurements."""

    def __init__(self, case: Case, scratch: Path) -> None:
        self.result = Measurement(case)
        self._scratch = scratch
        self._process: Any = None
        self._connection: Any = None
        self._folder = scratch

    def warm_up(self) -> None:
        """Start the process and wait until it is ready; failures are recorded in the result."""
        context = _context()
        self._folder = Path(tempfile.mkdtemp(dir=self._scratch))
        self._connection, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.result.case, self._folder))
        process.start()
        self._process = process
        theirs.close()  # so that the pipe closes when the process ends
        answer = self._answer()
        if isinstance(answer, Ready):
            self.result.ready = answer
        elif isinstance(answer, Refused):
            self.result.skipped = answer.reason

    def time(self) -> float | None:
        """Time one step; None if it or an earlier one failed."""
        taken: float | None = self._ask(TIME)
        if taken is not None:
            self.result.seconds.append(taken)
        return taken

    def weigh(self) -> None:
        """Measure the peak memory of a step."""
        self.result.peak_mib = self._ask(PEAK)

    def compare(self) -> None:
        """Compare the gradients of a step with float64."""
        self.result.errors = self._ask(ERROR)

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
        """The answer of the process; None if it failed."""
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
        """How the process ended, and its last message."""
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
