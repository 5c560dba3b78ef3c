"""The teacher of a run that is its own student."""

from __future__ import annotations

import copy
from itertools import islice
from typing import TYPE_CHECKING, Any

from kdrun.cache.choose import ChosenTeacher
from kdrun.config.sections import KD_RATIO
from kdrun.data.prepare import examples_in
from kdrun.errors import InputError
from kdrun.models.cast import cast_weights
from kdrun.models.placement import teacher_devices
from kdrun.models.quantize import quantize
from kdrun.models.self_teacher import LIVE, SelfTeacher, check_self, is_self
from kdrun.procedures.registry import get_procedure

if TYPE_CHECKING:
    from kdrun.config.sections import RunConfig
    from kdrun.data.prepare import Examples

_LOOKED_AT = 1000


def check_own_teacher(config: RunConfig) -> None:
    """Refuse keys without effect, and procedures in which the teacher writes, before loading.

    Raises:
        InputError: names the key and the cure.
    """
    model, spec = config.model, config.procedure.spec
    check_self(model, config.lora.rank is not None)
    if not is_self(model.teacher):
        return
    if model.teacher_ema is not None and config.lora.rank is not None and config.training.fsdp:
        raise InputError(
            "model.teacher_ema: the mean of adapters is not kept with training.fsdp=true; remove "
            "one of them"
        )
    if spec is None or not shares_weights(config):
        return
    cost = get_procedure(spec).cost(config)
    if cost.teacher_answers or cost.teacher_answers_once:
        raise InputError(
            f"--teacher {model.teacher}: in procedure {spec} the teacher writes, for which a copy "
            "of the student is needed; pass the student's folder as --teacher"
        )


def shares_weights(config: RunConfig) -> bool:
    """Return whether the teacher has no weights of its own."""
    return config.model.teacher == LIVE or config.lora.rank is not None


def choose_self(config: RunConfig, examples: Examples, student: Any) -> ChosenTeacher:
    """Return the student as its own teacher.

    Args:
        config: says which of its weights are used.
        examples: the rows of the run.
        student: the student before adapters are added.

    Raises:
        InputError: the teacher cannot differ from the student.
    """
    import torch

    from kdrun.models.heads import FrozenTeacher, find_split

    model = config.model
    _check_difference(config, examples)
    decay = model.teacher_ema
    if decay is not None:
        note = f"teacher: the mean of the student's weights, of which a step keeps {decay:g}"
        return _following(config, student, decay, note)
    if shares_weights(config):
        live = model.teacher == LIVE
        own = SelfTeacher(student, find_split(student), live)
        what = "its present weights" if live else "its weights without adapters"
        return ChosenTeacher(own, own, {}, (f"teacher: the student itself, {what}",))
    start = copy.deepcopy(student)
    cast_weights(start, getattr(torch, model.teacher_type))
    if model.teacher_quantization is not None:
        quantize(start, model.teacher_quantization)
    frozen = FrozenTeacher(start, find_split(start), teacher_devices(model.teacher_device))
    return ChosenTeacher(frozen, frozen, {}, ("teacher: a copy of the student at its start",))


def _following(config: RunConfig, student: Any, decay: float, note: str) -> ChosenTeacher:
    from kdrun.models.heads import find_split
    from kdrun.models.mean_teacher import MeanAdapters, MeanTeacher

    if config.lora.rank is not None:
        adapters = MeanAdapters(student, find_split(student), decay)
        return ChosenTeacher(adapters, adapters, {}, (f"{note} (of its adapters)",))
    start = copy.deepcopy(student)
    mean = MeanTeacher(start, find_split(start), decay)
    return ChosenTeacher(mean, mean, {}, (note,))


def _check_difference(config: RunConfig, examples: Examples) -> None:
    """Refuse a teacher that gives the student's own distributions for ever.

    Raises:
        InputError: gives the cure.
    """
    rows: Any = examples.train
    for example in islice(examples_in(rows), _LOOKED_AT):
        if example.get("teacher_input_ids", example["input_ids"]) != example["input_ids"]:
            return
    cure = "give it another prompt (data.teacher_template or another key data.teacher_...)"
    if config.model.teacher == LIVE:
        raise InputError(
            f"--teacher {LIVE}: reads the student's own prompts, so it cannot differ from the "
            f"student; {cure}, or use --teacher self"
        )
    only_kd = config.loss.kd_ratio == 1 and KD_RATIO not in config.loss.schedules
    if only_kd and config.procedure.text is None:
        raise InputError(
            f"--teacher {config.model.teacher}: starts equal to the student and reads its prompts, "
            f"so that the loss stays 0; {cure}, or lower --kd-ratio"
        )
