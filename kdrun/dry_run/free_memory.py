"""The free memory of this machine."""

from __future__ import annotations

from pathlib import Path


def available(device: str) -> int | None:
    """Free bytes on ``cpu`` or ``cuda``; None if unknown."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    limits = [_meminfo_available(), _cgroup_available()]
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _cgroup_available() -> int | None:
    """Remaining memory of a container (cgroup version 2); None without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - used)
