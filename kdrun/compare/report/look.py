"""The common style of the figures of a report: colours, markers, settings and legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdrun.compare.extra import compare_extra
from kdrun.compare.report.content import Summary

with compare_extra():
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK, MUTED, GRID, ZONE, GROUND = "#1b1b1f", "#66666f", "#e3e3e8", "#eeeef3", "#ffffff"
# Colour-blind safe colours (Okabe and Ito, without yellow), with markers and dashes for greyscale
# prints.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
THEMED = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    ZONE: "zone",
    GROUND: "ground",
    **{colour: f"c{place}" for place, colour in enumerate(COLOURS)},
}
"""Colours, by name, that a page replaces with its own light or dark ones."""

SETTINGS: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.parse_math": False,  # names may contain dollar signs
    "legend.frameon": False,
    "svg.fonttype": "none",  # keep text as text: searchable and small
    "savefig.facecolor": "white",
}


def look(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the arm at an index; the baseline has index 0."""
    if place == 0:
        return {"color": INK, "marker": "X", "linestyle": DASHES[1]}
    turn, colour = divmod(place - 1, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "marker": MARKERS[(colour + turn) % len(MARKERS)],
        "linestyle": DASHES[(0, 2, 3, 1)[turn % len(DASHES)]],
    }


def columns(summary: Summary, used: Sequence[int], width: float) -> int:
    """Number of legend columns that fit into a width in inches."""
    longest = max(len(legend_label(summary, place, width)) for place in used)
    return max(1, min(len(used), int(width * 13 / (longest + 6))))


def legend_height(summary: Summary, used: Sequence[int], width: float) -> float:
    """Height of a legend in inches."""
    return 0.17 * -(-len(used) // columns(summary, used, width)) + 0.15


def legend_label(summary: Summary, place: int, width: float) -> str:
    """An arm's label, shortened to a width in inches."""
    return shortened(summary.arms[place].label, int(width * 12))


def legend(
    figure: Figure, summary: Summary, used: Sequence[int], width: float, **more: Any
) -> None:
    """Add a legend of some arms below a figure."""
    handles = [
        Line2D([], [], **{**look(place), **more}, linewidth=1.3, markersize=5) for place in used
    ]
    made = figure.legend(
        handles=handles,
        labels=["."] * len(used),
        loc="outside lower center",
        ncols=columns(summary, used, width),
        columnspacing=1.6,
        handlelength=2.6,
    )
    # Labels are set afterwards, because a legend drops labels that begin with an underscore.
    for text, place in zip(made.get_texts(), used, strict=True):
        text.set_text(legend_label(summary, place, width))


def shortened(text: str, most: int) -> str:
    """Shorten a text to a maximum number of characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
