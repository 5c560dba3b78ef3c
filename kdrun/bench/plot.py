"""The figure of a benchmark: time and memory of each loss, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kdrun.bench.cases import CHUNKED, FLOOR, PLAIN
from kdrun.bench.report import MEASURED, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = ("bench.png", "bench.svg")

# Colour-blind safe colours (Okabe and Ito), with markers for greyscale prints.
_STYLES = {
    PLAIN: ("#6b6b6b", "o"),
    CHUNKED: ("#0072b2", "D"),
    "torchtune": ("#d55e00", "s"),
    "liger": ("#009e73", "^"),
    "trl": ("#cc79a7", "v"),
}
_NAMES = {"torchtune": "torchtune", "liger": "Liger", "trl": "TRL"}
_SETTINGS: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",  # keep text as text: searchable and small
    "svg.hashsalt": "kdrun",  # reproducible ids
}
_FLOOR: dict[str, Any] = {"color": "black", "linewidth": 0.9}
_HEAD_GRADIENT: dict[str, Any] = {**_FLOOR, "linestyle": (0, (1, 1.5))}
_INCHES = {"width": 7.2, "line": 0.13, "gap": 0.12, "panel": 0.75, "legends": 0.7}
_DODGE = 0.8
"""Share of a line's height over which its implementations are spread."""


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Write the figure as PNG and SVG, atomically.

    There is one row of panels per size, or, for a single loss, one line per size.

    Args:
        rows: rows, at least one of them measured.
        folder: output folder.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.status == MEASURED and row.implementation != FLOOR]
    panels = _panels(shown)
    used = [name for name in _STYLES if any(row.implementation == name for row in shown)]
    heights = [
        _INCHES["panel"]
        + len(lines) * (_INCHES["gap"] + _INCHES["line"] * max(3, *map(len, lines.values())))
        for lines in panels.values()
    ]
    with rc_context(_SETTINGS):
        figure = Figure(
            figsize=(_INCHES["width"], sum(heights) + _INCHES["legends"]), layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(
            len(panels),
            2,
            squeeze=False,
            sharey="row",
            height_ratios=heights,
            gridspec_kw={"wspace": 0.06},
        )
        for (title, lines), (time, memory) in zip(panels.items(), axes, strict=True):
            _draw_panel(time, memory, title, lines)
        look: dict[str, Any] = {"columnspacing": 1.6, "handletextpad": 0.5, "ncols": len(used)}
        figure.legend(handles=[_marker(name) for name in used], loc="outside upper center", **look)
        references = [
            _line(_FLOOR, "floor: the four matrix products"),
            _line(_HEAD_GRADIENT, "gradient of the head, which every implementation returns"),
        ]
        figure.legend(handles=references, loc="outside lower center", **look | {"ncols": 2})
        for name in FILES:
            partial = folder / f".{name}.partial"
            kind = name.rpartition(".")[2]
            figure.savefig(
                partial, format=kind, dpi=250, metadata={"Date": None} if kind == "svg" else None
            )
            os.replace(partial, folder / name)


def _panels(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Group rows by panel title and line label."""
    single = len({row.loss for row in rows}) == 1
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        size = f"{row.tokens:,} tokens, vocabulary {row.vocab:,}"
        # Parameters and further terms go on separate lines.
        loss = row.loss.replace(":", "\n").replace("+", "\n+ ")
        title, label = (row.loss, size) if single else (size, loss)
        panels.setdefault(title, {}).setdefault(label, []).append(row)
    return panels


def _draw_panel(time: Axes, memory: Axes, title: str, lines: dict[str, list[Row]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for place, rows in enumerate(lines.values()):
        for offset, row in zip(_offsets(len(rows)), rows, strict=True):
            _draw_row(time, memory, place + offset, row)
        gradient = rows[0].head_gradient_mib  # the same for all at one size
        memory.plot([gradient] * 2, [place - 0.5, place + 0.5], **_HEAD_GRADIENT, zorder=1)
        if place:
            for axis in (time, memory):
                axis.axhline(place - 0.5, color="#e4e4e4", linewidth=0.6, zorder=0)
    time.axvline(1, **_FLOOR, zorder=1)
    time.set_yticks(range(len(lines)), list(lines))
    time.set_ylim(len(lines) - 0.5, -0.5)
    time.set_xlim(left=0)
    time.set_xlabel("time / floor")
    time.set_title(title, fontweight="bold")
    memory.set_xscale("log")
    memory.set_xlim(*_memory_limits([row for rows in lines.values() for row in rows]))
    memory.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    memory.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    memory.xaxis.set_minor_formatter(NullFormatter())
    memory.set_xlabel("peak memory beyond the inputs, MiB")
    for axis in (time, memory):
        axis.grid(axis="x", color="#e4e4e4", linewidth=0.6)


def _draw_row(time: Axes, memory: Axes, place: float, row: Row) -> None:
    colour, marker = _STYLES[row.implementation]
    look: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "markersize": 4.5,
        "markeredgewidth": 0.9,
        # A hollow marker means that the result differs from the plain evaluation.
        "markerfacecolor": "white" if row.differs else colour,
        "linestyle": "none",
    }
    # Measured rows have all three values.
    ratios = cast("list[float]", [row.ratio_lowest, row.ratio_to_floor, row.ratio_highest])
    time.plot(ratios[::2], [place, place], color=colour, linewidth=1, alpha=0.6)
    time.plot(ratios[1:2], [place], **look)
    if row.peak_mib is not None and row.peak_mib > 0:
        memory.plot([row.peak_mib], [place], **look)


def _memory_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """From the head's gradient to the highest peak, wide enough to hold a labelled tick."""
    lowest = min(row.head_gradient_mib for row in rows)
    highest = max(lowest, *(row.peak_mib or 0 for row in rows))
    return min(lowest, highest / 4) / 1.15, highest * 1.15


def _offsets(count: int) -> list[float]:
    return [_DODGE * ((place + 0.5) / count - 0.5) for place in range(count)]


def _marker(name: str) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = _STYLES[name]
    label = _NAMES.get(name, name)
    return Line2D(
        [], [], color=colour, marker=marker, markersize=4.5, linestyle="none", label=label
    )


def _line(look: dict[str, Any], label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look, label=label)
