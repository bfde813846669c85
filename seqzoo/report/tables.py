"""A comparison as a table: on the terminal, in Markdown, in CSV. Percent where people read, fractions in the CSV.

Language modelling has bits per character instead, and neither pretraining nor published figures beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..messages import printable
from .charts import by_phase, phases_of
from .comparison import Cell, Comparison, Conditions, Gain, Row, Size
from .intervals import Interval
from .published import Figure, published
from .results import LeftOut
from .sheet import to_sheet

ABSENT = "-"
MEASURED = ("model", "params (M)", "scratch", "pretrained", "difference")
MATCHED = ("scratch, same total", "difference, same total")
PUBLISHED = ("published scratch", "published pretrained")
IN_BITS = ("model", "params (M)", "bits per character")
LEGENDS = {
    "accuracy": (
        "Test accuracy in percent: mean ± sample standard deviation over seeds (number of seeds); differences in "
        "points, with 95 % intervals over seeds and test examples, over the latter alone where a side has one seed.",
        "Published figures were reached with other budgets, sizes, position encodings and tuning than the runs beside "
        "them, and are left out where the task was shortened. x: reported as no better than chance.",
    ),
    "bits_per_character": (
        "Bits per character of the test text, fewer are better: mean ± sample standard deviation over seeds (number of "
        "seeds).",
    ),
}
AS_USUAL = "In fp32 where no precision is named, with AdamW where no optimizer is."
SAME_TOTAL = "Same total: from scratch on as many tokens as both stages of the pretrained run together."
IN_ONE_PHASE = (
    "One phase: the labels' loss and the masked loss together, on as many tokens as both stages of the pretrained run "
    "or, where there is none, as from scratch. Its difference is to from scratch on as many tokens."
)


UNLEARNT, SHARED, UNLIKE = "†", "‡", "§"
OF_UNLEARNT = f"{UNLEARNT} A pretraining learnt nothing beyond how frequent symbols are."
OF_SHARED = f"{SHARED} Seeds of fine-tuning alone, after one pretraining: intervals are those of a single seed."
OF_UNLIKE = f"{UNLIKE} The two sides differ in other settings, too"


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
    sources = Sources()
    tables, legend = [], []
    for comparison in comparisons:
        metric = comparison.conditions.metric
        notes = LEGENDS[metric]
        sizes = _sizes(row.size for row in comparison.rows)
        if metric == "accuracy":
            with_matched = any(row.matched for row in comparison.rows)
            phases = phases_of(comparison)
            in_one_phase = (column for name in phases for column in (name, f"difference, {name}"))
            beside = [published_beside(comparison, row) for row in comparison.rows]
            with_published = any(map(any, beside))
            header = (
                *MEASURED,
                *(MATCHED if with_matched else ()),
                *in_one_phase,
                *(PUBLISHED if with_published else ()),
            )
            notes += (SAME_TOTAL,) if with_matched else ()
            notes += (IN_ONE_PHASE,) if phases else ()
            notes += of_marks(comparison.rows)
            rows = [
                (
                    *_text_row(row, size, with_matched),
                    *_in_one_phase(comparison, row, phases),
                    *(map(sources.cite, figures) if with_published else ()),
                )
                for row, size, figures in zip(comparison.rows, sizes, beside, strict=True)
            ]
        else:
            header = IN_BITS
            rows = [(*size, score(row.scratch)) for row, size in zip(comparison.rows, sizes, strict=True)]
        tables.append(Table(title(comparison), header, rows))
        notes += () if comparison.conditions.setting == comparison.conditions.recipe else (AS_USUAL,)
        legend += [line for line in notes if line not in legend]
    return Report(tables, [*legend, *sources.notes], [printable(f"{run.folder}: {run.reason}") for run in left_out])


class Sources:
    """Where published figures come from, numbered in the order they are cited."""

    def __init__(self) -> None:
        self._cited: list[str] = []

    @property
    def notes(self) -> list[str]:
        return [f"[{number}] {source}." for number, source in enumerate(self._cited, start=1)]

    def cite(self, figure: Figure | None) -> str:
        """A published figure with the number of its source."""
        if figure is None:
            return ABSENT
        if figure.reference not in self._cited:
            self._cited.append(figure.reference)
        name = f"{figure.label}: " if figure.label else ""
        caution = " recalled" if figure.recalled else ""
        return f"{name}{figure.percent}{caution} [{self._cited.index(figure.reference) + 1}]"


def title(comparison: Comparison) -> str:
    """What the runs of a table have in common, in one line."""
    conditions, pretraining = comparison.conditions, comparison.pretraining
    parts = [
        f"{conditions.task}: recipe {conditions.setting}",
        "causal" if conditions.causal else "bidirectional",
        f"{pretraining.objective} pretraining on {pretraining.budget:,} tokens" if pretraining else "no pretraining",
        f"fine-tuning on {conditions.finetune_budget:,} tokens",
        f"{conditions.n_test:,} test examples",
        f"majority class {100 * conditions.majority:.2f}" if conditions.metric == "accuracy" else "",
        conditions.task_note,
        variant(conditions),
        ", ".join(comparison.hardware),
    ]
    return "; ".join(part for part in parts if part)


def variant(conditions: Conditions) -> str:
    """How the conditions differ from those of the comparison itself; empty if they do not."""
    parts = [
        f"{100 * conditions.train_fraction:g} % of the train split" if conditions.train_fraction != 1 else "",
        f"{conditions.tuning} tuning" if conditions.tuning != "full" else "",
        f"{conditions.init} initialisation" if conditions.init != "structured" else "",
        "augmented" if conditions.augment else "",
        "packed" if conditions.packing else "",
    ]
    return ", ".join(part for part in parts if part)


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
        lines = (f"| {' | '.join(map(_in_markdown, cells))} |" for cells in (table.header, rule, *table.rows))
        blocks += [_in_markdown(table.title), "\n".join(lines)]
    blocks.append("\n".join(f"- {note}" for note in report.notes))
    if report.left_out:
        blocks += ["Left out:", "\n".join(f"- {_in_markdown(line)}" for line in report.left_out)]
    return "\n\n".join(blocks) + "\n"


def _in_markdown(text: str) -> str:
    """`text` that is neither a tag of HTML nor ends its place in a table."""
    return text.replace("<", "&lt;").replace("|", "\\|")


def to_csv(comparisons: Iterable[Comparison]) -> str:
    """One line for each row of each table, scores at full precision, accuracies in [0, 1]; empty where none is."""
    comparisons = list(comparisons)
    phases = list(dict.fromkeys(name for comparison in comparisons for name in phases_of(comparison)))
    lines = [_csv_line(comparison, row, phases) for comparison in comparisons for row in comparison.rows]
    return to_sheet([list(lines[0]) if lines else [], *(line.values() for line in lines)])


def _csv_line(comparison: Comparison, row: Row, phases: Iterable[str]) -> dict[str, object]:
    line: dict[str, object] = {**row.size._asdict(), **comparison.conditions._asdict()}
    line["objective"] = comparison.pretraining and comparison.pretraining.objective
    line["pretrain_budget"] = comparison.pretraining and comparison.pretraining.budget
    for name, cell in (("scratch", row.scratch), ("pretrained", row.pretrained), ("scratch_same_total", row.matched)):
        line |= _csv_cell(name, cell)
    line |= _csv_gain("difference", row.difference)
    line |= _csv_gain("difference_same_total", row.gain)
    in_one_phase = by_phase(comparison, row)
    for phase in phases:
        name, cell = phase.replace(",", "").replace(" ", "_"), in_one_phase.get(phase)
        line |= _csv_cell(name, cell)
        line |= _csv_gain(f"difference_{name}", row.gain_of(cell) if cell else None)
    for name, figure in zip(("scratch", "pretrained"), published_beside(comparison, row), strict=True):
        percent = figure and figure.percent
        line[f"published_{name}"] = f"{percent / 100:.6g}" if isinstance(percent, float) else percent
        line[f"published_{name}_source"] = figure and figure.reference
    line["hardware"] = " / ".join(comparison.hardware)
    return line


def _csv_cell(name: str, cell: Cell | None) -> dict[str, object]:
    return {
        f"{name}_mean": cell and cell.mean,
        f"{name}_std": cell and cell.std,
        **_csv_interval(name, cell.interval if cell else None),
        f"{name}_seeds": cell and " / ".join(str(result.seed) for result in cell.results),
        **({f"{name}_learnt": cell and cell.learnt} if name == "pretrained" else {}),
    }


def _csv_gain(name: str, gain: Gain | None) -> dict[str, object]:
    interval = _csv_interval(name, gain.interval if gain else None)
    return {name: gain and gain.mean, **interval, f"{name}_unlike": gain and gain.unlike}


def _csv_interval(name: str, interval: Interval | None) -> dict[str, object]:
    low, high, kind = interval or (None, None, None)
    return {f"{name}_low": low, f"{name}_high": high, f"{name}_interval": kind}


def _sizes(sizes: Iterable[Size]) -> list[tuple[str, str]]:
    """Models, and their parameters in millions: with two digits, or all where two of one model would look alike."""
    given = list(sizes)
    short = [(size.model, f"{size.params / 1e6:.2f}") for size in given]
    return short if len({*short}) == len(short) else [(size.model, f"{size.params / 1e6:.6f}") for size in given]


def _text_row(row: Row, size: tuple[str, str], with_matched: bool) -> tuple[str, ...]:
    measured = (*size, score(row.scratch), score(row.pretrained))
    matched = (score(row.matched), _with_interval(row.gain)) if with_matched else ()
    return *measured, _with_interval(row.difference), *matched


def _in_one_phase(comparison: Comparison, row: Row, phases: Iterable[str]) -> Iterator[str]:
    """For each of `phases` its score, and the difference to from scratch."""
    in_one_phase = by_phase(comparison, row)
    for phase in phases:
        cell = in_one_phase.get(phase)
        yield score(cell)
        yield _with_interval(row.gain_of(cell)) if cell else ABSENT


def _with_interval(gain: Gain | None) -> str:
    return points(gain) + (f" ({percents(gain.interval)})" if gain and gain.interval else "")


def score(cell: Cell | None) -> str:
    """Mean, spread and number of seeds: of accuracies in percent, else in bits per character."""
    if cell is None:
        return ABSENT
    scale, digits = (100, 2) if cell.conditions.metric == "accuracy" else (1, 3)
    spread = "" if cell.std is None else f" ± {scale * cell.std:.{digits}f}"
    marks = "".join(f" {mark}" for mark in _marks(cell))
    return f"{scale * cell.mean:.{digits}f}{spread} ({cell.num_seeds}){marks}"


def of_marks(rows: Iterable[Row]) -> tuple[str, ...]:
    """What the marks behind the scores and differences of these rows mean."""
    rows = list(rows)
    found = {mark for row in rows for cell in row.cells for mark in _marks(cell)}
    unlike = dict.fromkeys(f"{row.size.model}: {gain.unlike}" for row in rows for gain in row.gains if gain.unlike)
    of_unlike = [f"{OF_UNLIKE}. {'; '.join(unlike)}."] if unlike else []
    return (*(text for text in (OF_UNLEARNT, OF_SHARED) if text[0] in found), *of_unlike)


def _marks(cell: Cell) -> list[str]:
    return [*([] if cell.learnt else [UNLEARNT]), *([SHARED] if cell.shares_pretraining else [])]


def points(gain: Gain | None) -> str:
    """A difference of two accuracies, in points, with its mark."""
    return ABSENT if gain is None else f"{100 * gain.mean:+.2f}{f' {UNLIKE}' if gain.unlike else ''}"


def percents(interval: Interval) -> str:
    """From where to where, of accuracies."""
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def published_beside(comparison: Comparison, row: Row) -> tuple[Figure | None, Figure | None]:
    """The figures that belong beside a row: from scratch, and after the same kind of pretraining."""
    conditions, pretraining = comparison.conditions, comparison.pretraining
    if conditions.task_note or not conditions.plain:
        return None, None
    model, task, causal = row.size.model, conditions.task, conditions.causal
    pretrained = published(model, task, pretraining.objective, causal=causal) if pretraining else None
    return published(model, task, None, causal=causal), pretrained
