"""How much memory a process has and a step needs, and whether there is as much."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kdrun.bench.cases import FLOOR, Case
from kdrun.dry_run.free_memory import available

_HEADROOM = 256 * 2**20


def resident() -> int | None:
    """Bytes of this process in memory; None where the system does not tell."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return None
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def head_gradient(case: Case) -> int:
    """Bytes of the head's gradient, which every implementation must hand over."""
    return case.point.vocab * case.settings.student_width * _item_size(case)


def inputs_and_gradients(case: Case) -> int:
    """Bytes that every implementation needs; of the floor also its logits, which bound a step's."""
    settings, point = case.settings, case.point
    width = settings.student_width + settings.teacher_width
    inputs = (point.tokens + point.vocab) * width * _item_size(case)
    logits = 2 * point.supervised * point.vocab * _item_size(case)
    return inputs + head_gradient(case) + (logits if case.implementation == FLOOR else 0)


def lacking(needed: float, device: str) -> str | None:
    """Why so many bytes more would not fit into the memory that is free now; None where they do."""
    free = available(device)
    if free is None or needed + _HEADROOM <= free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def prefer_as_victim() -> None:
    """Where memory runs out nevertheless, this process ends and not the one that reports."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _item_size(case: Case) -> int:
    return 4 if case.settings.dtype == "float32" else 2
