"""A figure as data: what is drawn is what its CSV holds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from .comparison import Cell, Comparison, Conditions, Row
from .intervals import Interval
from .sheet import to_sheet

SCRATCH, PRETRAINED, MATCHED = "from scratch", "self-pretrained", "from scratch, same total"
ONE_PHASE = "one phase"
CSV_HEADER = ("figure", "panel", "series", "x_label", "x", "y_label", "y", "low", "high", "interval", "note", "runs")
Kind = Literal["bars", "lines", "scatter"]


class Point(NamedTuple):
    x: float | str  # a category where the panel has bars
    y: float
    runs: tuple[Path, ...]  # the run folders it was computed from
    interval: Interval | None = None
    note: str = ""  # written beside it


@dataclass(frozen=True)
class Series:
    """Points that belong together. Series of one label are one entry of the legend."""

    label: str
    points: tuple[Point, ...]
    hue: str  # what its colour stands for
    filled: bool = True  # else dashed lines, hollow markers


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    kind: Kind = "lines"
    log_x: bool = False
    level: tuple[float, str] | None = None  # a y to draw a line at, and what it is
    narrow: bool = False  # one of many

    @property
    def in_percent(self) -> bool:
        return "%" in self.y_label


@dataclass(frozen=True)
class Chart:
    """A figure of one or more panels."""

    name: str  # of its files
    title: str
    caption: str
    panels: tuple[Panel, ...]
    findings: tuple[str, ...] = ()  # what can be read off it, in sentences

    @property
    def alt(self) -> str:
        """What the picture shows, for who does not see it."""
        panels = "; ".join(f"{one_line(panel.title)}: {panel.y_label} over {panel.x_label}" for panel in self.panels)
        labels = dict.fromkeys(series.label for panel in self.panels for series in panel.series)
        return f"{self.title}. {panels}. Series: {', '.join(labels)}. The values are in {self.name}.csv."


def chart_of(name: str, title: str, caption: str, panels: list[Panel], findings: Iterable[str] = ()) -> Chart | None:
    """The chart, or None where it would be empty."""
    return Chart(name, title, caption, tuple(panels), tuple(findings)) if panels else None


def to_csv(charts: Iterable[Chart], base: Path) -> str:
    """One line a point, as drawn; run folders relative to `base`."""
    lines: list[Sequence[object]] = [CSV_HEADER]
    lines += [
        [chart.title, one_line(panel.title), series.label, *_csv_point(panel, point, base)]
        for chart in charts
        for panel in chart.panels
        for series in panel.series
        for point in series.points
    ]
    return to_sheet(lines)


def _csv_point(panel: Panel, point: Point, base: Path) -> Sequence[object]:
    low, high, kind = point.interval or (None, None, None)
    runs = " ".join(relative(run, base) for run in point.runs)
    return panel.x_label, point.x, panel.y_label, point.y, low, high, kind, point.note, runs


def relative(path: Path, base: Path) -> str:
    """`path` as seen from the folder `base`, with forward slashes."""
    return Path(os.path.relpath(path, base)).as_posix()


def score_label(conditions: Conditions) -> str:
    """What the scores of these conditions are, as the label of an axis."""
    return "test accuracy (%)" if conditions.metric == "accuracy" else "test bits per character\n(fewer are better)"


def score_point(x: float | str, cell: Cell, note: str = "") -> Point:
    """A cell's mean score with its interval, accuracies in percent."""
    scale = 100 if cell.conditions.metric == "accuracy" else 1
    return Point(x, scale * cell.mean, folders(cell), scaled(cell.interval, scale), note)


def scaled(interval: Interval | None, scale: float) -> Interval | None:
    return interval and Interval(scale * interval.low, scale * interval.high, interval.kind)


def folders(*cells: Cell) -> tuple[Path, ...]:
    return tuple(result.folder for cell in cells for result in cell.results)


def panel_title(conditions: Conditions) -> str:
    """The task, and under it what else the runs of a panel share but their budgets."""
    shared = f"{conditions.setting}, {direction(conditions)}, {conditions.n_test:,} test examples"
    return "\n".join(line for line in (conditions.task, shared, conditions.task_note) if line)


def direction(conditions: Conditions) -> str:
    return "causal" if conditions.causal else "bidirectional"


def majority_level(conditions: Conditions) -> tuple[float, str] | None:
    return (100 * conditions.majority, "majority class") if conditions.metric == "accuracy" else None


def short(count: float) -> str:
    """A number as short as it is read: 24M, 1.5M, 900k."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"


def training(cell: Cell) -> str:
    """How a cell was trained, without its budgets."""
    if cell.one_phase:
        return one_phase(cell, cell.compared_under)
    return PRETRAINED if cell.pretraining else SCRATCH


def one_phase(cell: Cell, conditions: Conditions) -> str:
    """The name of a cell's one phase among `conditions`: what is not as usual, and not said there, stands in it."""
    assert cell.one_phase
    weight, passes, whole, tied = cell.one_phase
    parts = [
        ONE_PHASE,
        f"masked loss times {weight:g}" if weight != 1 else "",
        "two passes" if passes == 2 else "",
        f"{whole:g} of inputs whole" if whole else "",
        "augmented" if cell.conditions.augment and not conditions.augment else "",
        "by the same draw" if tied else "",
    ]
    return ", ".join(part for part in parts if part)


def phases_of(comparison: Comparison) -> list[str]:
    """The names of all that a comparison has in one phase, in reading order."""
    named = {
        one_phase(cell, comparison.conditions): (cell.one_phase, cell.conditions.augment)
        for row in comparison.rows
        for cell in row.one_phase
    }
    return sorted(named, key=lambda name: named[name])


def by_phase(comparison: Comparison, row: Row) -> dict[str, Cell]:
    """The cells of a row that were trained in one phase, under the names of `phases_of`."""
    return {one_phase(cell, comparison.conditions): cell for cell in row.one_phase}


def stages(cell: Cell) -> str:
    """How a cell was trained, with its budgets."""
    finetuning = short(cell.conditions.finetune_budget)
    if cell.pretraining is None:
        return f"{training(cell)} {finetuning}"
    return f"{cell.pretraining.objective} {short(cell.pretraining.budget)} + {finetuning}"


def namer(cells: Iterable[Cell]) -> Callable[[Cell], str]:
    """What to call the model of each cell: with its number of parameters where it comes in several under the same
    conditions, budgets aside, and that in full where a short one is that of another, too."""
    sizes = {(family(cell.compared_under), cell.size) for cell in cells}
    counts = Counter((shared, size.model) for shared, size in sizes)
    alike = Counter((shared, size.model, short(size.params)) for shared, size in sizes)

    def name(cell: Cell) -> str:
        shared, (model, params) = family(cell.compared_under), cell.size
        if counts[shared, model] == 1:
            return model
        return f"{model} {short(params) if alike[shared, model, short(params)] == 1 else f'{params:,}'}"

    return name


def family(conditions: Conditions) -> Conditions:
    """The conditions but their budget: what the runs of a panel share."""
    return conditions._replace(finetune_budget=0)


def one_line(text: str) -> str:
    return ", ".join(text.splitlines())
