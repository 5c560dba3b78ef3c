"""The entry-point registry of procedures: names and specs such as ``gkd:lambda=0.5``.

Built-in procedures and plugins come in by the same door, the group ``kdrun.procedures``. Listing
reads metadata only; a plugin that cannot be imported breaks nothing but itself.
"""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdrun.procedures.base import Procedure

GROUP = "kdrun.procedures"
BUILT_IN = "kdlosses"
DEBUG_VARIABLE = "KDLOSSES_DEBUG"


@dataclass(frozen=True)
class ProcedureRef:
    """A registered procedure, not yet imported.

    Attributes:
        name: the name on the command line.
        distribution: the installed distribution that registers it.
        module: ``package.module:Class``.
    """

    name: str
    distribution: str
    module: str


def available_procedures() -> tuple[ProcedureRef, ...]:
    """All registered procedures by name; imports none of them."""
    refs = (ProcedureRef(e.name, _distribution(e), e.value) for e in entry_points(group=GROUP))
    return tuple(sorted(refs, key=lambda ref: (ref.name, ref.distribution)))


def split_spec(spec: str) -> tuple[str, Mapping[str, str]]:
    """Name and parameters of a spec, still as text; nothing is looked up.

    Raises:
        InputError: it has another form than ``name:key=value,key=value``.
    """
    from kdlosses import LossSpecError, parse_spec

    try:
        parsed = parse_spec(spec)
    except LossSpecError as error:
        raise InputError(
            f"procedure {spec!r}: expected a name such as gkd, or gkd:lambda=0.5 with key=value "
            "after the colon, each key once"
        ) from error
    if len(parsed.terms) > 1 or parsed.chunked or parsed.terms[0].weight != 1:
        raise InputError(
            f"procedure {spec!r}: expected one name; only losses have weights and sums"
        )
    return parsed.terms[0].name, parsed.terms[0].parameters


def find_procedure(name: str) -> ProcedureRef:
    """The registered procedure of a name; imports nothing.

    Raises:
        InputError: an unknown name, with a close one, or a name that two distributions claim.
    """
    entry = _find(name)
    return ProcedureRef(entry.name, _distribution(entry), entry.value)


def load_procedure(name: str) -> type[Procedure]:
    """Import the class registered under a name.

    Raises:
        InputError: unknown, broken, or no procedure. With the environment variable
            ``KDLOSSES_DEBUG`` set, the message holds the traceback.
    """
    entry = _find(name)
    origin = f"procedure {name!r} of distribution {_distribution(entry)!r} ({entry.value})"
    try:
        loaded = entry.load()
    # SystemExit too: a plugin that calls sys.exit() on import must not end the command line.
    except (Exception, SystemExit) as error:
        detail = f"{type(error).__name__}: {error} (set {DEBUG_VARIABLE}=1 for more)"
        if os.environ.get(DEBUG_VARIABLE):
            detail = traceback.format_exc()
        raise InputError(f"{origin} cannot be imported: {detail}") from error
    from kdrun.procedures.base import Procedure

    if not (isinstance(loaded, type) and issubclass(loaded, Procedure)):
        raise InputError(f"{origin} is not a subclass of kdrun.procedures.Procedure")
    return loaded


def get_procedure(spec: str) -> Procedure:
    """Build a procedure from a spec.

    Args:
        spec: a name, and parameters after a colon: ``"gkd:lambda=0.5"``.

    Raises:
        InputError: an unknown name or parameter, with a close one, or a value out of bounds.
    """
    from pydantic import ValidationError

    name, given = split_spec(spec)
    kind = load_procedure(name)
    known = list(kind.parameters())
    for key in given:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
            hint = _did_you_mean(key, known)
            raise InputError(f"procedure {name!r} has no parameter {key!r}{hint}; {takes}")
    try:
        return kind(**given)
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise InputError(
            f"procedure {name!r}: {where}={first['input']!r}: {first['msg']}"
        ) from error


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown"


def _find(name: str) -> EntryPoint:
    entries = list(entry_points(group=GROUP))
    matches = [entry for entry in entries if entry.name == name]
    if not matches:
        names = sorted({entry.name for entry in entries})
        hint = _did_you_mean(name, names) or f"; known: {', '.join(names)}"
        raise InputError(
            f"unknown procedure {name!r}{hint}; 'kdrun procedures list' shows all {len(names)}"
        )
    if len({entry.value for entry in matches}) > 1:
        built_in = [entry for entry in matches if _distribution(entry) == BUILT_IN]
        if not built_in:
            distributions = " and ".join(sorted({_distribution(entry) for entry in matches}))
            raise InputError(
                f"procedure {name!r} is registered by {distributions}; uninstall all but one"
            )
        return built_in[0]
    return matches[0]


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
