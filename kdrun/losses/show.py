"""The output of ``kdrun losses``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdlosses import (
    BrokenLossError,
    LossRef,
    LossSpecError,
    PluginRef,
    available_losses,
    find_loss,
    ignored_losses,
    loss_files,
    parse_spec,
)
from kdrun.errors import InputError
from kdrun.losses.describe import Parameter, doc_parts, family, parameters, single_loss, traits

if TYPE_CHECKING:
    from kdlosses import Loss

IGNORED = "ignored: the name belongs to a built-in loss"


def print_list(details: bool) -> None:
    """Print one row per loss; with ``details``, import each and report broken ones."""
    console = plain_console()
    if details:
        for ref in available_losses():
            for line in _details(ref):
                console.print(line, markup=False)
        return
    print_refs(available_losses(), ignored_losses())


def print_refs(refs: Sequence[PluginRef], ignored: Sequence[PluginRef]) -> None:
    """Print names and distributions, and which of them are ignored."""
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "distribution", ""):
        table.add_column(heading, no_wrap=True)
    for ref in refs:
        note = IGNORED if ref in ignored else ""
        table.add_row(escape(ref.name), escape(ref.distribution), note)
    plain_console().print(table)


def print_loss(name: str, plot: Path | None = None) -> None:
    """Print formula, parameters, traits and plot of one loss.

    Args:
        name: name of the loss, with or without parameters.
        plot: file for a picture of the plot.

    Raises:
        LossSpecError: an unknown loss.
        InputError: a picture that cannot be written, or a sum of losses.
    """
    loss = single_loss(name)
    if plot is not None:
        from kdrun.losses.plot import check_plot_file, write_plot

        check_plot_file(plot)
        write_plot(name, plot)
    console = plain_console()
    console.print(inspect.cleandoc(type(loss).__doc__ or "(no docstring)"), markup=False)
    console.print()
    print_parameters(console, parameters(loss))
    for trait, value in traits(loss).items():
        console.print(f"{trait}: {value}", markup=False)
    ref = find_loss(parse_spec(name).terms[0].name)
    if files := loss_files(name):
        for file, digest in files.items():
            console.print(f"from the file {file}, SHA-256 {digest}", markup=False)
    else:
        console.print(f"registered by {ref.distribution} as {ref.name} and {ref.name}_chunked")
    console.print()
    _print_plot(console, name)
    if plot is not None:
        console.print(f"\n{plot} written", markup=False)


def print_parameters(console: Any, fields: Sequence[Parameter]) -> None:
    """Print a table of parameters and an empty line, if there are any."""
    if not fields:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("parameter", "value", "bounds", "meaning"):
        table.add_column(heading)
    for field in fields:
        table.add_row(*map(escape, (field.name, field.value, field.bounds, field.meaning)))
    console.print(table)
    console.print()


def _print_plot(console: Any, name: str) -> None:
    from kdrun.losses.plot import SETTING, draw_text

    try:
        lines = draw_text(name, console.encoding)
    except InputError as error:  # still show the rest of the loss
        console.print(f"no plot: {error}", markup=False)
        return
    for line in lines:
        console.print(line, markup=False)
    console.print(SETTING)


def _details(ref: LossRef) -> list[str]:
    """Lines about one loss, since table cells are too narrow for formula and reference."""
    heading = [ref.name, ref.distribution]
    if ref in ignored_losses():
        return ["  ".join([*heading, IGNORED])]
    try:
        loss: Loss = single_loss(ref.name)
    except (BrokenLossError, LossSpecError) as error:
        return ["  ".join([*heading, "broken"]), f"    {error}"]
    heading += [family(loss), ", ".join(f"{k}={v}" for k, v in loss.model_dump().items())]
    parts = doc_parts(loss)
    more = [parts.formula or parts.title, parts.reference]
    return ["  ".join(heading).rstrip(), *(f"    {line}" for line in more)]


def plain_console() -> Any:
    """A console that neither highlights nor wraps."""
    return Console(highlight=False, soft_wrap=True)
