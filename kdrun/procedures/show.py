"""The output of ``kdrun procedures``."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdrun.errors import InputError
from kdrun.losses.describe import bounds
from kdrun.procedures.registry import (
    available_procedures,
    find_procedure,
    get_procedure,
    split_spec,
)


def print_list() -> None:
    """Print one row per procedure, with the summary line of its docstring."""
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "distribution", "what it does"):
        table.add_column(heading, no_wrap=heading != "what it does")
    for ref in available_procedures():
        try:
            text = inspect.cleandoc(type(get_procedure(ref.name)).__doc__ or "-").splitlines()[0]
        except InputError as error:
            text = f"broken: {error}"
        table.add_row(*map(escape, (ref.name, ref.distribution, text)))
    _console().print(table)


def print_procedure(spec: str) -> None:
    """Print the description, parameters and defaults of a procedure.

    Raises:
        InputError: an unknown procedure.
    """
    procedure = get_procedure(spec)
    kind = type(procedure)
    console = _console()
    console.print(inspect.cleandoc(kind.__doc__ or "(no docstring)"), markup=False)
    console.print()
    parameters = kind.parameters()
    if parameters:
        table = Table(box=None, pad_edge=False)
        for heading in ("parameter", "value", "bounds", "meaning"):
            table.add_column(heading)
        for shown, name in parameters.items():
            info = kind.model_fields[name]
            cells = (shown, str(getattr(procedure, name)), bounds(info.metadata))
            table.add_row(*map(escape, (*cells, info.description or "")))
        console.print(table)
        console.print()
    for key, value in kind.defaults.items():
        console.print(f"default: {key}={value}", markup=False)
    ref = find_procedure(split_spec(spec)[0])
    console.print(f"registered by {ref.distribution} as {ref.name}")


def print_checks(spec: str) -> bool:
    """Run the conformance checks of a procedure and print a row for each.

    Returns:
        Whether all checks passed.

    Raises:
        InputError: an unknown procedure.
    """
    from kdrun.procedures.testing import run_checks
    from kdrun.quiet import quiet_libraries

    with quiet_libraries():
        results = run_checks(get_procedure(spec))
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "verdict", "reason"):
        table.add_column(heading, no_wrap=heading != "reason")
    for result in results:
        verdict = "[red]failed[/]" if result.reason else "[green]passed[/]"
        table.add_row(result.name, verdict, escape(result.reason))
    console = _console()
    console.print(table)
    failed = sum(bool(result.reason) for result in results)
    outcome = f"failed ({failed} of {len(results)} checks)" if failed else "passed"
    console.print(f"\n{escape(spec)}: {outcome}")
    return not failed


def _console() -> Any:
    return Console(highlight=False, soft_wrap=True)
