"""Finished runs, cut back to what they were before their last steps."""

from __future__ import annotations

import shutil
from pathlib import Path


def cut_back(whole: Path, cut: Path, checkpoints: int = 1) -> Path:
    """Copy a finished run without its student and its last checkpoints; an earlier one is left."""
    shutil.copytree(whole, cut)
    found = sorted((cut / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    for late in found[-checkpoints:]:
        shutil.rmtree(late)
    assert found[:-checkpoints], "there is a checkpoint to resume from"
    shutil.rmtree(cut / "student")
    (cut / "summary.json").unlink()
    return cut
