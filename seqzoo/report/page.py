"""The report as a page of HTML: tables, and the figures that lie in a folder beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from ..files import inside
from ..messages import printable
from ..study import picture_of
from . import studies
from .charts import Chart, relative, to_csv
from .comparison import Cell, Comparison, compare
from .curves import learning_curves, pretraining_losses
from .figures import DPI, to_png
from .gains import gain_over_budget, scratch_against_pretrained
from .headline import Entry, PageTable, main_tables
from .locality import distances
from .origins import RUN_HEADER, overview, run_lines
from .results import FIGURES, LeftOut, Result
from .tables import Sources, Table, of_marks
from .tables import to_csv as table_csv
from .time_to_accuracy import LEGEND, Times, time_tables
from .time_to_accuracy import to_csv as times_csv

if TYPE_CHECKING:
    from jinja2 import Template

CSS_PIXELS_PER_INCH = 96
PNG_START = b"\x89PNG\r\n\x1a\n"


class Picture(NamedTuple):
    alt: str
    caption: str
    address: str  # of a PNG, relative
    width: int  # CSS pixels
    links: list[tuple[str, str]]  # (text, relative address)
    findings: Sequence[str] = ()


class Section(NamedTuple):
    name: str
    title: str
    pictures: list[Picture]


def page_files(
    path: Path, cells: Sequence[Cell], left_out: Iterable[LeftOut], times: Sequence[Times] = ()
) -> dict[Path, bytes]:
    """The page, and what lies beside it in `<stem>_files/`: each figure as PNG, and as CSV each section and the tables.

    Args:
        path: of the page.
        cells: what there is to report, in reading order.
        left_out: runs that no cell holds.
        times: to be shown as tables.

    Raises:
        LinkError: that folder is a symbolic link.
    """
    files = inside(path.parent, f"{path.stem}{FIGURES}")
    results = [result for cell in cells for result in cell.results]
    numbers = {result.folder: number for number, result in enumerate(results, start=1)}
    tabled = [each for each in compare(cells) if each.conditions._replace(augment=False, packing=False).plain]
    plain = [comparison for comparison in tabled if comparison.conditions.plain]
    contents = {files / "main.csv": table_csv(tabled).encode()}
    timed = [_page_table(table) for table in time_tables(times)]
    if timed:
        contents[files / "time_to_accuracy.csv"] = times_csv(times).encode()
    sources = Sources()
    sections = [_section(name, charts, files, contents) for name, charts in _charts(cells, plain).items() if charts]
    page = _template().render(
        overview=overview(results),
        tables=main_tables(tabled, numbers, sources),
        table_file=_address(files / "main.csv", path.parent),
        sources=sources.notes,
        marks=of_marks(row for each in tabled for row in each.rows),
        timed=timed,
        timed_file=_address(files / "time_to_accuracy.csv", path.parent),
        timed_legend=LEGEND,
        sections=sections,
        mixing=_mixing(results, path.parent),
        run_header=RUN_HEADER,
        runs=run_lines(results, path.parent),
        left_out=[(printable(relative(run.folder, path.parent)), printable(run.reason)) for run in left_out],
    )
    return {**contents, path: page.encode()}


def _page_table(table: Table) -> PageTable:
    return PageTable(table.title, [*table.header], [[Entry(text) for text in row] for row in table.rows])


def _charts(cells: Sequence[Cell], plain: Sequence[Comparison]) -> dict[str, list[Chart]]:
    """The charts of each section by its name, in the order of the page; a section without data is empty."""
    cells = list(cells)
    in_stages = [cell for cell in cells if cell.one_phase is None]
    first = scratch_against_pretrained(plain)
    losses = pretraining_losses(cells)
    others = [
        gain_over_budget(plain),
        studies.share_of_pretraining(in_stages),
        studies.data_scale(in_stages),
        studies.model_size(in_stages),
        studies.objectives(in_stages),
        studies.tunings(in_stages),
        studies.inits(in_stages),
        studies.speed(cells),
        distances(in_stages),
    ]
    return {
        **({first.name: [first]} if first else {}),
        "learning_curves": [*learning_curves(cells), *([losses] if losses else [])],
        **{chart.name: [chart] for chart in others if chart},
    }


def _section(name: str, charts: Sequence[Chart], files: Path, contents: dict[Path, bytes]) -> Section:
    """The section of these charts, whose files in the folder `files` are added to `contents`."""
    sheet = files / f"{name}.csv"
    contents[sheet] = to_csv(charts, files.parent).encode()
    pictures = []
    for chart in charts:
        picture = to_png(chart)
        file = files / f"{chart.name}.png"
        contents[file] = picture
        address, data = (_address(path, files.parent) for path in (file, sheet))
        heading = f"{chart.title}. " if len(charts) > 1 else ""
        links = [("PNG", address), ("CSV", data)]
        pictures.append(
            Picture(chart.alt, heading + chart.caption, address, _css_width(picture), links, chart.findings)
        )
    return Section(name, "Learning curves" if len(charts) > 1 else charts[0].title, pictures)


def _mixing(results: Iterable[Result], base: Path) -> list[Picture]:
    """The pictures of `python -m seqzoo.analysis`, of the runs that have one."""
    pictures = []
    for result in results:
        path = picture_of(result.folder)
        if not path.is_file() or not (content := path.read_bytes()).startswith(PNG_START):
            continue
        files = {"mixing.png": path, "mixing.json": result.folder / "mixing.json"}
        links = [(name, _address(file, base)) for name, file in files.items() if file.is_file()]
        name = printable(result.folder.name)
        alt = f"What each position of {result.model} attends to on {result.task}, run {name}"
        pictures.append(Picture(alt, name, _address(path, base), _css_width(content), links))
    return pictures


def _css_width(content: bytes) -> int:
    """Of a PNG, in CSS pixels."""
    pixels = int.from_bytes(content[16:20], "big")  # the width, in its first chunk
    return round(pixels * CSS_PIXELS_PER_INCH / DPI)


def _address(path: Path, base: Path) -> str:
    return quote(os.fsencode(relative(path, base)))


def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja")
