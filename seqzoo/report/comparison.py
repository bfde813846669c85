"""From scratch beside self-pretrained: runs that differ in their seed alone make a cell, cells make a table."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .published import TASKS
from .results import LeftOut, Pretraining, Result


class Conditions(NamedTuple):
    """What every run of a table shares: the test set, and how the models were fine-tuned for it."""

    task: str
    recipe: str
    causal: bool
    finetune_budget: int  # tokens
    n_test: int
    majority: float
    task_note: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """Runs of one model under one set of conditions, one run a seed. Their scores are of one metric."""

    results: tuple[Result, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(result.score for result in self.results)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(result.score for result in self.results) if len(self.results) > 1 else None

    @property
    def num_seeds(self) -> int:
        return len(self.results)


@dataclass(frozen=True)
class Row:
    model: str
    scratch: Cell | None
    pretrained: Cell | None

    @property
    def cells(self) -> list[Cell]:
        return [cell for cell in (self.scratch, self.pretrained) if cell]

    @property
    def params(self) -> list[int]:
        return sorted({result.params for cell in self.cells for result in cell.results})

    @property
    def difference(self) -> float | None:
        """What pretraining adds to the mean score; None unless both cells are there."""
        return self.pretrained.mean - self.scratch.mean if self.scratch and self.pretrained else None


@dataclass(frozen=True)
class Comparison:
    """One table: models under the same conditions. `pretraining` is None where no run was pretrained."""

    conditions: Conditions
    pretraining: Pretraining | None
    rows: tuple[Row, ...]

    @property
    def hardware(self) -> list[str]:
        return sorted({result.hardware for row in self.rows for cell in row.cells for result in cell.results})


def compare(results: Iterable[Result]) -> tuple[list[Comparison], list[LeftOut]]:
    """One comparison for each (conditions, pretraining objective and budget), and the runs that no cell can hold.

    A scratch cell stands beside every pretraining that was fine-tuned under its conditions. Runs of a cell must be
    repetitions: where two have the same seed, or not all have the same size, they differ in a setting the cell does
    not name, their mean would mean nothing, and all of that cell's runs are left out.
    """
    runs: dict[Conditions, dict[Pretraining | None, dict[str, list[Result]]]]
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for result in results:
        runs[_conditions(result)][result.pretraining][result.model].append(result)

    comparisons: list[Comparison] = []
    left_out: list[LeftOut] = []
    for conditions in sorted(runs, key=_reading_order):
        cells = {pretraining: _cells(by_model, left_out) for pretraining, by_model in runs[conditions].items()}
        scratch = cells.pop(None, {})
        pretrainings = sorted(pretraining for pretraining in cells if pretraining and cells[pretraining])
        for pretraining in pretrainings:
            comparisons.append(Comparison(conditions, pretraining, _rows(scratch, cells[pretraining])))
        if scratch and not pretrainings:
            comparisons.append(Comparison(conditions, None, _rows(scratch, {})))
    return comparisons, left_out


def _cells(by_model: dict[str, list[Result]], left_out: list[LeftOut]) -> dict[str, Cell]:
    cells = {}
    for model, results in by_model.items():
        if reason := _not_repetitions(results):
            left_out += [LeftOut(result.folder, reason) for result in results]
        else:
            cells[model] = Cell(tuple(sorted(results, key=lambda result: result.seed)))
    return cells


def _rows(scratch: dict[str, Cell], pretrained: dict[str, Cell]) -> tuple[Row, ...]:
    return tuple(Row(model, scratch.get(model), pretrained.get(model)) for model in sorted({*scratch, *pretrained}))


def _conditions(result: Result) -> Conditions:
    return Conditions(*(getattr(result, name) for name in Conditions._fields))


def _not_repetitions(results: list[Result]) -> str:
    """Why `results` are not repetitions of one experiment; empty if they are."""
    seeds, sizes = [result.seed for result in results], {result.params for result in results}
    if len(sizes) > 1:
        return f"the runs of its cell have different sizes ({', '.join(map(str, sorted(sizes)))} parameters)"
    if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        return f"several runs of its cell have the same seed ({', '.join(map(str, repeated))}): their settings differ"
    return ""


def _reading_order(conditions: Conditions) -> tuple[int, Conditions]:
    """The benchmark's own order of tasks, others after it."""
    return TASKS.index(conditions.task) if conditions.task in TASKS else len(TASKS), conditions
