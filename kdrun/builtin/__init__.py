"""The built-in teacher, student, tokenizer and text: what a bare `kdrun` command trains with.

Nothing here is imported that takes time: paths and settings only. The text is read from the
running interpreter's own documentation (`kdrun.builtin.text`), and
`python -m kdrun.models.build_builtin` rebuilds the tokenizer and the teacher.
"""

from pathlib import Path
from typing import Final

TEACHER_DIR: Final = Path(__file__).with_name("teacher")
"""A Hugging Face folder with weights and tokenizer; load it as float32."""

STUDENT_DIR: Final = Path(__file__).with_name("student")
"""A configuration without weights: a student starts at random, with the teacher's tokenizer."""

DEFAULTS: Final[dict[str, dict[str, object]]] = {
    "optimizer": {
        "lr": 4e-3,
        "warmup_steps": 30,
        "scheduler": "cosine_with_min_lr",
        "scheduler_kwargs": {"min_lr_rate": 0.05},
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "max_grad_norm": 1.0,
    },
    "training": {"max_steps": 900, "batch_size": 8},
    "data": {"max_length": 128},
}
"""Section -> key -> value: settings for the built-in pair wherever the user gives none."""
