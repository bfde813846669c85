"""Values as lines of CSV, which spreadsheets open."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable

from ..messages import printable

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


def to_sheet(lines: Iterable[Iterable[object]]) -> str:
    """The lines as CSV, in which text is nothing but text: what cannot be printed is escaped, and an apostrophe stands
    before what would be a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(value) for value in line] for line in lines)
    return text.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    shown = printable(value)
    start = unicodedata.normalize("NFKC", shown).lstrip()[:1]
    return f"'{shown}" if start in tuple("=+-@") and not NUMBER.fullmatch(shown) else shown
