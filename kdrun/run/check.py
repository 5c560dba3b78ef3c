"""Checks made before heavy imports and before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.cache.choose import check_cached_rows
from kdrun.cache.manifest import read_manifest
from kdrun.config.load import complete_pair, validate
from kdrun.config.sections import RunConfig
from kdrun.data.prepare import RawRows, check_packed_rows, read_rows
from kdrun.errors import InputError
from kdrun.losses.build import build_loss, check_name, check_weighting
from kdrun.models.adapters import check_peft
from kdrun.models.address import is_address
from kdrun.models.attention import check_attention
from kdrun.models.pairs import locate_pair
from kdrun.models.placement import check_teacher_device
from kdrun.models.quantize import check_quantization, check_student_quantization
from kdrun.paths import expand_home
from kdrun.procedures.registry import get_procedure, takes_prompts
from kdrun.run.arguments import check_optimizer
from kdrun.run.features import check_features, check_features_layers
from kdrun.run.own_teacher import check_own_teacher
from kdrun.run.precision import check_precision
from kdrun.run.processes import check_deepspeed
from kdrun.run.trackers import check_tracker
from kdrun.run.view import check_view

if TYPE_CHECKING:
    from kdrun.procedures.base import Procedure


def resolve(given: RunConfig | Mapping[str, Any]) -> RunConfig:
    """Return a configuration, built from its sections if necessary.

    Raises:
        InputError: an unknown key or a wrong value.
    """
    return given if isinstance(given, RunConfig) else validate(complete_pair(given))


def check(config: RunConfig) -> RawRows:
    """Check a run's input, and read its rows.

    Raises:
        InputError: what is wrong, in one line.
    """
    check_name(config.loss.spec)
    check_peft(config.lora)
    procedure_of(config)
    check_tracker(config.training.report_to)
    check_attention(config.model)
    check_teacher_device(config.model, config.training.fsdp)
    check_quantization(config.model, config.training.fsdp)
    check_student_quantization(config.lora, config.training.fsdp)
    check_deepspeed(config.training.deepspeed)
    check_precision(config)
    check_optimizer(config.optimizer)
    _check_best(config)
    _check_streaming(config)
    check_features(config)
    check_view(config)
    check_own_teacher(config)
    check_features_layers(config, *locate_pair(config.model))
    rows = read_rows(config.data, takes_prompts(config))
    check_cached_rows(config.model.teacher_cache, config.data.shift_windows, rows)
    check_packed_rows(config.data, rows)
    build_loss(config.loss, vocab_size=None)
    check_weighting(config.token_weight, config.loss)
    if config.training.fsdp and config.lora.merge:
        raise InputError(
            "lora.merge=true conflicts with training.fsdp=true; remove it and merge the saved "
            "adapter"
        )
    return rows


def _check_best(config: RunConfig) -> None:
    """Refuse a best student by a measure that is not evaluated."""
    training, model = config.training, config.model
    for name in ("early_stopping", "smallest_gain"):
        needed = "keep_best" if name == "early_stopping" else "early_stopping"
        if getattr(training, name) and getattr(training, needed) is None:
            raise InputError(f"training.{name} has no effect without training.{needed}")
    if training.keep_best is None:
        return
    if training.eval_steps is None:
        raise InputError(
            f"training.keep_best={training.keep_best} needs evaluations in training; set "
            "training.eval_steps"
        )
    if training.keep_best in ("eval_ce", "eval_calibration_error") or model.teacher is not None:
        return
    cache = None if model.teacher_cache is None else Path(expand_home(model.teacher_cache))
    if cache is None or not read_manifest(cache).exact:
        raise InputError(
            f"training.keep_best={training.keep_best} compares with the whole teacher, and there "
            "is none; pass --teacher, or use eval_ce"
        )


def _check_streaming(config: RunConfig) -> None:
    """Refuse what needs all rows before training."""
    if not config.data.streaming:
        return
    if config.training.max_steps is None:
        raise InputError("data.streaming=true has no end: set --max-steps")
    if config.procedure.spec is not None or config.model.teacher_cache is not None:
        raise InputError(
            "data.streaming=true is not supported with a procedure or a teacher cache; remove one"
        )
    if config.trainer.arguments.get("dataloader_num_workers"):
        raise InputError(
            "trainer.dataloader_num_workers: data.streaming=true reads in the training process; "
            "remove it"
        )


def names_writer(config: RunConfig) -> bool:
    """Return whether a server writes answers of a procedure."""
    given = config.procedure
    return bool(given.writer or given.teacher_writer or is_address(config.model.teacher))


def procedure_of(config: RunConfig) -> Procedure | None:
    """Return the procedure of a run after checking that they are compatible; loads no model.

    Raises:
        InputError: the procedure is unknown, or incompatible with the run.
    """
    if config.procedure.spec is None:
        return None
    from kdrun.procedures.sampling import Sampling

    procedure = get_procedure(config.procedure.spec)
    procedure.check(config)
    Sampling.of(config.procedure, config.data.max_length, config.data.teacher_length)
    return procedure
