"""The output of ``kdrun losses check``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdlosses import BrokenLossError, LossSpecError, available_losses, loss_files, testing
from kdrun.losses.describe import single_loss

_DOCUMENTATION = "documentation"
_COLOURS = {"passed": "green", "failed": "red", "expected failure": "yellow"}


def print_json(name: str | None) -> bool:
    """Run the checks of one loss, or of every registered one, and print the verdicts as JSON.

    Args:
        name: spec of the loss; None for all, which prints a list.

    Returns:
        Whether all checks passed.

    Raises:
        LossSpecError: an unknown loss.
        BrokenLossError: the loss cannot be imported.
    """
    if name is not None:
        found = _report(name)
        print(json.dumps(found, indent=1))
        return bool(found["verdict"] == "passed")
    reports = []
    for each in sorted({ref.name for ref in available_losses()}):
        try:
            reports.append(_report(each))
        except (BrokenLossError, LossSpecError) as error:
            reports.append({"spec": each, "verdict": "broken", "reason": str(error)})
    print(json.dumps(reports, indent=1))
    return all(report["verdict"] == "passed" for report in reports)


def _report(spec: str) -> dict[str, Any]:
    loss = single_loss(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = testing.report_checks(loss)
    return {"spec": spec, "files": loss_files(spec), **report}


def check_one(spec: str) -> bool:
    """Run the conformance checks of a loss and print a row for each.

    Returns:
        Whether all checks passed.

    Raises:
        LossSpecError: an unknown loss.
        BrokenLossError: the loss cannot be imported.
    """
    return print_results(spec, _results(spec))


def print_results(spec: str, results: list[testing.CheckResult]) -> bool:
    """Print a row for each check, and the verdict.

    Returns:
        Whether all checks passed.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("reason")
    # Documentation is listed last, separate from the mathematics.
    for result in sorted(results, key=lambda result: result.about == _DOCUMENTATION):
        table.add_row(_named(result), _coloured(result.verdict), escape(result.reason))
    console = _console()
    console.print(table)
    console.print(f"\n{escape(spec)}: {_verdict(results)}")
    return not _failed(results)


def check_all() -> bool:
    """Run the checks of every registered loss; print a line per loss, and its failures.

    Returns:
        Whether all checks passed. A loss that cannot be used counts as failed.
    """
    names = sorted({ref.name for ref in available_losses()})
    return print_all(names, _results, (BrokenLossError, LossSpecError), "losses")


def print_all(
    names: Sequence[str],
    results_of: Callable[[str], list[testing.CheckResult]],
    unusable: tuple[type[Exception], ...],
    what: str,
) -> bool:
    """Run checks of several plugins; print a line for each, and its failures.

    Args:
        names: what to check.
        results_of: runs the checks of one.
        unusable: raised for one that cannot be used, which counts as failed.
        what: the plural of what is checked.

    Returns:
        Whether all checks passed.
    """
    console = _console()
    good = 0
    for name in names:
        try:
            results = results_of(name)
        except unusable as error:
            console.print(f"{name}: [red]broken[/red]: {escape(str(error))}")
            continue
        good += not _failed(results)
        console.print(f"{name}: {_verdict(results)}")
        for result in results:
            if result.verdict != "passed":
                verdict = _coloured(result.verdict)
                console.print(f"  {_named(result)}: {verdict}: {escape(result.reason)}")
    console.print(f"\n{good} of {len(names)} {what} pass")
    return good == len(names)


def _results(spec: str) -> list[testing.CheckResult]:
    loss = single_loss(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return testing.run_checks(loss)


def _failed(results: list[testing.CheckResult]) -> int:
    return sum(result.verdict == "failed" for result in results)


def _verdict(results: list[testing.CheckResult]) -> str:
    failed = _failed(results)
    expected = sum(result.verdict == "expected failure" for result in results)
    declared = f", {expected} expected to fail" if expected else ""
    if failed:
        of = f"{failed} of {len(results)} checks{declared}"
        if all(r.about == _DOCUMENTATION for r in results if r.verdict == "failed"):
            return f"[yellow]the mathematics passed, the documentation failed[/yellow] ({of})"
        return f"[red]failed[/red] ({of})"
    return f"[green]passed[/green] ({len(results) - expected} checks{declared})"


def _named(result: testing.CheckResult) -> str:
    """The name of a check, marked if it is about the documentation."""
    return f"{result.name} ({_DOCUMENTATION})" if result.about == _DOCUMENTATION else result.name


def _coloured(verdict: str) -> str:
    return f"[{_COLOURS[verdict]}]{verdict}[/]"


def _console() -> Any:
    return Console(highlight=False, soft_wrap=True)
