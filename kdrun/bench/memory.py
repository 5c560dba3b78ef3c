"""Memory of processes and steps, and whether it is available."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kdrun.bench.cases import FLOOR, Case
from kdrun.dry_run.free_memory import available

_HEADROOM = 256 * 2**20


def resident() -> int | None:
    """Resident bytes of this process; None if unknown."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return None
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def head_gradient(case: Case) -> int:
    """Bytes of the head's gradient, which every implementation returns."""
    return case.point.vocab * case.settings.student_width * _item_size(case)


def inputs_and_gradients(case: Case) -> int:
    """Bytes that every implementation needs; for the floor including its logits."""
    settings, point = case.settings, case.point
    width = settings.student_width + settings.teacher_width
    inputs = (point.tokens + point.vocab) * width * _item_size(case)
    logits = 2 * point.supervised * point.vocab * _item_size(case)
    return inputs + head_gradient(case) + (logits if case.implementation == FLOOR else 0)


def lacking(needed: float, device: str) -> str | None:
    """Why a number of bytes does not fit into the free memory; None if it fits."""
    free = available(device)
    if free is None or needed + _HEADROOM <= free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def prefer_as_victim() -> None:
    """If memory runs out, have the system end this process instead of its parent."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _item_size(case: Case) -> int:
    return 4 if case.settings.dtype == "float32" else 2
