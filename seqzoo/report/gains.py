"""From scratch against self-pretrained, as charts: bars, and the gain over the budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from .charts import (
    MATCHED,
    PRETRAINED,
    SCRATCH,
    Chart,
    Panel,
    Point,
    Series,
    by_phase,
    chart_of,
    direction,
    folders,
    majority_level,
    namer,
    panel_title,
    phases_of,
    scaled,
    score_label,
    score_point,
    short,
)
from .comparison import Comparison


def scratch_against_pretrained(comparisons: Iterable[Comparison]) -> Chart | None:
    """Bars for every comparison: the cells of a row from scratch, self-pretrained and in one phase."""
    panels = []
    for comparison in comparisons:
        conditions, pretraining = comparison.conditions, comparison.pretraining
        name_of = namer(cell for row in comparison.rows for cell in row.cells)
        in_one_phase = [by_phase(comparison, row) for row in comparison.rows]
        sides = (
            (SCRATCH, [row.scratch for row in comparison.rows]),
            (MATCHED, [row.matched for row in comparison.rows]),
            (PRETRAINED, [row.pretrained for row in comparison.rows]),
            *((name, [cells.get(name) for cells in in_one_phase]) for name in phases_of(comparison)),
        )
        series = tuple(
            Series(label, tuple(score_point(name_of(cell), cell) for cell in side if cell), label)
            for label, side in sides
            if any(side)
        )
        pretrained = f"{pretraining.objective} pretraining {short(pretraining.budget)} + " if pretraining else ""
        title = f"{panel_title(conditions)}\n{pretrained}{short(conditions.finetune_budget)} tokens"
        panels.append(
            Panel(title, "model", score_label(conditions), series, kind="bars", level=majority_level(conditions))
        )
    caption = (
        "Test scores with 95 % intervals over seeds and test examples, over the latter alone where there is one seed."
    )
    return chart_of("scratch_and_pretrained", "From scratch against self-pretrained", caption, panels)


def gain_over_budget(comparisons: Iterable[Comparison]) -> Chart | None:
    """Self-pretrained minus from scratch at equal total budget, over that budget: where pretraining begins to help."""
    rows = [
        (comparison.conditions, row)
        for comparison in comparisons
        for row in comparison.rows
        if comparison.conditions.plain and comparison.conditions.metric == "accuracy"
    ]
    name_of = namer(cell for _, row in rows for cell in row.cells)
    panels: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for conditions, row in rows:
        gain, pretrained = row.gain, row.pretrained
        if gain is None or gain.unlike or pretrained is None or pretrained.pretraining is None:
            continue
        share = pretrained.pretraining.budget / pretrained.total_budget
        label = (
            f"{name_of(row.cells[0])}, {conditions.setting}, {share:.0%} {pretrained.pretraining.objective} pretraining"
        )
        shared = f"{conditions.task}, {direction(conditions)}, {conditions.n_test:,} test examples"
        panel = f"{shared}\n{conditions.task_note}".strip()
        point = Point(
            pretrained.total_budget / 1e6,
            100 * gain.mean,
            folders(gain.after, gain.before),
            scaled(gain.interval, 100),
        )
        panels[panel][label].append(point)
    drawn, findings = [], []
    for title, by_series in panels.items():
        series = tuple(
            Series(label, tuple(sorted(points, key=lambda point: float(point.x))), label)
            for label, points in sorted(by_series.items())
            if len(points) > 1  # one budget says nothing of others
        )
        if not series:
            continue
        findings += [f"{title.splitlines()[0]}, {one.label}: {_begins(one.points)}" for one in series]
        drawn.append(
            Panel(
                title,
                "tokens of both stages (millions)",
                "gain of self-pretraining (points)",
                series,
                log_x=True,
                level=(0.0, "no gain"),
            )
        )
    caption = (
        "Self-pretrained minus from scratch on as many tokens as both stages together, with 95 % intervals: over "
        "seeds and test examples where both have several seeds, else that of two proportions. Both sides share all "
        "other settings."
    )
    return chart_of("gain_over_budget", "The budget at which pretraining begins to help", caption, drawn, findings)


def _begins(points: tuple[Point, ...]) -> str:
    """Where a line of gains first clears zero, in words."""
    for point in points:
        if point.interval and point.interval.low > 0:
            low, high, kind = point.interval
            over = "seeds and test examples" if kind == "t" else "test examples alone, nothing said of other seeds"
            return (
                f"the first gain whose interval leaves out zero is at {point.x:g} million tokens "
                f"({point.y:+.2f} points, {low:.2f} to {high:.2f} over {over})."
            )
    best = max(points, key=lambda point: point.y)
    return (
        "no interval of a gain leaves out zero at any budget measured; the largest is "
        f"{best.y:+.2f} points at {best.x:g} million tokens."
    )
