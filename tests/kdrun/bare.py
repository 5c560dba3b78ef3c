"""Arguments of transformers for a few steps that say, show and keep nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

USE_CPU = True
"""False where tests of the trainer run on an accelerator."""


def bare_arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Nothing is saved unless ``save_steps`` is given."""
    settings: dict[str, Any] = {
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps" if "save_steps" in options else "no",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "use_cpu": USE_CPU,
    }
    return TrainingArguments(output_dir=str(folder), **(settings | options))
