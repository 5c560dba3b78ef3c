"""Checks of a term on hidden states, and its construction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdrun.data.teacher_prompt import FIELD
from kdrun.errors import InputError
from kdrun.losses.features import FeaturePlan, build_features, check_features_name, plan_features
from kdrun.models.address import is_address
from kdrun.models.context import load_model_config
from kdrun.models.self_teacher import is_self
from kdrun.run.view import has_view

if TYPE_CHECKING:
    from kdlosses import FeatureTerm
    from kdrun.config.sections import RunConfig
    from kdrun.data.prepare import Examples
    from kdrun.models.locate import ModelSource

_OTHER_PROMPT = "hidden states are compared token by token, but the teacher reads another prompt"
_IN_THE_BACKWARD_PASS = ("lomo", "layerwise")
"""Parts of the names of optimisers that step within the student's backward pass."""


def check_features(config: RunConfig) -> None:
    """Refuse a term on hidden states that the run cannot compute, before anything is loaded.

    Raises:
        InputError: names the key and the cure.
    """
    spec = config.features.spec
    if spec is None:
        return
    check_features_name(spec)
    name = f"features {spec}"
    if config.model.teacher_cache is not None:
        raise InputError(
            f"{name}: a teacher cache has no hidden states of inner layers; remove "
            "--teacher-cache and pass --teacher"
        )
    if is_address(config.model.teacher):
        raise InputError(
            f"{name}: a server gives no hidden states of inner layers; pass --teacher with a "
            "folder or hub id"
        )
    if config.model.teacher is None:
        raise InputError(f"{name}: needs a --teacher, also at --kd-ratio 0")
    if is_self(config.model.teacher):
        raise InputError(
            f"{name}: the hidden states of a student that teaches itself are not recorded; pass "
            "the student's folder as --teacher"
        )
    if config.data.teacher_keys:
        raise InputError(f"{name}: {_OTHER_PROMPT}; remove {config.data.teacher_keys[0]}")
    if config.training.torch_compile:
        raise InputError(
            f"{name}: hidden states are not recorded in compiled models; remove "
            "training.torch_compile=true"
        )


def check_features_view(config: RunConfig, examples: Examples) -> None:
    """Refuse rows with messages for the teacher.

    Raises:
        InputError: names the field and the cure.
    """
    if config.features.spec is not None and has_view(examples):
        raise InputError(
            f"features {config.features.spec}: {_OTHER_PROMPT}; remove field {FIELD!r}"
        )


def check_features_layers(
    config: RunConfig, teacher: ModelSource | None, student: ModelSource
) -> FeaturePlan | None:
    """Check the term against the models' configurations; None without a term.

    Raises:
        InputError: layers that a model does not have, or a wrong parameter of the loss.
    """
    spec, trust = config.features.spec, config.model.trust_remote_code
    if spec is None or teacher is None:
        return None
    from kdrun.models.hidden import hidden_shape

    plan = plan_features(
        spec, *(hidden_shape(load_model_config(model, trust)) for model in (teacher, student))
    )
    optimizer = config.optimizer.name or ""
    if plan.projected and any(part in optimizer for part in _IN_THE_BACKWARD_PASS):
        raise InputError(
            f"features {spec}: optimizer.name={optimizer} does not train the projectors between "
            "states of different widths; use another optimiser"
        )
    return plan


def open_features(config: RunConfig, teacher: Any, student: Any) -> FeatureTerm | None:
    """Build the term for loaded models; None without one.

    Args:
        config: configuration of the run.
        teacher: the teacher for training.
        student: the student.
    """
    if config.features.spec is None:
        return None
    from kdrun.models.heads import FrozenTeacher
    from kdrun.models.hidden import hidden_shape

    assert isinstance(teacher, FrozenTeacher), "checked before"
    of_teacher, of_student = (hidden_shape(model.config) for model in (teacher.model, student))
    return build_features(config.features, of_teacher, of_student, config.training.seed)


def describe_features(term: FeatureTerm) -> str:
    """Return a line about the pairs of layers and the projectors."""
    pairs = ", ".join(f"{teacher}-{student}" for teacher, student in term.pairs)
    count = sum(weight.numel() for weight in term.parameters())
    trained = f"; projectors of {count / 1e6:.2f} M parameters are trained" if count else ""
    return f"hidden states: layers {pairs} (teacher-student){trained}"
