"""The results as CSV and LaTeX."""

from __future__ import annotations

import csv
import io

from kdrun.compare.labels import printable
from kdrun.compare.record import Record, Trial
from kdrun.compare.report import words
from kdrun.compare.report.content import Spread, Summary
from kdrun.evaluation.yardsticks import YARDSTICKS

# Spreadsheets read cells with these first characters as formulas.
_FORMULA = ("=", "+", "-", "@")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
}


def csv_text(summary: Summary) -> str:
    """One row per trial, including trials that have not run."""
    names = [yardstick.name for yardstick in YARDSTICKS]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        [
            *("id", "stage", "loss", "procedure", "kd_ratio", "lr", "teacher", "student", "seed"),
            *("status", "reason", *names, "supervised_tokens_per_second"),
            *("peak_memory_mib", "seconds", "generated_tokens", "command"),
        ]
    )
    for record in summary.given.records:
        done = record.status == "done"
        speeds = [record.supervised_tokens_per_second, record.peak_memory_mib]
        writer.writerow(
            [
                *(_cell(record.id), *_trial_cells(record.trial)),
                *(record.status, _cell(record.reason or "")),
                *(_number(record, name) for name in names),
                *(speeds if done else ["", ""]),
                *(record.seconds, record.generated_tokens, _cell(record.command)),
            ]
        )
    for trial in summary.missing:
        writer.writerow(["", *_trial_cells(trial), "missing", *[""] * (len(names) + 6)])
    return stream.getvalue()


def latex_text(summary: Summary) -> str:
    """Two tables for ``booktabs``: the verdicts, and all measures."""
    yardstick = summary.given.yardstick
    baseline = _tex(summary.arms[0].label)
    verdicts = [
        [
            _code(arm.label),
            str(len(verdict.comparison.seeds) if verdict.comparison else arm.done),
            _tex(words.interval(verdict) or "–"),
            verdict.verdict,
        ]
        for arm, verdict in words.ordered(summary)
    ]
    written = summary.with_procedures
    more = ["s", "generated tokens"] if written else []
    measures = [
        [
            _code(arm.label),
            *(_tex(words.spread(arm.measures.get(y.name), y)) for y in summary.yardsticks),
            _tex(words.rounded(arm.speed)),
            _tex(words.rounded(arm.memory)),
            *(_tex(words.rounded(x)) for x in (arm.seconds, arm.generated) if written),
        ]
        for arm in summary.arms
    ]
    references = [
        [
            _tex(name),
            *(_tex(words.spread(reference(values.get(y.name)), y)) for y in summary.yardsticks),
            *(["--"] * (4 if written else 2)),
        ]
        for name, values in summary.given.references.items()
    ]
    first = _table(
        f"Difference from {baseline} in {_tex(yardstick.title)} ({_tex(yardstick.unit)}), with "
        f"simultaneous 95\\,\\% intervals; smallest difference of interest "
        f"{summary.given.difference:g}.",
        "lrrl",
        ["Arm", "Seeds", "Difference", "Verdict"],
        [verdicts],
    )
    second = _table(
        "Means over seeds, with standard deviations.",
        "l" + "r" * (len(summary.yardsticks) + 2 + len(more)),
        ["Arm", *(_tex(y.title) for y in summary.yardsticks), "tokens/s", "MiB", *more],
        [measures, references],
    )
    warnings = [f"% {' '.join(line.split())}" for line in words.warnings(summary)]
    return "\n".join(["% \\usepackage{booktabs,textcomp}", *warnings, "", first, "", second, ""])


def reference(value: float | None) -> Spread | None:
    """The measure of a reference model, as a spread over one value."""
    return None if value is None else Spread((value,), value, None)


def _trial_cells(trial: Trial) -> list[object]:
    arm = trial.arm
    names = [_cell(name) for name in (arm.teacher, arm.student)]
    return [
        trial.stage,
        _cell(arm.method),
        _cell(arm.procedure or ""),
        arm.kd_ratio,
        arm.lr,
        *names,
        trial.seed,
    ]


def _number(record: Record, name: str) -> object:
    value = record.measures.get(name)
    return "" if value is None else value


def _cell(text: str) -> str:
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def _table(caption: str, columns: str, head: list[str], groups: list[list[list[str]]]) -> str:
    rows = [
        r"\midrule" + "\n" + "\n".join(_row(cells) for cells in group) for group in groups if group
    ]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _row(head),
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _code(text: str) -> str:
    return rf"\texttt{{{_tex(text)}}}"
