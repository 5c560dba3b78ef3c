"""Checks of what the teacher of a run reads, where it is not what the student reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdrun.data.teacher_prompt import FIELD, TeacherPrompt
from kdrun.data.token_store import Tokens
from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdrun.config.sections import RunConfig
    from kdrun.data.prepare import Examples


def check_view(config: RunConfig) -> None:
    """Refuse keys about the teacher's prompt that exclude each other or have no effect.

    Raises:
        InputError: names the key and the cure.
    """
    TeacherPrompt.of(config.data)
    keys = config.data.teacher_keys
    if keys and config.model.teacher is None and config.model.teacher_cache is None:
        raise InputError(f"{keys[0]} has no effect without a teacher; pass --teacher, or remove it")


def has_view(examples: Examples) -> bool:
    """Return whether the teacher reads another sequence of any training example."""
    rows: Any = examples.train
    return isinstance(rows, Tokens) and rows.has_view()


def check_procedure_view(spec: str, examples: Examples) -> None:
    """Refuse rows with messages for the teacher, for a procedure that drops them.

    Raises:
        InputError: names the field and the cure.
    """
    from kdrun.procedures.registry import get_procedure

    procedure = get_procedure(spec)
    if has_view(examples) and not procedure.takes_views:
        raise InputError(procedure.refused_view(f"field {FIELD!r}"))
