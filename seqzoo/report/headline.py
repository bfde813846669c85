"""The main table of the page: ours from scratch and self-pretrained, at both kinds of equal budget, and published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .charts import by_phase, direction, family, folders, namer, phases_of, short, stages
from .comparison import Cell, Comparison, Conditions, Gain, Row
from .intervals import Interval
from .published import Figure
from .tables import ABSENT, Sources, percents, points, published_beside, score, variant

MEASURED = (
    "model",
    "training tokens",
    "from scratch, same fine-tuning",
    "from scratch, same total",
    "self-pretrained",
    "gain at the same fine-tuning",
    "gain at the same total",
)
PUBLISHED = ("published from scratch", "published self-pretrained")


class Entry(NamedTuple):
    """What stands in one place of a table."""

    text: str
    detail: str = ""  # under it, smaller
    runs: tuple[int, ...] = ()  # numbers of the runs it was computed from
    strong: bool = False


class PageTable(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[Entry]]


def main_tables(comparisons: Iterable[Comparison], numbers: Mapping[Path, int], sources: Sources) -> list[PageTable]:
    """A table for each task, recipe and direction; columns that would be empty are left out.

    Args:
        comparisons: of the plain variant, augmented and packed or not, in reading order.
        numbers: of the run folders.
        sources: gets those of the published figures.
    """
    families: dict[Conditions, list[tuple[Comparison, Row]]] = {}
    for comparison in comparisons:
        rows = families.setdefault(family(comparison.conditions), [])
        rows += [(comparison, row) for row in comparison.rows]

    tables = []
    for conditions, members in families.items():
        beside = {id(cell) for _, row in members if row.pretrained for cell in row.cells}
        name_of = namer(cell for _, row in members for cell in row.cells)
        phases = list(dict.fromkeys(name for comparison, _ in members for name in phases_of(comparison)))
        lines: list[list[Entry]] = []
        alone: set[int] = set()
        for comparison, row in members:
            # A scratch cell without a pretrained one would stand in the table of every pretraining.
            if not (row.pretrained or row.one_phase) and ({id(row.scratch)} & (beside | alone)):
                continue
            alone.add(id(row.scratch))
            lines.append(_line(comparison, row, name_of(row.cells[0]), phases, numbers, sources))
        in_one_phase = (column for name in phases for column in (name, f"gain of {name} at the same total"))
        header = (*MEASURED, *in_one_phase, *PUBLISHED)
        filled = [place for place in range(len(header)) if any(line[place].text != ABSENT for line in lines)]
        hardware = sorted({name for comparison, _ in members for name in comparison.hardware})
        tables.append(
            PageTable(
                _title(conditions, hardware),
                [header[place] for place in filled],
                [[line[place] for place in filled] for line in lines],
            )
        )
    return tables


def _line(
    comparison: Comparison,
    row: Row,
    name: str,
    phases: Iterable[str],
    numbers: Mapping[Path, int],
    sources: Sources,
) -> list[Entry]:
    scratch_figure, pretrained_figure = published_beside(comparison, row)
    in_one_phase = by_phase(comparison, row)
    return [
        Entry(name, f"{row.size.params:,} parameters"),
        Entry(stages(row.pretrained) if row.pretrained else short(comparison.conditions.finetune_budget)),
        *(_score(cell, numbers) for cell in (row.scratch, row.matched, row.pretrained)),
        _gain(row.difference),
        _gain(row.gain),
        *(entry for phase in phases for entry in _one_phase(row, in_one_phase.get(phase), numbers)),
        _published(scratch_figure, row.scratch or row.matched, sources),
        _published(pretrained_figure, row.pretrained, sources),
    ]


def _one_phase(row: Row, cell: Cell | None, numbers: Mapping[Path, int]) -> tuple[Entry, Entry]:
    if cell is None:
        return Entry(ABSENT), Entry(ABSENT)
    return _score(cell, numbers), _gain(row.gain_of(cell))


def _gain(gain: Gain | None) -> Entry:
    """Bold where the interval leaves out zero, and is one over seeds of runs that differ in nothing else."""
    interval = gain.interval if gain else None
    beyond_chance = interval is not None and interval.kind == "t" and not interval.low <= 0 <= interval.high
    return Entry(points(gain), _percent(interval), strong=beyond_chance and not (gain and gain.unlike))


def _score(cell: Cell | None, numbers: Mapping[Path, int]) -> Entry:
    if cell is None:
        return Entry(ABSENT)
    detail = _percent(cell.interval) if cell.conditions.metric == "accuracy" else _plain(cell.interval)
    return Entry(score(cell), detail, tuple(numbers[folder] for folder in folders(cell)))


def _percent(interval: Interval | None) -> str:
    return f"{percents(interval)}, {interval.kind}" if interval else ""


def _plain(interval: Interval | None) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}, {interval.kind}" if interval else ""


def _published(figure: Figure | None, ours: Cell | None, sources: Sources) -> Entry:
    if figure is None or ours is None or figure.percent == "x":
        return Entry(sources.cite(figure))
    return Entry(sources.cite(figure), f"ours {100 * ours.mean - figure.percent:+.2f}")


def _title(conditions: Conditions, hardware: Iterable[str]) -> str:
    in_percent = conditions.metric == "accuracy"
    unit = "test accuracy in percent" if in_percent else "test bits per character, fewer are better"
    parts = [
        f"{conditions.task}: {unit}",
        f"recipe {conditions.setting}",
        direction(conditions),
        f"{conditions.n_test:,} test examples",
        f"majority class {100 * conditions.majority:.2f}" if in_percent else "",
        conditions.task_note,
        variant(conditions),
        ", ".join(hardware),
    ]
    return "; ".join(part for part in parts if part)
