"""Tables and figures from run folders."""

from .comparison import Cell, Comparison, Conditions, Row, cells_of, compare
from .figures import comparison_figure
from .page import page_files
from .published import published
from .results import LeftOut, Pretraining, Result, load_results, read_result
from .tables import build_report, print_report, to_csv, to_markdown

__all__ = [
    "Cell",
    "Comparison",
    "Conditions",
    "LeftOut",
    "Pretraining",
    "Result",
    "Row",
    "build_report",
    "cells_of",
    "compare",
    "comparison_figure",
    "load_results",
    "page_files",
    "print_report",
    "published",
    "read_result",
    "to_csv",
    "to_markdown",
]
