"""The output of ``kdrun weights``."""

from __future__ import annotations

import inspect
import json

from rich.markup import escape
from rich.table import Table

from kdlosses import (
    BrokenWeightError,
    WeightSpecError,
    available_weights,
    find_weight,
    get_weight,
    weight_files,
)
from kdrun.losses.check import print_results
from kdrun.losses.describe import parameters
from kdrun.losses.show import plain_console, print_parameters


def print_list() -> None:
    """Print one row per token weight, with the summary line of its docstring."""
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "distribution", "what it is"):
        table.add_column(heading, no_wrap=heading != "what it is")
    for ref in available_weights():
        try:
            text = inspect.cleandoc(type(get_weight(ref.name)).__doc__ or "-").splitlines()[0]
        except (WeightSpecError, BrokenWeightError) as error:
            text = f"broken: {error}"
        table.add_row(*map(escape, (ref.name, ref.distribution, text)))
    plain_console().print(table)


def print_weight(spec: str) -> None:
    """Print the description, parameters and traits of a token weight.

    Raises:
        WeightSpecError: an unknown token weight.
        BrokenWeightError: it cannot be imported.
    """
    weight = get_weight(spec)
    console = plain_console()
    console.print(inspect.cleandoc(type(weight).__doc__ or "(no docstring)"), markup=False)
    console.print()
    print_parameters(console, parameters(weight))
    for trait in ("supports_top_k", "uses_position", "stateful"):
        console.print(f"{trait}: {getattr(weight, trait)}")
    for file, digest in weight_files(spec).items():
        console.print(f"from the file {file}, SHA-256 {digest}", markup=False)
        return
    ref = find_weight(spec.partition(":")[0].strip())
    console.print(f"registered by {ref.distribution} as {ref.name}", markup=False)


def print_checks(spec: str, as_json: bool) -> bool:
    """Run the conformance checks of a token weight and print the results.

    Returns:
        Whether all checks passed.

    Raises:
        WeightSpecError: an unknown token weight.
        BrokenWeightError: it cannot be imported.
    """
    from kdlosses import testing

    if not as_json:
        return print_results(spec, testing.run_weight_checks(spec))
    report = {"spec": spec, "files": weight_files(spec), **testing.report_weight_checks(spec)}
    print(json.dumps(report, indent=1))
    return bool(report["verdict"] == "passed")
