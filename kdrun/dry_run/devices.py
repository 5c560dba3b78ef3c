"""The memory of a device: the current one, or one given by name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from kdrun.dry_run.free_memory import available
from kdrun.errors import InputError

# GiB available to a process, slightly less than the nominal size.
_KNOWN = {
    "t4": 15.0,
    "rtx3090": 23.5,
    "rtx4090": 23.5,
    "l4": 22.0,
    "a10g": 22.0,
    "v100": 31.5,
    "rtx5090": 31.0,
    "a100-40gb": 39.0,
    "l40s": 44.0,
    "a100": 79.0,
    "h100": 79.0,
    "h200": 139.0,
    "b200": 178.0,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*gi?b", re.IGNORECASE)


@dataclass(frozen=True)
class Device:
    """The device of a run.

    Attributes:
        name: name for display.
        kind: ``cpu`` or ``cuda``.
        memory: free or total bytes; None if unknown.
    """

    name: str
    kind: str
    memory: int | None


def find_device(given: str | None) -> Device:
    """Find the device of a dry run.

    Args:
        given: None for the device of a run on this machine; ``cpu`` or ``cuda``; the name of an
            accelerator; or its memory, such as ``24GiB``.

    Raises:
        InputError: an unknown name, or no accelerator.
    """
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = here if given is None else given.lower()
    if wanted == "cuda" and here != "cuda":
        raise InputError(
            "--device cuda: this machine has none; pass a name such as h100 or a size such as 24GiB"
        )
    if wanted in ("cpu", "cuda"):
        return Device(f"this machine's {wanted}", wanted, available(wanted))
    if size := _SIZE.fullmatch(wanted):
        return Device(f"an accelerator with {size[1]} GiB", "cuda", int(float(size[1]) * 2**30))
    if wanted not in _KNOWN:
        close = difflib.get_close_matches(wanted, _KNOWN, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(_KNOWN)}, or 24GiB"
        raise InputError(f"--device {given}: unknown; {hint}")
    return Device(wanted, "cuda", int(_KNOWN[wanted] * 2**30))
