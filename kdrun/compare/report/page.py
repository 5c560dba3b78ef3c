"""``report.html``: a self-contained page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from kdrun.compare.extra import compare_extra
from kdrun.compare.record import Record
from kdrun.compare.report import words
from kdrun.compare.report.content import Spread, Summary
from kdrun.compare.report.figures import NARROW, WIDE, Drawing, inline_svg
from kdrun.compare.report.tables import reference

with compare_extra():
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

_MARKS = {"wholly": "†", "partly": "‡"}


def page(summary: Summary, drawings: Sequence[Drawing]) -> str:
    """The whole page. All names are escaped, and only the script of the page can run."""
    script = _part("page.js")
    environments = _environments(summary.given.records)
    template = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    ).from_string(_part("page.html"))
    return template.render(
        given=summary.given,
        # Style and script are files of this package, and the figures escape their text.
        style=Markup(_part("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        figures=[
            {
                "name": drawing.name,
                "title": drawing.title,
                "caption": drawing.caption,
                "wide": Markup(inline_svg(drawing, WIDE)),
                "narrow": Markup(inline_svg(drawing, NARROW)),
            }
            for drawing in drawings
        ],
        headline=words.headline(summary),
        warnings=words.warnings(summary),
        rule=words.rule(summary),
        ordered=words.ordered(summary),
        baseline=summary.arms[0],
        arms=summary.arms,
        any_trained=any(arm.trained_on for arm in summary.arms),
        with_procedures=summary.with_procedures,
        yardsticks=summary.yardsticks,
        unwell=summary.unwell,
        missing=summary.missing,
        tuned=summary.tuned,
        trials=[
            (label, sorted(own, key=lambda record: (record.trial.stage, record.trial.seed)))
            for arm, label in summary.labels.items()
            if (own := [record for record in summary.given.records if record.trial.arm == arm])
        ],
        environments=environments,
        environment=lambda record: environments.index(_environment(record)) + 1,
        name=lambda trial: words.trial_name(trial, summary),
        interval=words.interval,
        number=words.number,
        spread=words.spread,
        rounded=words.rounded,
        reference=reference,
        heading=_heading,
        cell=_cell,
    )


def _part(name: str) -> str:
    return (files("kdrun.compare.report") / name).read_text(encoding="utf-8")


def _environment(record: Record) -> tuple[Mapping[str, str], Mapping[str, str]]:
    return record.versions, record.hardware


def _environments(records: Sequence[Record]) -> list[tuple[Mapping[str, str], Mapping[str, str]]]:
    """The distinct pairs of versions and hardware."""
    found: list[tuple[Mapping[str, str], Mapping[str, str]]] = []
    for record in records:
        if _environment(record) not in found:
            found.append(_environment(record))
    return found


def _heading(title: str, kind: str, unit: str = "") -> Any:
    below = Markup('<span class="unit">{}</span>').format(unit) if unit else ""
    return Markup('<th scope="col" class="{}"><button type="button">{}</button>{}</th>').format(
        kind, title, below
    )


def _cell(found: Spread | None, text: str, trained: str | None = None) -> Any:
    return Markup('<td class="number" data-value="{}">{}{}</td>').format(
        "" if found is None else repr(found.mean),
        text,
        _MARKS[trained] if trained and found else "",
    )
