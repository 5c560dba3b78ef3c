"""The report of a comparison in its current state, for each pair of teacher and student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdrun.compare.ledger import Ledger
from kdrun.compare.plan import Plan, methods
from kdrun.compare.references import read_references
from kdrun.compare.report import ReportInput, print_table, write_report

if TYPE_CHECKING:
    from rich.console import Console


def report(plan: Plan, ledger: Ledger, console: Console) -> None:
    """Print the tables and write the report pages.

    The arms of a pair are compared with the baseline of that pair and form one family of tests.
    If there are several pairs, each has its own folder.

    Raises:
        InputError: the extra ``compare`` is not installed, or a record was edited.
    """
    pairs = inputs(plan, ledger)
    for number, given in enumerate(pairs, 1):
        folder = ledger.folder if len(pairs) == 1 else ledger.folder / f"pair-{number}"
        print_table(given, console)
        console.print(f"report: {write_report(given, folder)}", markup=False)


def inputs(plan: Plan, ledger: Ledger) -> list[ReportInput]:
    """The input of the report of each pair."""
    every = ledger.records()
    records = plan.own(every)
    planned = plan.planned(records)
    notes = []
    if len(every) > len(records):
        notes.append(
            f"The folder contains {len(every) - len(records)} more trials from earlier commands "
            "with other learning rates, ratios or tuning seeds; this report excludes them."
        )
    found = []
    for method in methods(plan.axes):
        if method.loss is not None or method.procedure is not None:
            continue
        pair = (method.teacher, method.student)
        own = [record for record in records if record.trial.arm.pair == pair]
        trials = [trial for trial in planned if trial.arm.pair == pair]
        # Until tuning has selected a baseline, its first arm is used and there are no verdicts.
        chosen = [t.arm for t in trials if t.stage == "final" and t.arm.plain]
        found.append(
            ReportInput(
                title=f"Losses compared: {method.teacher} to {method.student}",
                records=own,
                trials=trials,
                baseline=[*chosen, method.arms(plan.axes)[0]][0],
                yardstick=plan.yardstick,
                difference=plan.difference,
                references=read_references(ledger, pair, plan.reported),
                notes=notes,
            )
        )
    return found
