"""The files of a report."""

from __future__ import annotations

from pathlib import Path

from kdrun.compare.report.content import ReportInput, summarise
from kdrun.files import write_bytes, write_text

PAGE, CSV, LATEX, FIGURES = "report.html", "results.csv", "results.tex", "figures"


def write_report(given: ReportInput, folder: Path) -> Path:
    """Write page, figures and tables, each file atomically.

    Args:
        given: a comparison, finished or not.
        folder: output folder; created if it does not exist.

    Returns:
        The page.

    Raises:
        InputError: the extra ``compare`` is not installed.
    """
    from kdrun.compare.report.figures import WIDE, drawings, png_bytes, svg_text
    from kdrun.compare.report.page import page
    from kdrun.compare.report.tables import csv_text, latex_text

    summary = summarise(given)
    drawn = drawings(summary)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for drawing in drawn:
        write_text(folder / FIGURES / f"{drawing.name}.svg", svg_text(drawing, WIDE))
        write_bytes(folder / FIGURES / f"{drawing.name}.png", png_bytes(drawing, WIDE))
    write_text(folder / CSV, csv_text(summary))
    write_text(folder / LATEX, latex_text(summary))
    # The page is written last, so that all files it refers to exist.
    write_text(folder / PAGE, page(summary, drawn))
    return folder / PAGE
