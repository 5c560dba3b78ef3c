"""How long a comparison will take, roughly: from sizes, and the speed of a matrix product."""

from __future__ import annotations

import time
from pathlib import Path

from kdrun.compare.record import Trial
from kdrun.config import RunConfig
from kdrun.pairs import locate_pair

_SHARE_OF_PRODUCTS = 0.35  # of the rate of a bare product, reached by a whole step (measured)
_START_SECONDS = 15.0  # imports, loading, two evaluations


def trial_seconds(base: RunConfig, trial: Trial, live: bool) -> float | None:
    """Seconds of a trial, or None where the number of steps follows from the data only.

    Args:
        base: what all trials share.
        trial: the trial.
        live: whether it runs its teacher in training.
    """
    steps = base.training.max_steps
    if steps is None:
        return None
    model = base.model.model_copy(
        update={"teacher": trial.arm.teacher, "student": trial.arm.student}
    )
    teacher, student = locate_pair(model)
    rows = base.training.batch_size * base.training.gradient_accumulation_steps
    tokens = steps * rows * base.data.max_length
    forward = 0.0
    if live and teacher is not None:
        forward = 2.0 * _parameters(Path(teacher.path))
    operations = tokens * (6.0 * _parameters(Path(student.path)) + forward)
    return _START_SECONDS + operations / (_SHARE_OF_PRODUCTS * _product_rate())


def _parameters(path: Path) -> float:
    """About how many parameters a model has, from the size of its files."""
    if path.is_file():
        return float(path.stat().st_size)  # GGUF: about a byte each
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if size:
        return size / 4.0
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return float(sum(p.numel() for p in model.parameters()))


def _product_rate() -> float:
    """Floating-point operations a second of a matrix product here."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, device=device)
    a @ a
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (a @ a).sum().item()
        count += 1
    return count * 2.0 * 1024**3 / (time.perf_counter() - start)
