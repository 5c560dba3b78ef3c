"""A rough estimate of the duration of a comparison, from model sizes and matrix product speed."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

from kdrun.compare.record import Trial
from kdrun.compare.trial import trial_config
from kdrun.config.sections import RunConfig
from kdrun.models.context import load_model_config
from kdrun.models.locate import ModelSource
from kdrun.models.pairs import locate_pair
from kdrun.procedures.base import Cost
from kdrun.procedures.sampling import Sampling
from kdrun.run.check import procedure_of

_SHARE_OF_PRODUCTS = 0.35  # measured rate of a whole step, relative to a bare matrix product
_START_SECONDS = 15.0  # imports, loading, two evaluations
# Time per additional token of a batch of answers, for any width (measured on small models).
_TOKEN_SECONDS, _LAYER_SECONDS = 2e-3, 1e-3


def trial_seconds(base: RunConfig, trial: Trial, cached: bool) -> float | None:
    """Seconds per trial, or None if the number of steps depends on the data.

    Args:
        base: the configuration shared by all trials.
        trial: the trial.
        cached: whether trials that train on the data use a teacher cache.
    """
    steps = base.training.max_steps
    if steps is None:
        return None
    config = trial_config(base, trial, Path("unused"), "all", None)
    procedure = procedure_of(config)
    live = trial.arm.kd_ratio > 0 and not (cached and procedure is None)
    cost = Cost() if procedure is None else procedure.cost(config)
    batches = steps * base.training.gradient_accumulation_steps
    tokens = batches * base.training.batch_size * base.data.max_length
    trust = base.model.trust_remote_code
    waits, operations = 0.0, 0.0
    teacher, student = locate_pair(config.model)
    for source, trained, written in (
        (student, True, cost.student_answers),
        (teacher, False, cost.teacher_answers),
    ):
        if source is None:
            continue
        parameters, layers = _size(source, trust)
        forward = 2.0 * tokens * parameters
        passes = cost.rows * (3.0 if trained else float(live)) + written
        operations += passes * forward
        if written > 0:
            new = batches * Sampling.of(config.procedure, config.data.max_length).max_new_tokens
            waits += written * new * (_TOKEN_SECONDS + _LAYER_SECONDS * layers)
    return _START_SECONDS + waits + operations / (_SHARE_OF_PRODUCTS * _product_rate())


@lru_cache
def _size(source: ModelSource, trust_remote_code: bool) -> tuple[int, int]:
    """Number of parameters and layers of a model, without reading weights."""
    import torch
    from transformers import AutoModelForCausalLM

    shape = load_model_config(source, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in model.parameters()), shape.get_text_config().num_hidden_layers


@lru_cache
def _product_rate() -> float:
    """Floating-point operations per second of a matrix product on this machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, device=device)
    a @ a
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (a @ a).sum().item()
        count += 1
    return count * 2.0 * 1024**3 / (time.perf_counter() - start)
