"""What a comparison ends with: a table of verdicts on the terminal, and ``results.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from kdrun.compare.display import arm_name
from kdrun.compare.record import YARDSTICKS, Arm, Record
from kdrun.compare.run import Comparison
from kdrun.runs import write_text

if TYPE_CHECKING:
    from rich.console import Console

    from kdrun.compare.statistics import ArmVerdict

RESULTS = "results.csv"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def verdicts(comparison: Comparison, records: Sequence[Record]) -> list[ArmVerdict]:
    """Each arm against the baseline of its pair and, of several, the first learning rate.

    The arms of a pair are one family of tests.
    """
    from kdrun.compare.statistics import compare_all

    arms = list(dict.fromkeys(t.arm for t in comparison.planned(records) if t.stage == "final"))
    found: list[ArmVerdict] = []
    for baseline in (arm for arm in arms if arm.loss is None):
        pair = [arm for arm in arms if _pair(arm) == _pair(baseline)]
        own = [record for record in records if _pair(record.trial.arm) == _pair(baseline)]
        found += compare_all(own, baseline, comparison.yardstick, comparison.difference, pair)
    return found


def print_verdicts(comparison: Comparison, records: Sequence[Record], console: Console) -> None:
    """The mean of the primary yardstick of each arm, its difference to the baseline, a verdict."""
    yardstick = comparison.yardstick
    planned = comparison.planned(records)
    arms = list(dict.fromkeys(trial.arm for trial in planned if trial.stage == "final"))
    judged = {verdict.arm: verdict for verdict in verdicts(comparison, records)}
    table = Table(title=f"{yardstick.title}, {yardstick.unit}", title_justify="left")
    for heading, right in (
        ("arm", False), ("trials", True), ("mean", True), ("difference", True),
        ("simultaneous 95 % interval", True), ("verdict", False),
    ):  # fmt: skip
        table.add_column(heading, justify="right" if right else "left")
    for arm in arms:
        own = [r for r in records if r.trial.arm == arm and r.trial.stage == "final"]
        values = [x for r in own if (x := r.measures.get(yardstick.name)) is not None]
        verdict = judged.get(arm)
        numbers = verdict.comparison if verdict is not None else None
        table.add_row(
            escape(arm_name(arm, arms)),
            str(len(own)),
            f"{sum(values) / len(values):.4f}" if values else "-",
            "" if numbers is None else f"{numbers.mean:+.4f}",
            "" if numbers is None else f"[{numbers.interval[0]:+.4f}, {numbers.interval[1]:+.4f}]",
            "baseline" if verdict is None else verdict.verdict,
        )
    console.print(table)
    for verdict in judged.values():
        console.print(f"{arm_name(verdict.arm, arms)}: {verdict.reason}", markup=False)
    for record in records:
        if record.status != "done":
            console.print(
                f"{record.status}: {arm_name(record.trial.arm, arms)}, seed {record.trial.seed}: "
                f"{record.reason}",
                markup=False,
            )


def write_results(records: Sequence[Record], folder: Path) -> Path:
    """One row a trial with all its measures, as CSV; whole or not at all."""
    measures = [yardstick.name for yardstick in YARDSTICKS]
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(
        [
            *("id", "stage", "loss", "kd_ratio", "lr", "teacher", "student", "seed", "status"),
            *measures,
            *("supervised_tokens_per_second", "peak_memory_mib", "seconds", "reason"),
        ]
    )
    for record in records:
        arm = record.trial.arm
        values = [record.measures.get(name) for name in measures]
        table.writerow(
            [
                *(record.id, record.trial.stage, _harmless(arm.method), arm.kd_ratio, arm.lr),
                *(_harmless(arm.teacher), _harmless(arm.student), record.trial.seed),
                *(record.status, *values, record.supervised_tokens_per_second),
                *(record.peak_memory_mib, record.seconds, _harmless(record.reason or "")),
            ]
        )
    path = folder / RESULTS
    write_text(path, stream.getvalue())
    return path


def _pair(arm: Arm) -> tuple[str, str]:
    return arm.teacher, arm.student


def _harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
