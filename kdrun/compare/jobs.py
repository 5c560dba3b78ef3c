"""A comparison in several processes, which divide the trials among themselves by locks."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from kdrun.compare.ledger import LOCKS, Ledger
from kdrun.compare.record import Record
from kdrun.compare.run import Comparison, Watch
from kdrun.errors import TrainingError

WORKER = "KDRUN_COMPARISON_WORKER"
"""Environment variable of a worker, which runs trials and prints nothing."""

_POLL_SECONDS = 1.0


def run_jobs(comparison: Comparison, ledger: Ledger, jobs: int, watch: Watch) -> list[Record]:
    """Run the current command in several worker processes until no trial is left.

    Raises:
        TrainingError: the workers ended but trials are missing; includes a worker's last message.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {WORKER: "1", "OMP_NUM_THREADS": str(threads)}
    arguments = [*sys.argv[1:], "--output", str(ledger.folder)]
    command = [sys.executable, "-c", "from kdrun.cli import main; main()", *arguments]
    logs = [ledger.folder / LOCKS / f"worker-{number}.log" for number in range(jobs)]
    workers = []
    try:
        for log in logs:
            with open(log, "wb") as stream:
                workers.append(
                    subprocess.Popen(
                        command, env=environment, stdout=subprocess.DEVNULL, stderr=stream
                    )
                )
        while any(worker.poll() is None for worker in workers):
            _show(comparison, ledger, watch)
            time.sleep(_POLL_SECONDS)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
            worker.wait()
    records = _show(comparison, ledger, watch)
    if len(records) < len(comparison.plan.planned(records)):
        lines = [log.read_text(encoding="utf-8", errors="replace").split("\n") for log in logs]
        said = [line for text in lines for line in text if line.startswith("kdrun: ")]
        reason = said[-1].removeprefix("kdrun: ") if said else "a worker was killed"
        raise TrainingError(
            f"trials are missing: {reason}; run the same command to continue with them"
        )
    return records


def _show(comparison: Comparison, ledger: Ledger, watch: Watch) -> list[Record]:
    records = comparison.plan.own(ledger.records())
    watch(comparison.plan.planned(records), records, None)
    return records
