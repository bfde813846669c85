"""How far models look before and after each stage, from the `mixing.json` that the analysis leaves in a run folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from .charts import Chart, Panel, Point, Series, chart_of, namer, panel_title, stages
from .comparison import Cell

STAGES = {"initial": "random initialisation", "pretrain": "after pretraining", "finetune": "after fine-tuning"}


def distances(cells: Iterable[Cell]) -> Chart | None:
    """Bars of the mean distance and of the share of weight nearby, means over blocks and heads, and over the seeds that
    were analysed: panels for each setting in which a model was pretrained."""
    cells = [cell for cell in cells if cell.conditions.plain and cell.pretraining]
    name_of = namer(cells)
    settings: dict[str, list[tuple[str, dict[Path, Mapping[str, Any]]]]] = defaultdict(list)
    for cell in cells:
        found = {result.folder: read_mixing(result.folder) for result in cell.results}
        if analysed := {folder: mixing for folder, mixing in found.items() if mixing}:
            title = f"{panel_title(cell.conditions)}\n{stages(cell)}"
            settings[title].append((name_of(cell), analysed))
    panels = [
        Panel(title, "model", label, _series(models, key, scale), kind="bars")
        for title, models in settings.items()
        for key, scale, label in (
            ("mean_distance", 1, "mean distance (positions)"),
            ("window_share", 100, f"weight within {_window(models)} positions (%)"),
        )
    ]
    return chart_of(
        "distances",
        "How far a model looks",
        "The distance at which positions take values, weighted by how much: means over a model's blocks and heads, "
        "on the same test examples before and after each stage. Pictures of the matrices follow.",
        panels,
    )


def read_mixing(folder: Path) -> Mapping[str, Any] | None:
    """A run's `mixing.json`; None where there is none that can be read."""
    try:
        found = json.loads((folder / "mixing.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == 1 else None


def _series(models: list[tuple[str, dict[Path, Mapping[str, Any]]]], key: str, scale: float) -> tuple[Series, ...]:
    return tuple(
        Series(
            label,
            tuple(
                Point(name, scale * fmean(_mean(mixing, stage, key) for mixing in analysed.values()), tuple(analysed))
                for name, analysed in models
            ),
            label,
        )
        for stage, label in STAGES.items()
    )


def _mean(mixing: Mapping[str, Any], stage: str, key: str) -> float:
    return fmean(value for layer in mixing["stages"][stage] for value in layer[key])


def _window(models: list[tuple[str, dict[Path, Mapping[str, Any]]]]) -> int:
    return next(mixing["window"] for _, analysed in models for mixing in analysed.values())
