"""The results as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdrun.compare.report.content import ReportInput, Spread, summarise
from kdrun.evaluation.yardsticks import Yardstick

_COLOURS = {"better": "green", "worse": "red", "diverged": "red", "equivalent": "blue"}


def print_table(given: ReportInput, console: Console) -> None:
    """Print verdicts, all measures and warnings.

    Raises:
        InputError: the extra ``compare`` is not installed.
    """
    from kdrun.compare.report import words
    from kdrun.compare.report.tables import reference

    def mean(found: Spread | None, yardstick: Yardstick) -> str:
        return "–" if found is None else words.number(found.mean, yardstick)

    summary = summarise(given)
    console.print(escape(words.headline(summary)), style="bold")
    console.print(escape(words.rule(summary)), style="dim")
    console.print()
    verdicts = Table(box=None, pad_edge=False)
    verdicts.add_column("arm", overflow="fold")
    verdicts.add_column("seeds", justify="right", no_wrap=True)
    verdicts.add_column("difference", justify="right")
    verdicts.add_column("verdict", overflow="fold")
    for arm, verdict in words.ordered(summary):
        colour = _COLOURS.get(verdict.verdict, "yellow")
        verdicts.add_row(
            escape(arm.label),
            f"{arm.done}/{arm.planned}",
            words.interval(verdict) or "–",
            f"[{colour}]{verdict.verdict}[/]: {escape(verdict.reason)}",
        )
    console.print(verdicts)
    console.print()
    measures = Table(box=None, pad_edge=False)
    measures.add_column("mean over seeds", overflow="fold", min_width=16)
    for yardstick in summary.yardsticks:
        measures.add_column(yardstick.title, justify="right", overflow="fold")
    measures.add_column("tokens/s", justify="right")
    measures.add_column("MiB", justify="right")
    if summary.with_procedures:
        measures.add_column("seconds", justify="right")
        measures.add_column("generated tokens", justify="right")
    for arm in summary.arms:
        cells = []
        for yardstick in summary.yardsticks:
            found = arm.measures.get(yardstick.name)
            mark = "*" if found and yardstick.name in arm.trained_on else ""
            cells.append(mean(found, yardstick) + mark)
        speeds = [words.rounded(arm.speed), words.rounded(arm.memory)]
        if summary.with_procedures:
            speeds += [words.rounded(arm.seconds), words.rounded(arm.generated)]
        measures.add_row(escape(arm.label), *cells, *speeds)
    for name, values in given.references.items():
        cells = [
            mean(reference(values.get(yardstick.name)), yardstick)
            for yardstick in summary.yardsticks
        ]
        dashes = ["–"] * (4 if summary.with_procedures else 2)
        measures.add_row(escape(name), *cells, *dashes, style="dim")
    console.print(measures)
    if any(arm.trained_on for arm in summary.arms):
        console.print("* the arm trains on this yardstick, at least in part", style="dim")
    console.print()
    for line in [*words.warnings(summary), *given.notes]:
        console.print(escape(line))
    for record in summary.unwell:
        name = words.trial_name(record.trial, summary)
        console.print(escape(f"{record.status}: {name}: {record.reason or 'no reason recorded'}"))
