"""A comparison as a table: on the terminal, in Markdown, in CSV. Percent where people read, fractions in the CSV.

Language modelling has bits per character instead, and neither pretraining nor published figures beside it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import NamedTuple

from .comparison import Cell, Comparison, Row
from .published import Figure, published
from .results import LeftOut

ABSENT = "-"
HEADERS = {
    "accuracy": (
        "model",
        "params (M)",
        "scratch",
        "pretrained",
        "difference",
        "published scratch",
        "published pretrained",
    ),
    "bits_per_character": ("model", "params (M)", "bits per character"),
}
LEGENDS = {
    "accuracy": (
        "Test accuracy in percent: mean ± sample standard deviation over seeds (number of seeds); differences in "
        "points.",
        "Published figures were reached with other budgets, sizes, position encodings and tuning than the runs beside "
        "them, and are left out where the task was shortened. x: reported as no better than chance.",
    ),
    "bits_per_character": (
        "Bits per character of the test text, fewer are better: mean ± sample standard deviation over seeds (number of "
        "seeds).",
    ),
}


class Table(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Report(NamedTuple):
    """All there is to say about some runs, as text."""

    tables: list[Table]
    notes: list[str]  # the legend, then the numbered sources
    left_out: list[str]


def build_report(comparisons: Iterable[Comparison], left_out: Iterable[LeftOut]) -> Report:
    """The tables, with sources numbered in the order they are met."""
    sources: list[str] = []

    def cite(figure: Figure | None) -> str:
        if figure is None:
            return ABSENT
        if figure.reference not in sources:
            sources.append(figure.reference)
        name = f"{figure.label}: " if figure.label else ""
        caution = " recalled" if figure.recalled else ""
        return f"{name}{figure.percent}{caution} [{sources.index(figure.reference) + 1}]"

    tables, legend = [], []
    for comparison in comparisons:
        metric = comparison.conditions.metric
        if metric == "accuracy":
            rows = [(*_text_row(row), *map(cite, _published(comparison, row))) for row in comparison.rows]
        else:
            rows = [(row.model, _millions(row), _bits(row.scratch)) for row in comparison.rows]
        tables.append(Table(title(comparison), HEADERS[metric], rows))
        legend += [line for line in LEGENDS[metric] if line not in legend]
    cited = [f"[{number}] {source}." for number, source in enumerate(sources, start=1)]
    return Report(tables, [*legend, *cited], [f"{run.folder}: {run.reason}" for run in left_out])


def title(comparison: Comparison) -> str:
    """What the runs of a table have in common, in one line."""
    conditions, pretraining = comparison.conditions, comparison.pretraining
    parts = [
        f"{conditions.task}: recipe {conditions.recipe}",
        "causal" if conditions.causal else "bidirectional",
        f"{pretraining.objective} pretraining on {pretraining.budget:,} tokens" if pretraining else "no pretraining",
        f"fine-tuning on {conditions.finetune_budget:,} tokens",
        f"{conditions.n_test:,} test examples",
        f"majority class {100 * conditions.majority:.2f}" if conditions.metric == "accuracy" else "",
        conditions.task_note,
        ", ".join(comparison.hardware),
    ]
    return "; ".join(part for part in parts if part)


def print_report(report: Report) -> None:
    """The report on standard output: fitted to a terminal, plain and at full width anywhere else."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=10_000)
    for table in report.tables:
        console.print(table.title, soft_wrap=True, style="bold")
        grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False)
        for place, column in enumerate(table.header):
            grid.add_column(column, justify="right" if place else "left", no_wrap=place == 0, overflow="fold")
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
        console.print()
    for note in report.notes if report.tables else ():
        console.print(note, soft_wrap=True, style="dim")
    if report.left_out:
        console.print("\nLeft out:" if report.tables else "Left out:", style="bold")
        for line in report.left_out:
            console.print(f"  {line}", soft_wrap=True)


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    blocks = []
    for table in report.tables:
        rule = ("---", *["---:"] * (len(table.header) - 1))
        lines = (f"| {' | '.join(cells)} |" for cells in (table.header, rule, *table.rows))
        blocks += [table.title, "\n".join(lines)]
    blocks.append("\n".join(f"- {note}" for note in report.notes))
    if report.left_out:
        blocks += ["Left out:", "\n".join(f"- {line}" for line in report.left_out)]
    return "\n\n".join(blocks) + "\n"


def to_csv(comparisons: Iterable[Comparison]) -> str:
    """One line for each row of each table, scores at full precision, accuracies in [0, 1]; empty where none is."""
    lines = [_csv_line(comparison, row) for comparison in comparisons for row in comparison.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(comparison: Comparison, row: Row) -> dict[str, object]:
    line: dict[str, object] = {"model": row.model, "params": _join(row.params), **comparison.conditions._asdict()}
    line["objective"] = comparison.pretraining and comparison.pretraining.objective
    line["pretrain_budget"] = comparison.pretraining and comparison.pretraining.budget
    for name, cell in (("scratch", row.scratch), ("pretrained", row.pretrained)):
        line[f"{name}_mean"] = cell and cell.mean
        line[f"{name}_std"] = cell and cell.std
        line[f"{name}_seeds"] = cell and _join(result.seed for result in cell.results)
    line["difference"] = row.difference
    for name, figure in zip(("scratch", "pretrained"), _published(comparison, row), strict=True):
        percent = figure and figure.percent
        line[f"published_{name}"] = f"{percent / 100:.6g}" if isinstance(percent, float) else percent
        line[f"published_{name}_source"] = figure and figure.reference
    line["hardware"] = _join(comparison.hardware)
    return line


def _text_row(row: Row) -> tuple[str, ...]:
    difference = ABSENT if row.difference is None else f"{100 * row.difference:+.2f}"
    return row.model, _millions(row), _accuracy(row.scratch), _accuracy(row.pretrained), difference


def _accuracy(cell: Cell | None) -> str:
    if cell is None:
        return ABSENT
    spread = "" if cell.std is None else f" ± {100 * cell.std:.2f}"
    return f"{100 * cell.mean:.2f}{spread} ({cell.num_seeds})"


def _bits(cell: Cell | None) -> str:
    if cell is None:
        return ABSENT
    spread = "" if cell.std is None else f" ± {cell.std:.3f}"
    return f"{cell.mean:.3f}{spread} ({cell.num_seeds})"


def _millions(row: Row) -> str:
    return _join(f"{count / 1e6:.2f}" for count in row.params)


def _published(comparison: Comparison, row: Row) -> tuple[Figure | None, Figure | None]:
    """The figures that belong beside a row: from scratch, and after the same kind of pretraining."""
    task, causal, pretraining = comparison.conditions.task, comparison.conditions.causal, comparison.pretraining
    if comparison.conditions.task_note:
        return None, None
    pretrained = published(row.model, task, pretraining.objective, causal=causal) if pretraining else None
    return published(row.model, task, None, causal=causal), pretrained


def _join(values: Iterable[object]) -> str:
    return " / ".join(map(str, values))
