"""How far models look before and after each stage, from the `mixing.json` that the analysis leaves in a run folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ..study import read
from .charts import Chart, Panel, Point, Series, chart_of, namer, panel_title, stages
from .comparison import Cell

SCHEMA = 1
STAGES = {"initial": "random initialisation", "pretrain": "after pretraining", "finetune": "after fine-tuning"}


class Locality(NamedTuple):
    """Of a run, after each of `STAGES`: means over blocks and heads."""

    distance: Mapping[str, float]  # positions
    near: Mapping[str, float]  # % of the weight within `window` positions
    window: int


def distances(cells: Iterable[Cell]) -> Chart | None:
    """Bars of the mean distance and of the share of weight nearby, means over the seeds that were analysed: two panels
    for each setting in which a model was pretrained."""
    cells = [cell for cell in cells if cell.conditions.plain and cell.pretraining]
    name_of = namer(cells)
    settings: dict[tuple[str, int], dict[str, dict[Path, Locality]]] = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        title = f"{panel_title(cell.conditions)}\n{stages(cell)}"
        for result in cell.results:
            if found := read_locality(result.folder):
                settings[title, found.window][name_of(cell)][result.folder] = found
    panels = [
        _panel(title, label, models, stage_means)
        for (title, window), models in settings.items()
        for label, stage_means in (
            ("mean distance (positions)", lambda run: run.distance),
            (f"weight within {window} positions (%)", lambda run: run.near),
        )
    ]
    return chart_of(
        "distances",
        "How far a model looks",
        "The distance at which positions take values, weighted by how much: means over a model's blocks and heads, "
        "on the same test examples before and after each stage. Pictures of the matrices follow.",
        panels,
    )


def read_locality(folder: Path) -> Locality | None:
    """What a run's `mixing.json` says; None where there is none that can be read, or a block that moves nothing."""
    try:
        found = read(folder / "mixing.json")
        if found["schema"] != SCHEMA:
            return None
        if type(found["window"]) is not int:
            return None
        return Locality(
            {stage: _mean(found["stages"][stage], "mean_distance") for stage in STAGES},
            {stage: 100 * _mean(found["stages"][stage], "window_share") for stage in STAGES},
            found["window"],
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _mean(layers: Iterable[Mapping[str, Iterable[float]]], key: str) -> float:
    return fmean(value for layer in layers for value in layer[key])


def _panel(
    title: str,
    label: str,
    models: Mapping[str, Mapping[Path, Locality]],
    stage_means: Callable[[Locality], Mapping[str, float]],
) -> Panel:
    series = (
        Series(
            name,
            tuple(
                Point(model, fmean(stage_means(run)[stage] for run in runs.values()), tuple(runs))
                for model, runs in models.items()
            ),
            name,
        )
        for stage, name in STAGES.items()
    )
    return Panel(title, "model", label, tuple(series), kind="bars")
