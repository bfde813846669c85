"""The studies beside the main comparison, each as a chart of the cells that belong to it, or None where none do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from .charts import (
    SCRATCH,
    Chart,
    Kind,
    Panel,
    Point,
    Series,
    chart_of,
    direction,
    family,
    majority_level,
    namer,
    panel_title,
    score_label,
    score_point,
    short,
    stages,
    training,
)
from .comparison import Cell, Conditions, by_hardware
from .results import disturbed_left_out


def share_of_pretraining(cells: list[Cell]) -> Chart | None:
    """Accuracy over the part of one total budget that pretraining takes; two parts or more beside from scratch."""
    plain = [cell for cell in cells if cell.conditions.plain]
    name_of = namer(plain)
    series: dict[tuple[Conditions, str], list[Series]] = defaultdict(list)
    ties: dict[Any, list[Cell]] = defaultdict(list)
    for cell in plain:
        ties[family(cell.conditions), cell.size, cell.total_budget].append(cell)
    for (shared, size, total), tied in ties.items():
        for objective in sorted({cell.pretraining.objective for cell in tied if cell.pretraining}):
            line = [cell for cell in tied if not cell.pretraining or cell.pretraining.objective == objective]
            if sum(cell.pretraining is not None for cell in line) < 2:
                continue
            shares = [100 * cell.pretraining.budget / total if cell.pretraining else 0.0 for cell in line]
            points = [
                score_point(share, cell)
                for share, cell in sorted(zip(shares, line, strict=True), key=lambda pair: pair[0])
            ]
            label = f"{name_of(line[0])}, {objective}, {short(total)} tokens"
            series[shared, ""].append(Series(label, tuple(points), size.model))
    panels = _panels(series, "pretraining's share of all tokens (%)", log_x=False)
    caption = "The same total budget, divided otherwise between the two stages; 0 is from scratch. 95 % intervals."
    return chart_of("share_of_pretraining", "Compute-tied: the share of pretraining", caption, panels)


def data_scale(cells: list[Cell]) -> Chart | None:
    """Accuracy over the part of the train split that both stages saw."""
    eligible = [cell for cell in cells if cell.conditions._replace(train_fraction=1.0).plain]

    def setting(cell: Cell) -> Any:
        # A budget in epochs comes to other tokens on every subset.
        budgets = cell.results[0].epochs or (cell.conditions.finetune_budget, cell.total_budget)
        return family(cell.conditions)._replace(train_fraction=1.0), budgets

    panels = _lines(
        eligible,
        setting,
        lambda cell: 100 * cell.conditions.train_fraction,
        "part of the train split (%)",
        by_size=True,
        how=_in_epochs,
    )
    caption = (
        "Both stages saw the same nested subsets of the train split; validation and test are whole. 95 % intervals."
    )
    return chart_of("data_scale", "Accuracy against the amount of data", caption, panels)


def model_size(cells: list[Cell]) -> Chart | None:
    """Accuracy over the number of parameters, for models of several sizes."""
    panels = _lines(
        [cell for cell in cells if cell.conditions.plain],
        lambda cell: (family(cell.conditions), (cell.conditions.finetune_budget, cell.total_budget)),
        lambda cell: cell.size.params,
        "parameters",
        by_size=False,
        least_ratio=1.1,  # an option that adds some parameters is no other size
    )
    return chart_of("model_size", "Accuracy against model size", "Equal budgets within a line. 95 % intervals.", panels)


def speed(cells: list[Cell]) -> Chart | None:
    """Accuracy over tokens per second of fine-tuning, a panel for each task and hardware; of runs that had their cores
    to themselves, where that is known."""
    plain = [cell for cell in cells if cell.compared_under.plain]
    name_of = namer(plain)
    series: dict[tuple[Conditions, str], list[Series]] = defaultdict(list)
    disturbed = 0
    for cell, part in [(one, part) for one in plain for part in by_hardware(one)]:
        timed = [(result.speed, result.undisturbed("finetune")) for result in part.results if result.speed]
        speeds = [speed for speed, undisturbed in timed if undisturbed]
        disturbed += len(timed) - len(speeds)
        if not speeds:
            continue
        label = f"{name_of(cell)}, {training(cell)}"
        point = score_point(sum(speeds) / len(speeds), cell)
        series[family(cell.compared_under), part.results[0].hardware].append(
            Series(label, (point,), name_of(cell), filled=cell.pretraining is not None)
        )
    panels = _panels(series, "tokens per second in fine-tuning", kind="scatter")
    caption = "Above and to the right is better; models of one panel ran on the same hardware, named in its title."
    caption += f" {disturbed_left_out(disturbed)}." if disturbed else ""
    return chart_of("speed", "Accuracy against speed", f"{caption} 95 % intervals.", panels)


def objectives(cells: list[Cell]) -> Chart | None:
    """Masked against causal self-pretraining, with the same budgets."""

    def series(cell: Cell, name: str) -> str:
        return f"{direction(cell.conditions)}, {stages(cell)}"

    return _variants(
        "objective",
        "Masked against causal self-pretraining",
        [cell for cell in cells if cell.conditions.plain],
        panel=lambda cell: cell.conditions._replace(causal=False),
        group=lambda cell: cell.size,
        varied=lambda cell: cell.pretraining and cell.pretraining.objective,
        category=lambda cell, name: name,
        series=series,
        title_of=lambda conditions: panel_title(conditions).replace(f"{direction(conditions)}, ", ""),
    )


def tunings(cells: list[Cell]) -> Chart | None:
    """What fine-tuning moves, with the number of parameters that it moved."""
    return _variants(
        "tuning",
        "What fine-tuning moves",
        [cell for cell in cells if cell.conditions._replace(tuning="full").plain],
        panel=lambda cell: cell.conditions._replace(tuning="full"),
        group=lambda cell: (cell.size, cell.pretraining),
        varied=lambda cell: cell.conditions.tuning,
        category=lambda cell, name: cell.conditions.tuning,
        series=lambda cell, name: f"{name}, {stages(cell)}",
        note=lambda cell: short(cell.results[0].trained_params),
        caption="Over each bar its score, and how many parameters fine-tuning moved.",
    )


def inits(cells: list[Cell]) -> Chart | None:
    """Structured against random initialisation."""
    return _variants(
        "init",
        "Structured against random initialisation",
        [cell for cell in cells if cell.conditions._replace(init="structured").plain],
        panel=lambda cell: cell.conditions._replace(init="structured"),
        group=lambda cell: (cell.size, cell.pretraining),
        varied=lambda cell: cell.conditions.init,
        category=lambda cell, name: f"{name}, {cell.conditions.init}",
        series=lambda cell, name: stages(cell),
    )


def _variants(
    name: str,
    title: str,
    cells: list[Cell],
    *,
    panel: Callable[[Cell], Conditions],
    group: Callable[[Cell], Any],
    varied: Callable[[Cell], str | None],
    category: Callable[[Cell, str], str],
    series: Callable[[Cell, str], str],
    note: Callable[[Cell], str] = lambda cell: "",
    caption: str = "Test scores.",
    title_of: Callable[[Conditions], str] = panel_title,
) -> Chart | None:
    """Bars of the cells that stand, in their panel and group, beside one with another value of what is varied."""
    name_of = namer(cells)
    groups: dict[tuple[Conditions, Any], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[panel(cell), group(cell)].append(cell)
    bars: dict[Conditions, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for (conditions, _), members in groups.items():
        if len({varied(cell) for cell in members} - {None}) > 1:
            for cell in members:
                point = score_point(category(cell, name_of(cell)), cell, note(cell))
                bars[conditions][series(cell, name_of(cell))].append(point)
    panels = [
        Panel(
            title_of(conditions),
            name,
            score_label(conditions),
            tuple(Series(label, tuple(points), label) for label, points in by_series.items()),
            kind="bars",
            level=majority_level(conditions),
        )
        for conditions, by_series in bars.items()
    ]
    return chart_of(name, title, f"{caption} 95 % intervals.", panels)


def _in_epochs(cell: Cell) -> str:
    """`stages`, with budgets in epochs where they were set in these."""
    epochs = " + ".join(f"{number:g}" for number in cell.results[0].epochs)
    if not epochs:
        return stages(cell)
    return f"{cell.pretraining.objective if cell.pretraining else SCRATCH} {epochs} epochs"


def _lines(
    cells: list[Cell],
    setting: Callable[[Cell], tuple[Conditions, Any]],
    x: Callable[[Cell], float],
    x_label: str,
    *,
    by_size: bool,
    least_ratio: float = 1.0,
    how: Callable[[Cell], str] = stages,
) -> list[Panel]:
    """Lines over `x` for each model and pretraining; a setting is the panel's conditions and what else a line shares.

    A line needs two points, the last at least `least_ratio` times as far as the first. One with two cells at the same x
    would mix settings, and is not drawn.
    """
    name_of = namer(cells)
    lines: dict[Any, list[Cell]] = defaultdict(list)
    for cell in cells:
        objective = cell.pretraining and cell.pretraining.objective
        lines[setting(cell), cell.size if by_size else cell.size.model, objective].append(cell)
    series: dict[tuple[Conditions, str], list[Series]] = defaultdict(list)
    for ((shared, _), _, objective), line in lines.items():
        places = {x(cell) for cell in line}
        if len(places) == len(line) > 1 and max(places) >= least_ratio * min(places):
            first = min(line, key=x)
            name = name_of(first) if by_size else first.size.model
            points = tuple(score_point(x(cell), cell) for cell in sorted(line, key=x))
            series[shared, ""].append(Series(f"{name}, {how(first)}", points, name, filled=objective is not None))
    return _panels(series, x_label, log_x=True)


def _panels(
    series: dict[tuple[Conditions, str], list[Series]], x_label: str, kind: Kind = "lines", log_x: bool = False
) -> list[Panel]:
    """A panel for each (conditions, further line of the title)."""
    return [
        Panel(
            "\n".join(line for line in (panel_title(shared), further) if line),
            x_label,
            score_label(shared),
            tuple(of_panel),
            kind,
            log_x,
            majority_level(shared),
        )
        for (shared, further), of_panel in series.items()
    ]
