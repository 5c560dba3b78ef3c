"""The report of a comparison as it stands: one for each pair of teacher and student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdrun.compare.ledger import Ledger
from kdrun.compare.record import Arm, Record
from kdrun.compare.references import read_references
from kdrun.compare.report import ReportInput, print_table, write_report
from kdrun.compare.run import Comparison

if TYPE_CHECKING:
    from rich.console import Console


def report(
    comparison: Comparison, records: Sequence[Record], ledger: Ledger, console: Console
) -> None:
    """Print the tables and write the pages.

    The arms of a pair are compared with the baseline of that pair, and are one family of tests.
    With several pairs each has a folder of its own.

    Raises:
        InputError: the extra ``compare`` is not installed.
    """
    pairs = inputs(comparison, records, ledger)
    for number, given in enumerate(pairs, 1):
        folder = ledger.folder if len(pairs) == 1 else ledger.folder / f"pair-{number}"
        print_table(given, console)
        console.print(f"report: {write_report(given, folder)}", markup=False)


def inputs(comparison: Comparison, records: Sequence[Record], ledger: Ledger) -> list[ReportInput]:
    """What each pair's report is made from; a pair whose baseline is not chosen yet has none."""
    planned = comparison.planned(records)
    baselines = [t.arm for t in planned if t.stage == "final" and t.arm.loss is None]
    found = []
    for baseline in dict.fromkeys(baselines):
        own = [record for record in records if _pair(record.trial.arm) == _pair(baseline)]
        found.append(
            ReportInput(
                title=f"Losses compared: {baseline.teacher} to {baseline.student}",
                records=own,
                trials=[trial for trial in planned if _pair(trial.arm) == _pair(baseline)],
                baseline=baseline,
                yardstick=comparison.yardstick,
                difference=comparison.difference,
                references=read_references(ledger, baseline),
            )
        )
    return found


def _pair(arm: Arm) -> tuple[str, str]:
    return arm.teacher, arm.student
