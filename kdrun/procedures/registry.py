"""The registry of procedures, the group ``kdrun.procedures``: specs such as ``gkd:lambda=0.5``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from kdlosses import PluginGroup, PluginRef
from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdrun.procedures.base import Procedure, Settings


class ProcedureRef(PluginRef):
    """A registered procedure, not yet imported."""


_GROUP = PluginGroup(
    "kdrun.procedures",
    "procedure",
    "kdrun procedures list",
    ProcedureRef,
    InputError,
    InputError,
)


def available_procedures() -> tuple[ProcedureRef, ...]:
    """All registered procedures by name, without importing them."""
    return _GROUP.available()


def split_spec(spec: str) -> tuple[str, Mapping[str, str]]:
    """Split a spec into name and parameters, as text.

    Raises:
        InputError: the spec does not have the form ``name:key=value,key=value``.
    """
    from kdlosses import one_term

    term = one_term(spec, "procedure", "gkd:lambda=0.5", InputError)
    return term.name, term.parameters


def find_procedure(name: str) -> ProcedureRef:
    """Find a registered procedure by name, without importing it.

    Raises:
        InputError: an unknown name (with a suggestion), or a name registered by two distributions.
    """
    return _GROUP.find(name)


def load_procedure(name: str) -> type[Procedure]:
    """Import the class registered under a name.

    Raises:
        InputError: unknown, broken, or not a procedure. If the environment variable
            ``KDLOSSES_DEBUG`` is set, the message contains the traceback.
    """
    from kdrun.procedures.base import Procedure

    return _GROUP.load(name, (Procedure,), "kdrun.procedures.Procedure")


def get_procedure(spec: str) -> Procedure:
    """Build a procedure from a spec.

    Args:
        spec: a name, and parameters after a colon: ``"gkd:lambda=0.5"``.

    Raises:
        InputError: an unknown name or parameter (with a suggestion), or a value out of bounds.
    """
    name, given = split_spec(spec)
    kind = load_procedure(name)
    return cast("Procedure", _GROUP.build(name, kind, kind.parameters(), given))


def takes_prompts(config: Settings) -> bool:
    """Return whether a run may train on prompts alone, because its procedure writes every answer.

    Raises:
        InputError: the procedure cannot be built.
    """
    spec = config.procedure.spec
    return spec is not None and not get_procedure(spec).needs_answers(config)
