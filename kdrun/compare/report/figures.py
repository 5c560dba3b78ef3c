"""The figures of a comparison: paired differences, learning curves, speed and quality."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.compare.extra import compare_extra
from kdrun.compare.record import Record
from kdrun.compare.report import words
from kdrun.compare.report.content import ArmSummary, Summary
from kdrun.compare.report.look import (
    GRID,
    GROUND,
    INK,
    MUTED,
    SETTINGS,
    THEMED,
    ZONE,
    legend,
    legend_height,
    look,
    shortened,
)
from kdrun.compare.verdicts import ArmVerdict

with compare_extra():
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = 7.2, 3.7
"""Widths in inches, for a printed page and for a phone."""

_VERDICTS = {
    "better": "#009e73",
    "worse": "#d55e00",
    "diverged": "#d55e00",
    "equivalent": "#0072b2",
    "identical": "#0072b2",
}
_CURVES = (
    ("eval_ce", "cross-entropy on held-out rows", "nats per token"),
    ("class_loss", "class loss in training", "nats per token"),
    ("kd_loss", "KD loss in training", "each arm's own loss"),
)


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn at several widths.

    Attributes:
        name: base name of its files.
        title: title above the figure.
        caption: caption below the figure.
        draw: draws the figure at a width in inches.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[float], Figure]


def drawings(summary: Summary) -> list[Drawing]:
    """The figures that have data."""
    found = []
    delta = f"{summary.given.difference:g}"
    baseline = summary.arms[0].label
    if summary.judged:
        found.append(
            Drawing(
                "differences",
                "Differences from the baseline",
                f"Mean over seeds of each arm minus {baseline}. Thin line: simultaneous 95 % "
                "interval; if it excludes zero, the arm is better or worse. Thick line: interval "
                f"of the two one-sided tests; if it lies within ±{delta} (shaded), the arm is "
                "equivalent. Small dots: single seeds. An arrow marks an end outside the figure.",
                lambda width: _differences(summary, width),
            )
        )
    curves = [curve for curve in _CURVES if _drawn_arms(summary, curve[0])]
    if curves:
        found.append(
            Drawing(
                "curves",
                "Learning curves",
                "Mean over seeds; the band spans the lowest to the highest seed. The first "
                "fifth of the steps may lie above the figure. Different KD losses have "
                "different scales and cannot be compared with each other.",
                lambda width: _learning_curves(summary, curves, width),
            )
        )
    if any(_has_speed(summary, arm) for arm in summary.arms):
        found.append(
            Drawing(
                "speed",
                "Speed and quality",
                "Large dots: mean over seeds; small dots: single seeds. Speed excludes evaluation.",
                lambda width: _speed(summary, width),
            )
        )
    return found


def svg_text(drawing: Drawing, width: float) -> str:
    """The figure as SVG text, the same for the same input."""
    stream = io.StringIO()
    # The salt gives each figure its own ids, since several figures share a page.
    with rc_context({**SETTINGS, "svg.hashsalt": f"{drawing.name} {width}"}):
        drawing.draw(width).savefig(
            stream, format="svg", metadata={"Date": None, "Title": drawing.title}
        )
    return stream.getvalue()


def png_bytes(drawing: Drawing, width: float) -> bytes:
    """The figure as a PNG file at 250 dots per inch."""
    stream = io.BytesIO()
    with rc_context(SETTINGS):
        drawing.draw(width).savefig(stream, format="png", dpi=250)
    return stream.getvalue()


def inline_svg(drawing: Drawing, width: float) -> str:
    """The figure as an HTML element in the page's colours, as wide as its container."""
    text = svg_text(drawing, width)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Remove the white background, since the page has its own.
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    for colour, name in THEMED.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    return text


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# Differences


