"""Supervised tokens a second of training steps, the first left out.

    python docs/benchmarks/whole_run.py [kdrun's options]

Times the trainer's ``training_step`` (forward and backward of a micro-batch), as a timer around
another trainer's would, and prints a line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

import torch

from kdrun.cli import main
from kdrun.data.collate import IGNORE_INDEX
from kdrun.training.trainer import DistillTrainer

steps: list[tuple[float, int, int]] = []
inner = DistillTrainer.training_step


def synchronize() -> None:
    """Wait until the accelerator, if there is one, has done its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(self: DistillTrainer, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
    """A step, its seconds, its tokens and those of them that are supervised."""
    synchronize()
    start = time.perf_counter()
    found = inner(self, model, inputs, *rest, **options)
    synchronize()
    labels = inputs["labels"]
    tokens = labels.numel(), int((labels != IGNORE_INDEX).sum())
    steps.append((time.perf_counter() - start, *tokens))
    return found


DistillTrainer.training_step = timed  # type: ignore[method-assign]
with tempfile.TemporaryDirectory() as folder:
    sys.argv[1:] += ["--output", f"{folder}/run"]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
seconds, tokens, supervised = (sum(column) for column in zip(*steps[1:], strict=True))
device_peak = torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else None
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(
    json.dumps(
        {
            "steps": len(steps) - 1,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds),
            "supervised_tokens_per_second": round(supervised / seconds),
            "supervised_tokens": supervised,
            "peak_memory_mib": peak,
            "peak_device_memory_mib": device_peak,
        }
    )
)
