"""From scratch beside self-pretrained, and beside one phase of both losses: runs that differ in their seed alone make a
cell, cells make a table."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .intervals import Interval, of_difference, over_examples, over_seeds
from .published import TASKS
from .repetitions import OF_STAGES, difference
from .results import LeftOut, OnePhase, Pretraining, Result


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
    train_fraction: float
    tuning: str
    init: str
    precision: str
    optimizer: str
    augment: bool
    packing: bool

    @property
    def setting(self) -> str:
        """The recipe, and the precision and optimizer if those are not what runs have where nothing is said."""
        named = ((self.precision, "fp32"), (self.optimizer, "adamw"))
        return ", ".join((self.recipe, *(value for value, usual in named if value != usual)))

    @property
    def plain(self) -> bool:
        """Whether these are the conditions of the comparison itself, and not a variant that another study is about."""
        variant = (self.train_fraction, self.tuning, self.init, self.augment, self.packing)
        return variant == (1.0, "full", "structured", False, False)


class Size(NamedTuple):
    """A model, and how large it is."""

    model: str
    params: int


@dataclass(frozen=True)
class Cell:
    """Runs of one model under one set of conditions, one run a seed. Their scores are of one metric."""

    results: tuple[Result, ...]

    @cached_property
    def size(self) -> Size:
        return Size(self.results[0].model, self.results[0].params)

    @cached_property
    def conditions(self) -> Conditions:
        return Conditions(*(getattr(self.results[0], name) for name in Conditions._fields))

    @property
    def pretraining(self) -> Pretraining | None:
        return self.results[0].pretraining

    @property
    def one_phase(self) -> OnePhase | None:
        return self.results[0].one_phase

    @property
    def compared_under(self) -> Conditions:
        """Its conditions but for augmentation where that is a part of one phase, whose name then says so."""
        return self.conditions._replace(augment=False) if self.one_phase else self.conditions

    @property
    def total_budget(self) -> int:
        """Tokens of both stages together."""
        return self.results[0].total_budget

    @property
    def scores(self) -> list[float]:
        return [result.score for result in self.results]

    @property
    def independent(self) -> list[float]:
        """Of each training from its beginning: fine-tunings of one pretraining count as one, with their mean."""
        return [self.mean] if self.shares_pretraining else self.scores

    @cached_property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @cached_property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.scores) if len(self.results) > 1 else None

    @cached_property
    def interval(self) -> Interval | None:
        """95 %, over seeds and, of accuracies, test examples; None of a single score that is no accuracy."""
        n = self.conditions.n_test if self.conditions.metric == "accuracy" else None
        if len(self.independent) > 1:
            return over_seeds(self.independent, n=n)
        return None if n is None else over_examples(self.mean, n)

    @property
    def num_seeds(self) -> int:
        return len(self.results)

    @property
    def shares_pretraining(self) -> bool:
        """Whether seeds are those of fine-tuning alone, after one pretraining."""
        return self.pretraining is not None and len({run.pretrained_in for run in self.results}) < self.num_seeds

    @property
    def learnt(self) -> bool:
        """Whether each pretraining got beyond the frequency of symbols, as far as that is known."""
        return all(result.learnt is not False for result in self.results)


@dataclass(frozen=True)
class Gain:
    """How one cell's scores are beyond another's."""

    after: Cell
    before: Cell

    @cached_property
    def mean(self) -> float:
        return self.after.mean - self.before.mean

    @cached_property
    def interval(self) -> Interval | None:
        """95 %; None of scores that are no accuracies."""
        if self.after.conditions.metric != "accuracy":
            return None
        return of_difference(self.after.independent, self.before.independent, self.after.conditions.n_test)

    @cached_property
    def unlike(self) -> str | None:
        """A setting of both sides, other than those of stages, that is not the same, with its values."""
        return difference([self.after.results[0], self.before.results[0]], OF_STAGES)


@dataclass(frozen=True)
class Row:
    """One model: from scratch with the fine-tuning budget of the table, self-pretrained, and with the budget of both
    stages of the pretrained one, from scratch and in one phase. Without a pretrained one, one phase has the table's."""

    size: Size
    scratch: Cell | None
    pretrained: Cell | None
    matched: Cell | None = None
    one_phase: tuple[Cell, ...] = ()

    @property
    def cells(self) -> list[Cell]:
        return [cell for cell in (self.scratch, self.pretrained, self.matched, *self.one_phase) if cell]

    @property
    def scratch_of_total(self) -> Cell | None:
        """The cell from scratch with the budget of the cells in one phase."""
        return self.matched if self.pretrained else self.scratch

    @cached_property
    def _of_one_phase(self) -> dict[int, Gain]:
        before = self.scratch_of_total
        return {id(cell): Gain(cell, before) for cell in self.one_phase} if before else {}

    def gain_of(self, cell: Cell) -> Gain | None:
        """What one phase, of the budget that `cell` has, adds to from scratch."""
        return self._of_one_phase.get(id(cell))

    @cached_property
    def difference(self) -> Gain | None:
        """What pretraining adds; None unless both cells are there."""
        return Gain(self.pretrained, self.scratch) if self.scratch and self.pretrained else None

    @cached_property
    def gain(self) -> Gain | None:
        """What pretraining adds at equal total budget; None unless both cells are there."""
        return Gain(self.pretrained, self.matched) if self.matched and self.pretrained else None

    @property
    def gains(self) -> list[Gain]:
        return [gain for gain in (self.difference, self.gain, *map(self.gain_of, self.one_phase)) if gain]


