"""The same run into the same folder again and again, by as many processes as torchrun starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kdrun.models.heads import FrozenTeacher
from kdrun.run.distill import distill


def main(settings: Path, times: int) -> None:
    """Every step is saved; each run replaces the one before."""
    torch.set_num_threads(1)
    config: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    used: set[tuple[torch.device, torch.device]] = set()
    ordinary = FrozenTeacher.source

    def watched(self: FrozenTeacher, input_ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        used.update((x.device, input_ids.device) for x in self.model.parameters())
        return ordinary(self, input_ids, *rest, **more)

    FrozenTeacher.source = watched  # type: ignore[method-assign]
    for _ in range(times):
        distill(config, overwrite=True, console=Console(quiet=True))
    assert used, "the teacher was asked"
    assert all(own == given for own, given in used), used


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
