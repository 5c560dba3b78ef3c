"""``kdrun bench``: run a plan, and write table and plots."""

from __future__ import annotations

import contextlib

from rich.console import Console

from kdrun.bench.cases import FLOOR
from kdrun.bench.measure import measure
from kdrun.bench.plan import Plan
from kdrun.bench.plot import FILES, draw
from kdrun.bench.report import CSV, FAILED, MEASURED, Row, print_tables, rows_of, write_csv


def bench(plan: Plan) -> bool:
    """Measure, print a table, and write it to the folder, with plots if matplotlib is installed.

    The file is rewritten after each loss, so that an interrupted benchmark keeps its results.

    Returns:
        Whether no measurement failed.
    """
    console = Console(highlight=False, soft_wrap=True)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    if plan.absent:
        names = ", ".join(plan.absent)
        progress.print(f"not installed in this environment, skipped: {names}")
    rows: list[Row] = []
    with contextlib.closing(measure(plan, progress.print)) as measurements:
        for results in measurements:
            rows = _in_order([*rows, *rows_of(results)], plan)
            write_csv(rows, plan.folder)
    print_tables(rows, console)
    console.print()
    _draw(rows, plan, console)
    return all(row.status != FAILED for row in rows)


def _in_order(rows: list[Row], plan: Plan) -> list[Row]:
    """Sort rows by point, with the floor first, although it is finished last."""
    places = {(point.tokens, point.vocab): place for place, point in enumerate(plan.points)}
    return sorted(
        rows, key=lambda row: (places[row.tokens, row.vocab], row.implementation != FLOOR)
    )


def _draw(rows: list[Row], plan: Plan, console: Console) -> None:
    files = [CSV]
    if not any(row.status == MEASURED and row.implementation != FLOOR for row in rows):
        reason = "no plots: no loss was measured"
    else:
        try:
            draw(rows, plan.folder)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "matplotlib":
                raise
            reason = "no plots: they need matplotlib, pip install 'kdlosses[plot]'"
        else:
            files += FILES
            reason = ""
    console.print(f"{plan.folder}: {', '.join(files)}", markup=False)
    if reason:
        console.print(reason, markup=False)