@dataclass(frozen=True)
class Comparison:
    """One table: models under the same conditions. `pretraining` is None where no run was pretrained."""

    conditions: Conditions
    pretraining: Pretraining | None
    rows: tuple[Row, ...]

    @property
    def hardware(self) -> list[str]:
        return sorted({result.hardware for row in self.rows for cell in row.cells for result in cell.results})


def cells_of(results: Iterable[Result]) -> tuple[list[Cell], list[LeftOut]]:
    """The cells, in reading order, and the runs that no cell can hold.

    Runs of a cell must be repetitions: where two have the same seed, or differ in a setting the cell does not name,
    their mean would mean nothing, and all of that cell's runs are left out.
    """
    repetitions: dict[tuple, list[Result]] = defaultdict(list)
    for result in results:
        cell = Cell((result,))
        repetitions[cell.conditions, cell.size, cell.pretraining, cell.one_phase].append(result)

    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    for runs in repetitions.values():
        if fault := _no_repetitions(runs):
            left_out += [LeftOut(run.folder, fault) for run in runs]
        else:
            cells.append(Cell(tuple(sorted(runs, key=lambda run: run.seed))))
    return sorted(cells, key=_reading_order), left_out


def by_hardware(cell: Cell) -> list[Cell]:
    """A cell's runs on each kind of hardware."""
    kinds = dict.fromkeys(result.hardware for result in cell.results)
    return [Cell(tuple(result for result in cell.results if result.hardware == kind)) for kind in kinds]


def compare(cells: Iterable[Cell]) -> list[Comparison]:
    """One comparison for each (conditions, pretraining objective and budget).

    A scratch cell stands beside every pretraining that was fine-tuned under its conditions, and beside every pretrained
    cell of its size whose total budget it has; one that stands beside none is in a comparison without pretraining. So
    does a cell of one phase, but that an augmented one stands beside what is not augmented, too.
    """
    cells = list(cells)
    by_conditions: dict[Conditions, dict[Pretraining | None, dict[Size, Cell]]]
    by_conditions = defaultdict(lambda: defaultdict(dict))
    phases: dict[tuple[Conditions, Size], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.one_phase:
            phases[cell.conditions, cell.size].append(cell)
        else:
            by_conditions[cell.conditions][cell.pretraining][cell.size] = cell

    def from_scratch(conditions: Conditions, size: Size) -> Cell | None:
        return by_conditions.get(conditions, {}).get(None, {}).get(size)

    def in_one_phase(conditions: Conditions, size: Size) -> tuple[Cell, ...]:
        variants = dict.fromkeys((conditions, conditions._replace(augment=True)))
        return tuple(cell for variant in variants for cell in phases.get((variant, size), ()))

    def row(conditions: Conditions, size: Size, pretrained: Cell | None) -> Row:
        scratch = from_scratch(conditions, size)
        if pretrained is None:
            return Row(size, scratch, None)
        same_total = conditions._replace(finetune_budget=pretrained.total_budget)
        return Row(size, scratch, pretrained, from_scratch(same_total, size), in_one_phase(same_total, size))

    comparisons = []
    for conditions, groups in by_conditions.items():
        scratch = groups.get(None, {})
        for pretraining in sorted(pretraining for pretraining in groups if pretraining):
            pretrained = groups[pretraining]
            sizes = sorted({*scratch, *pretrained})
            rows = tuple(row(conditions, size, pretrained.get(size)) for size in sizes)
            comparisons.append(Comparison(conditions, pretraining, rows))
    beside = {id(cell) for comparison in comparisons for row in comparison.rows for cell in row.cells}
    alone: dict[Conditions, set[Size]] = defaultdict(set)
    for cell in cells:
        if cell.pretraining is None and id(cell) not in beside:
            shared = from_scratch(cell.compared_under, cell.size)
            alone[shared.conditions if shared else cell.conditions].add(cell.size)
    for conditions, of_sizes in alone.items():
        rows = tuple(
            Row(size, from_scratch(conditions, size), None, None, in_one_phase(conditions, size))
            for size in sorted(of_sizes)
        )
        comparisons.append(Comparison(conditions, None, rows))
    return sorted(comparisons, key=lambda comparison: _conditions_order(comparison.conditions))


def _no_repetitions(runs: list[Result]) -> str | None:
    """Why runs cannot be one cell."""
    if len(runs) == 1:
        return None
    differing, seeds = difference(runs), [run.seed for run in runs]
    if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        text = ", ".join(map(str, repeated))
        return f"several runs of its cell have the same seed ({text}): {differing or _rates(runs)}"
    return differing and f"runs of its cell differ in more than the seed: {differing}"


def _rates(runs: list[Result]) -> str:
    """What differs where configurations do not."""
    for stage, name in (("pretrain", "pretraining"), ("finetune", "fine-tuning")):
        rates = sorted({run.rates[stage] for run in runs if stage in run.rates})
        if len(rates) > 1:
            return f"learning rates of {name} {', '.join(f'{rate:g}' for rate in rates)}"
    return "their settings differ"


def _reading_order(cell: Cell) -> tuple:
    return *_conditions_order(cell.conditions), cell.pretraining or (), cell.one_phase or (), cell.size


def _conditions_order(conditions: Conditions) -> tuple[int, bool, Conditions]:
    """The benchmark's own order of tasks, others after it; variants after what they vary."""
    place = TASKS.index(conditions.task) if conditions.task in TASKS else len(TASKS)
    return place, not conditions.plain, conditions
