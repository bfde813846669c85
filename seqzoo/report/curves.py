"""Learning curves of runs, from their `metrics.jsonl`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..study import read_metrics
from .charts import (
    Chart,
    Panel,
    Point,
    Series,
    chart_of,
    family,
    majority_level,
    namer,
    one_line,
    panel_title,
    training,
)
from .comparison import Cell, Conditions, Size
from .results import Result

MILLION = 1e6


def read_curve(folder: Path, stage: str, metric: str) -> list[tuple[int, float]]:
    """(tokens of the stage so far, value) of every line of `metrics.jsonl` that has `metric`, such as "val/accuracy".

    Empty where the run has none.
    """
    curve = []
    for entry in read_metrics(folder, metric):
        if entry.get("stage") == stage:
            tokens, value = entry.get("tokens"), entry[metric]
            if isinstance(tokens, int) and isinstance(value, int | float):
                curve.append((tokens, float(value)))
    return curve


def learning_curves(cells: Iterable[Cell]) -> list[Chart]:
    """Validation accuracy over the tokens of both stages: a chart for each task, a panel for each model. The curve of a
    pretrained run starts where its pretraining ended."""
    cells = [cell for cell in cells if cell.compared_under.plain and cell.conditions.metric == "accuracy"]
    name_of = namer(cells)
    families: dict[Conditions, dict[tuple[Size, str], list[Series]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        label = training(cell)
        for result in cell.results:
            points = tuple(
                Point((result.pretrain_tokens + tokens) / MILLION, 100 * value, (result.folder,))
                for tokens, value in read_curve(result.folder, "finetune", "val/accuracy")
            )
            if points:
                families[family(cell.compared_under)][cell.size, name_of(cell)].append(Series(label, points, label))
    return [
        Chart(
            f"curves_{number}",
            f"Learning curves: {one_line(panel_title(shared))}",
            "Validation accuracy, a line for each seed and budget. A self-pretrained run's line starts where its "
            "pretraining ended, so that runs end at the same place where their compute is matched.",
            tuple(
                Panel(
                    name,
                    "tokens of both stages (millions)",
                    "validation accuracy (%)",
                    tuple(series),
                    level=majority_level(shared),
                    narrow=True,
                )
                for (_, name), series in sorted(by_size.items())
            ),
        )
        for number, (shared, by_size) in enumerate(families.items(), start=1)
    ]


def pretraining_losses(cells: Iterable[Cell]) -> Chart | None:
    """Validation loss over the tokens of pretraining; a pretraining that several runs share is drawn once."""
    cells = [cell for cell in cells if cell.conditions.plain and cell.pretraining]
    name_of = namer(cells)
    panels: dict[str, list[Series]] = defaultdict(list)
    drawn = set()
    for cell in cells:
        for result in cell.results:
            folder = _where_pretrained(result)
            if folder.resolve() in drawn:
                continue
            drawn.add(folder.resolve())
            points = tuple(
                Point(tokens / MILLION, value, (folder,))
                for tokens, value in read_curve(folder, "pretrain", "val/loss")
            )
            if points and cell.pretraining:
                title = f"{panel_title(cell.conditions)}\n{cell.pretraining.objective} pretraining"
                panels[title].append(Series(name_of(cell), points, name_of(cell)))
    return chart_of(
        "pretraining",
        "What pretraining learns",
        "Validation loss of pretraining, a line for each seed and budget: cross-entropy in nats a hidden or next "
        "token, or the mean absolute error of pixels where that was asked for.",
        [
            Panel(title, "tokens of pretraining (millions)", "validation loss", tuple(series), narrow=True)
            for title, series in panels.items()
        ],
    )


def _where_pretrained(result: Result) -> Path:
    """The folder whose metrics hold this run's pretraining."""
    if result.pretrain_run is None:
        return result.folder
    return result.folder.parent / result.pretrain_run
