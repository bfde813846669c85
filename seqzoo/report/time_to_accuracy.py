"""How many seconds of training it takes each model to reach given accuracies."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..records import is_finite
from ..study import read_metrics
from .charts import direction, family, namer, stages
from .comparison import Cell, Conditions, by_hardware
from .results import Result, disturbed_left_out
from .sheet import to_sheet
from .tables import ABSENT, Report, Table

Accuracies = Mapping[str, Sequence[float]]  # to be reached, in [0, 1], by task
REACH: Accuracies = {"lra_image": (0.2, 0.25, 0.3, 0.35), "lra_text": (0.55, 0.6, 0.65)}
LEGEND = (
    "Time to accuracy: seconds of training, pretraining's counted in and validations not, until a validation is as "
    "accurate; mean over the seeds that get there (how many of those timed). Where a run noted no seconds: tokens over "
    "its mean speed."
)
CSV_HEADER = (
    *("task", "recipe", "precision", "optimizer", "causal", "n_test", "task_note", "hardware"),
    *("model", "params", "training", "accuracy", "seconds", "seeds_that_reach_it", "seeds_timed", "seeds_disturbed"),
)


@dataclass(frozen=True)
class Times:
    """A cell's validations: of each seed that had its cores to itself, (seconds of training so far, accuracy)."""

    cell: Cell
    seeds: tuple[Sequence[tuple[float, float]], ...]
    disturbed: int  # seeds that are left out
    accuracies: Sequence[float]

    @property
    def hardware(self) -> str:
        return self.cell.results[0].hardware

    @cached_property
    def reached(self) -> dict[float, list[float]]:
        """Seconds to each accuracy, of the seeds that reach it."""
        firsts = {
            wanted: [next((at for at, accuracy in seed if accuracy >= wanted), None) for seed in self.seeds]
            for wanted in self.accuracies
        }
        return {wanted: [at for at in first if at is not None] for wanted, first in firsts.items()}


def times_of(cells: Iterable[Cell], accuracies: Accuracies = REACH) -> list[Times]:
    """The times of the plain cells on tasks that have accuracies to be reached, on each kind of hardware by itself."""
    found = []
    for cell in cells:
        wanted = accuracies.get(cell.conditions.task, ())
        if not wanted or not cell.conditions.plain:
            continue
        for part in by_hardware(cell):
            timed = [(result, seed) for result in part.results if (seed := _validations(result))]
            quiet = [seed for result, seed in timed if result.undisturbed("pretrain", "finetune")]
            if timed:
                found.append(Times(part, tuple(quiet), len(timed) - len(quiet), wanted))
    return found


def time_tables(times: Sequence[Times]) -> list[Table]:
    """A table for each task, recipe and hardware on which an accuracy was reached."""
    panels: dict[tuple[Conditions, str], list[Times]] = defaultdict(list)
    for one in times:
        panels[family(one.cell.conditions), one.hardware].append(one)
    tables = []
    for (conditions, hardware), members in panels.items():
        if not any(seconds for one in members for seconds in one.reached.values()):
            continue
        name_of = namer(one.cell for one in members)
        disturbed = sum(one.disturbed for one in members)
        parts = (
            f"{conditions.task}: seconds to a validation accuracy",
            f"recipe {conditions.setting}",
            direction(conditions),
            conditions.task_note,
            hardware,
            disturbed_left_out(disturbed) if disturbed else "",
        )
        header = ("model", "training", *(f"{100 * wanted:g} %" for wanted in members[0].accuracies))
        rows = [
            (name_of(one.cell), stages(one.cell), *(_mean(seconds, len(one.seeds)) for seconds in one.reached.values()))
            for one in members
            if one.seeds
        ]
        tables.append(Table("; ".join(part for part in parts if part), header, rows))
    return tables


def with_times(report: Report, times: Sequence[Times]) -> Report:
    """The report, and after its tables those of the times."""
    tables = time_tables(times)
    return report._replace(tables=[*report.tables, *tables], notes=[*report.notes, LEGEND]) if tables else report


def to_csv(times: Iterable[Times]) -> str:
    """A line for each cell and accuracy, at full precision, accuracies in [0, 1]."""
    lines: list[Sequence[object]] = [CSV_HEADER]
    for one in times:
        conditions = one.cell.conditions
        cell = (
            *(conditions.task, conditions.recipe, conditions.precision, conditions.optimizer, conditions.causal),
            *(conditions.n_test, conditions.task_note, one.hardware, *one.cell.size, stages(one.cell)),
        )
        for wanted, seconds in one.reached.items():
            mean = statistics.fmean(seconds) if seconds else None
            lines.append([*cell, wanted, mean, len(seconds), len(one.seeds), one.disturbed])
    return to_sheet(lines)


def _validations(result: Result) -> list[tuple[float, float]]:
    """(seconds of training so far, validation accuracy) of fine-tuning, in order; none where nothing was timed."""
    before = 0.0
    if result.pretraining:
        if not result.pretrain_speed:
            return []
        before = result.pretrain_tokens / result.pretrain_speed
    found = []
    for line in read_metrics(result.folder, "val/accuracy"):
        if line.get("stage") != "finetune":
            continue
        seconds, tokens, accuracy = (line.get(key) for key in ("training_seconds", "tokens", "val/accuracy"))
        if seconds is None and result.speed and isinstance(tokens, int):
            seconds = tokens / result.speed
        if isinstance(seconds, int | float) and is_finite(seconds) and isinstance(accuracy, int | float):
            found.append((before + seconds, accuracy))
    return found


def _mean(seconds: Sequence[float], seeds: int) -> str:
    if not seconds:
        return ABSENT
    return f"{statistics.fmean(seconds):,.0f} ({len(seconds)} of {seeds})"
