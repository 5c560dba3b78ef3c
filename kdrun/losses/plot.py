"""Plot a loss: its value and gradient in a small example.

The example has three tokens. The teacher is fixed; the student gives the first token probability q
and splits the rest in the teacher's proportions, so it equals the teacher at one point. The label
is the first token. Values and gradients are computed by the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kdlosses import get_loss
from kdrun.errors import InputError

TEACHER = (0.6, 0.3, 0.1)
SETTING = (
    f"Three tokens with teacher probabilities {', '.join(map(str, TEACHER))}. The first token is "
    "the label; the student gives it q and splits the rest in the teacher's proportions."
)
SUFFIXES = (".png", ".svg")

_WIDTH, _HEIGHT = 29, 7  # terminal cells of a panel; two panels with labels fill 80 columns
_MARGIN = 8
_ENDS = 6  # points at either end that may leave the picture, because some losses diverge there
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # dots of a cell, by row


@dataclass(frozen=True)
class Curve:
    """A loss as a function of the student's probability of the first token.

    Attributes:
        student: q, ascending in (0, 1).
        values: values of the loss.
        gradients: gradients of the loss with respect to the student's logit of the first token.
    """

    student: list[float]
    values: list[float]
    gradients: list[float]


def loss_curve(spec: str, student: Sequence[float]) -> Curve:
    """Evaluate a loss at given probabilities of the first token.

    Args:
        spec: spec of the loss, such as ``"skew_forward_kl:alpha=0.2"``.
        student: q, each in (0, 1).

    Raises:
        InputError: the loss fails on these distributions.
    """
    q = torch.tensor(student, dtype=torch.float64).unsqueeze(-1)
    rest = torch.tensor(TEACHER[1:], dtype=torch.float64)
    logits = torch.cat([q, (1 - q) * rest / rest.sum()], dim=-1).log().requires_grad_()
    teacher = torch.tensor(TEACHER, dtype=torch.float64).log().expand_as(logits)
    labels = torch.zeros(len(student), dtype=torch.int64)
    loss = get_loss(spec)
    try:
        values = loss(logits, teacher, labels, reduction="none")
        (gradient,) = torch.autograd.grad(values.sum(), logits)
    except Exception as error:  # a plugin's loss may raise anything
        raise InputError(
            f"loss {spec!r} cannot be plotted for three tokens: {type(error).__name__}: {error}"
        ) from error
    return Curve(list(student), values.tolist(), gradient[:, 0].tolist())


def draw_text(spec: str, encoding: str) -> list[str]:
    """The plot as lines of text: value on the left, gradient on the right.

    Args:
        spec: spec of the loss.
        encoding: encoding of the output; the plot is in ASCII if it has no braille patterns.
    """
    braille = _encodes(encoding, "⣿│└─┴")
    columns, rows = (2 * _WIDTH, 4 * _HEIGHT) if braille else (_WIDTH, _HEIGHT)
    curve = loss_curve(spec, [(column + 0.5) / columns for column in range(columns)])
    panels = []
    for title, heights in (("value", curve.values), ("gradient of the logit", curve.gradients)):
        low, high = _limits(heights)
        dots = _dots(heights, low, high, rows)
        if braille and low < 0 < high:  # a dotted line, which in ASCII would look like the curve
            _mark_zero(dots, low, high)
        cells = _braille_cells(dots) if braille else _ascii_cells(dots)
        panels.append(_framed(title, cells, low, high, braille))
    return [f"{left}  {right}".rstrip() for left, right in zip(*panels, strict=True)]


def check_plot_file(file: Path) -> None:
    """Refuse a file that :func:`write_plot` cannot write.

    Raises:
        InputError: an unsupported suffix, a missing folder, or matplotlib is not installed.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {file}: the name must end in {' or '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise InputError(f"--plot {file}: the folder {file.parent} does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--plot needs matplotlib, which is not installed: pip install 'kdlosses[plot]'"
        ) from error


def write_plot(spec: str, file: Path) -> None:
    """Write the plot as a picture, with forward KL in grey for comparison.

    The same loss gives the same bytes, so that a picture under version control only changes with
    its loss.
    """
    import matplotlib
    from matplotlib.figure import Figure

    grid = [step / 400 for step in range(2, 399)]
    curve, reference = loss_curve(spec, grid), loss_curve("forward_kl", grid)
    with matplotlib.rc_context({"svg.hashsalt": spec, "font.size": 9}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, title, heights, grey in zip(
            panels,
            ("value", "gradient with respect to the student's logit"),
            (curve.values, curve.gradients),
            (reference.values, reference.gradients),
            strict=True,
        ):
            axes.axhline(0, color="0.8", linewidth=0.8)
            axes.axvline(TEACHER[0], color="0.6", linewidth=0.8, linestyle=":")
            axes.plot(grid, heights, color="C0", linewidth=1.8, label=spec)
            if spec != "forward_kl":
                axes.plot(grid, grey, color="0.6", linewidth=1.2, label="forward_kl", zorder=1)
            axes.spines[["top", "right"]].set_visible(False)
            low, high = _limits(heights[_ENDS:-_ENDS])
            margin = 0.05 * (high - low)
            axes.set(xlim=(0, 1), ylim=(low - margin, high + margin))
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel("q, the student's probability of the first token")
        panels[0].annotate(
            f"teacher: {TEACHER[0]}",
            (TEACHER[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            color="0.4",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
        metadata = {"Date": None} if file.suffix.lower() == ".svg" else {}
        try:
            figure.savefig(file, dpi=150, metadata=metadata)
        except OSError as error:
            raise InputError(f"--plot {file}: {error.strerror or error}") from error


def _encodes(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _limits(heights: Sequence[float]) -> tuple[float, float]:
    """The range to show, which includes 0 and is not empty."""
    finite = [height for height in heights if math.isfinite(height)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    return (low, high) if high > low else (low, low + 1.0)


def _dots(heights: Sequence[float], low: float, high: float, rows: int) -> list[list[bool]]:
    """The dots of the curve, top row first."""
    dots = [[False] * len(heights) for _ in range(rows)]
    before: int | None = None
    for column, height in enumerate(heights):
        if not math.isfinite(height):
            before = None
            continue
        here = _row(height, low, high, rows)
        # Fill the column up to the neighbour's dot, to connect steep parts.
        start = here if before is None or before == here else before + (1 if here > before else -1)
        for dot in range(min(start, here), max(start, here) + 1):
            dots[dot][column] = True
        before = here
    return dots


def _mark_zero(dots: list[list[bool]], low: float, high: float) -> None:
    row = dots[_row(0.0, low, high, len(dots))]
    row[::4] = [True] * len(row[::4])


def _row(height: float, low: float, high: float, rows: int) -> int:
    return round((high - height) / (high - low) * (rows - 1))


def _braille_cells(dots: list[list[bool]]) -> list[str]:
    lines = []
    for top in range(0, len(dots), 4):
        line = ""
        for left in range(0, len(dots[0]), 2):
            pattern = sum(
                _BRAILLE[y][x] for y in range(4) for x in range(2) if dots[top + y][left + x]
            )
            line += chr(0x2800 + pattern)
        lines.append(line)
    return lines


def _ascii_cells(dots: list[list[bool]]) -> list[str]:
    return ["".join("*" if dot else " " for dot in row) for row in dots]


def _framed(title: str, cells: list[str], low: float, high: float, braille: bool) -> list[str]:
    """A panel with title and axes, with lines of equal length."""
    wall, corner, floor, tick = "│└─┴" if braille else "|+-^"
    labels = [""] * len(cells)
    labels[0], labels[-1] = f"{high:.2g}", f"{low:.2g}"
    if low < 0 < high:
        zero = _row(0.0, low, high, len(cells))
        labels[zero] = labels[zero] or "0"
    at = round(TEACHER[0] * len(cells[0]))
    axis = floor * at + tick + floor * (len(cells[0]) - at - 1)
    teacher = f"q = {TEACHER[0]}"
    numbers = "0".ljust(at - len(teacher) // 2) + teacher
    numbers = numbers.ljust(len(cells[0]) - 1) + "1"
    return [
        " " * (_MARGIN + 2) + title.ljust(len(cells[0])),
        *(f"{label:>{_MARGIN}} {wall}{line}" for label, line in zip(labels, cells, strict=True)),
        " " * (_MARGIN + 1) + corner + axis,
        " " * (_MARGIN + 2) + numbers,
    ]