def _differences(summary: Summary, width: float) -> Figure:
    rows = words.ordered(summary)
    yardstick, delta = summary.given.yardstick, summary.given.difference
    baseline = summary.arms[0].label
    figure = _figure(width, 1.0 + 0.46 * len(rows))
    axis: Axes = figure.subplots()
    limit = _limit(rows, delta)
    axis.axvspan(-delta, delta, color=ZONE, linewidth=0, zorder=0)
    axis.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for place, (arm, verdict) in enumerate(rows):
        colour = _VERDICTS.get(verdict.verdict, MUTED)
        _difference(axis, place, verdict, colour, limit)
        note = verdict.verdict if verdict.comparison else f"{verdict.verdict}: {verdict.reason}"
        title = f"{arm.label}  –  {note}"
        axis.annotate(
            shortened(title, int(width * 14.5)),
            (0, place - 0.27),
            xycoords=("axes fraction", "data"),
            va="center",
            color=INK,
        )
    axis.set_ylim(len(rows) - 0.5, -0.6)
    axis.set_xlim(-limit, limit)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(7 if width > 5 else 5, symmetric=True))
    for place in range(1, len(rows)):
        axis.axhline(place - 0.5, color=GRID, linewidth=0.6, zorder=0)
    ends = ("better", "worse") if yardstick.lower_is_better else ("worse", "better")
    for place, text, side in ((0, f"← {ends[0]}", "left"), (1, f"{ends[1]} →", "right")):
        axis.annotate(
            text,
            (place, 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            ha=side,
            color=MUTED,
        )
    axis.set_xlabel(f"{yardstick.title}, {yardstick.unit}  (shaded: ±{delta:g})")
    axis.set_title(shortened(f"Difference from {baseline}", int(width * 13)), pad=14)
    return figure


def _limit(rows: Sequence[tuple[ArmSummary, ArmVerdict]], delta: float) -> float:
    """Half the width of the axis: covers all intervals, unless they dwarf the differences.

    With two seeds an interval can be fifty times as wide as the differences.
    """
    known = [verdict.comparison for _, verdict in rows if verdict.comparison is not None]
    ends = [abs(end) for found in known for end in found.interval]
    seen = [abs(value) for found in known for value in found.differences]
    return 1.08 * max(1.3 * delta, min(max(ends, default=0), 3 * max(seen, default=0)))


def _difference(axis: Axes, place: int, verdict: ArmVerdict, colour: str, limit: float) -> None:
    found = verdict.comparison
    if found is None:
        return
    height = place + 0.12
    for (low, high), thickness in ((found.interval, 1.2), (found.equivalence_interval, 4.0)):
        axis.plot(
            [max(low, -limit), min(high, limit)],
            [height] * 2,
            color=colour,
            linewidth=thickness,
            solid_capstyle="butt",
            zorder=2,
        )
    for end, marker in ((found.interval[0], "<"), (found.interval[1], ">")):
        if abs(end) > limit:
            beyond = limit if end > 0 else -limit
            axis.plot([beyond], [height], marker, color=colour, markersize=5, clip_on=False)
        else:
            axis.plot([end], [height], "|", color=colour, markersize=6)
    axis.plot(
        found.differences,
        [height + 0.2] * len(found.differences),
        "o",
        color=colour,
        markersize=2.2,
        markeredgewidth=0,
        alpha=0.75,
        zorder=2,
    )
    axis.plot(
        [found.mean],
        [height],
        "o",
        color=colour,
        markersize=6,
        markeredgecolor=GROUND,
        markeredgewidth=0.8,
        zorder=3,
    )


# Curves


def _drawn_arms(summary: Summary, key: str) -> list[int]:
    return [place for place, arm in enumerate(summary.arms) if _points(arm.records, key)]


def _points(records: Sequence[Record], key: str) -> dict[float, list[float]]:
    """Finite values of all seeds by step."""
    points: dict[float, list[float]] = {}
    for record in records:
        for line in record.curves:
            value = line.get(key)
            if isinstance(value, int | float) and abs(value) < float("inf") and "step" in line:
                points.setdefault(line["step"], []).append(float(value))
    return dict(sorted(points.items()))


def _learning_curves(
    summary: Summary, curves: Sequence[tuple[str, str, str]], width: float
) -> Figure:
    across = len(curves) if width > 5 else 1
    down = 1 if width > 5 else len(curves)
    used = sorted({place for key, _, _ in curves for place in _drawn_arms(summary, key)})
    figure = _figure(width, 2.1 * down + 0.3 + legend_height(summary, used, width))
    axes = figure.subplots(down, across, squeeze=False, sharex="col")
    for axis, (key, title, unit) in zip(axes.flat, curves, strict=True):
        tops = []
        for place in _drawn_arms(summary, key):
            points = _points(summary.arms[place].records, key)
            shown = look(place)
            means = [sum(values) / len(values) for values in points.values()]
            lows, highs = list(map(min, points.values())), list(map(max, points.values()))
            every = 1 + len(points) // 6
            axis.fill_between(
                list(points), lows, highs, color=shown["color"], alpha=0.15, linewidth=0
            )
            axis.plot(
                list(points),
                means,
                color=shown["color"],
                linestyle=shown["linestyle"],
                linewidth=1.3,
                marker=shown["marker"],
                markersize=3.5,
                markevery=(place % every, every),
            )
            tops.append(max(highs[len(points) // 5 :]))
        bottom, top = axis.get_ylim()
        axis.set_ylim(bottom, min(top, max(tops) + 0.05 * (max(tops) - bottom)))
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.grid(color=GRID, linewidth=0.6)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in axes[-1]:
        axis.set_xlabel("optimiser step")
    legend(figure, summary, used, width)
    return figure


# Speed


def _has_speed(summary: Summary, arm: ArmSummary) -> bool:
    return arm.speed is not None and summary.given.yardstick.name in arm.measures


def _speed(summary: Summary, width: float) -> Figure:
    yardstick = summary.given.yardstick
    used = [place for place, arm in enumerate(summary.arms) if _has_speed(summary, arm)]
    figure = _figure(width, 2.8 + legend_height(summary, used, width))
    axis = figure.subplots()
    for place in used:
        arm, shown = summary.arms[place], look(place)
        seeds = [
            (record.supervised_tokens_per_second, value)
            for record in arm.records
            if (value := record.measures.get(yardstick.name)) is not None
        ]
        common: dict[str, Any] = {"color": shown["color"], "marker": shown["marker"]}
        axis.plot(*zip(*seeds, strict=True), **common, linestyle="none", markersize=3, alpha=0.5)
        speed, quality = arm.speed, arm.measures[yardstick.name]
        if speed is not None:
            axis.plot(
                [speed.mean],
                [quality.mean],
                **common,
                markersize=8,
                markeredgecolor=GROUND,
                markeredgewidth=0.8,
            )
    axis.margins(0.08)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(6 if width > 5 else 4))
    axis.set_xlabel("supervised tokens per second  (faster →)")
    arrow = "↓" if yardstick.lower_is_better else "↑"
    axis.set_ylabel(f"{yardstick.title}\n{yardstick.unit}  ({arrow} better)")
    axis.grid(color=GRID, linewidth=0.6)
    legend(figure, summary, used, width, linestyle="none")
    return figure
