"""The report of a finished or unfinished comparison: page, figures and tables."""

from kdrun.compare.report.content import ReportInput
from kdrun.compare.report.screen import print_table
from kdrun.compare.report.write import write_report

__all__ = ["ReportInput", "print_table", "write_report"]
