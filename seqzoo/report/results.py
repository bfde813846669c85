"""Run folders and studies in, results out: find them, read each `result.json`, say why one cannot be used."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from ..messages import printable
from ..records import LARGEST, is_finite, is_name, read_text
from ..study import PICTURES, is_packed, is_study, read, read_study

SCHEMA = 1
FIGURES = "_files"  # after the name of a report page: the folder of its figures
UNDISTURBED = 0.9  # `seqzoo.training.cores.cpu_share` from which on times are the model's own


class Pretraining(NamedTuple):
    objective: str  # "masked" or "causal"
    budget: int  # tokens


class OnePhase(NamedTuple):
    weight: float  # of the masked loss beside the labels'
    passes: int  # over a batch in a step
    whole: float = 0.0  # of the sequences, the share in which nothing was hidden, in [0, 1)
    tied: bool = False  # one draw decided that and how a sequence was augmented


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a report needs of one finished run. Budgets are in tokens.

    The values below the blank line may be missing from the file, which is then older than they are.
    """

    folder: Path  # or the run's line of a study, see `seqzoo.study`
    model: str
    task: str
    causal: bool
    pretraining: Pretraining | None  # None: one stage, of the labels alone, from scratch, or
    one_phase: OnePhase | None  # of these and the masked loss together
    finetune_budget: int
    total_budget: int  # of both stages together
    recipe: str
    seed: int
    params: int
    metric: str  # "accuracy" or, of language modelling, "bits_per_character"
    score: float  # on the test set; accuracies are in [0, 1]
    n_test: int
    majority: float  # share of the most frequent class, in [0, 1]
    task_note: str  # how the task was shortened; empty: it was not
    hardware: str

    epochs: tuple[float, ...]  # of each stage, if all budgets were set in these: tokens follow from the data
    train_fraction: float  # part of the train split that both stages saw, in (0, 1]
    tuning: str  # what fine-tuning moved: "full", "head", "lora" or "ladder"
    init: str  # what training began from: "structured" or "random"
    precision: str  # "fp32" or "bf16", or, if pretraining had another than fine-tuning, "fp32 after bf16"
    optimizer: str  # "adamw" or "muon 2", or, if pretraining had another than fine-tuning, "adamw after muon 2"
    augment: bool  # whether training batches were augmented
    packing: bool  # whether their sequences lay in one row
    learnt: bool | None  # whether pretraining got beyond the frequency of symbols; None: there was none, or not known
    trained_params: int  # parameters that fine-tuning moved
    pretrain_run: str | None  # the run folder, beside this one, whose pretraining it reused
    pretrain_tokens: int  # seen in pretraining; 0 from scratch
    speed: float | None  # tokens per second of fine-tuning
    pretrain_speed: float | None
    cpu_shares: dict[str, float]  # of each stage that trained on a CPU: part of the time it could run in which it did
    utilisation: float | None  # of fine-tuning: its model-flops over those of a large matrix product, in [0, 1]
    seconds: float | None  # both stages
    pretrain_seconds: float
    rates: dict[str, float]  # learning rate of each stage that trained
    commit: str
    versions: dict[str, str]

    @property
    def pretrained_in(self) -> str:
        """The name of the run folder whose pretraining it has: its own where it reused none."""
        return self.pretrain_run or self.folder.name

    def undisturbed(self, *stages: str) -> bool:
        """Whether other processes left these stages their cores, as far as that is known."""
        return all(self.cpu_shares.get(stage, 1.0) >= UNDISTURBED for stage in stages)


def disturbed_left_out(runs: int) -> str:
    """What to say where times are shown but those of so many runs."""
    return f"{runs} {'run that shared its' if runs == 1 else 'runs that shared their'} cores left out"


class LeftOut(NamedTuple):
    """A run folder, or a study, of which no table shows what is there, and why."""

    folder: Path
    reason: str


def run_folders(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The run folders and study files at or below `folder`, in order of their names.

    A run is not searched for further runs, nor is a link to a folder `above` it. A folder with nothing below it counts
    as a run that left no result, but for what belongs to a page or a study: its figures, and a folder of the study's
    name.
    """
    if _is_run(folder):
        yield folder
        return
    try:
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError:  # what cannot be looked into has no result to give, and is named
        yield folder
        return
    above |= {folder.resolve()}
    folders = {
        child for child in children if os.path.isdir(child) and not (child.is_symlink() and child.resolve() in above)
    }
    studies = {child for child in children if is_study(child)}
    if not studies and not folders:
        yield folder
    of_studies = {study.stem for study in studies} | ({PICTURES} if studies else set())
    for child in children:
        if child in studies:
            yield child
        elif child in folders and not _is_of_page(child):
            below = list(run_folders(child, above))
            if below != [child] or child.name not in of_studies or _is_run(child):
                yield from below


def _is_run(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in ("config.yaml", "result.json"))


def _is_of_page(folder: Path) -> bool:
    """Whether these are the figures of a report page that was written among the runs."""
    stem = folder.name.removesuffix(FIGURES)
    return stem != folder.name and folder.with_name(f"{stem}.html").exists()


def read_result(folder: Path) -> Result:
    """The result of one run, of its folder or its line of a study.

    Raises:
        FileNotFoundError: the run has no `result.json`: it is unfinished.
        ValueError: `result.json` is malformed, incomplete, or of another schema; the message says which.
    """
    try:
        record = read(folder / "result.json")
    except FileNotFoundError as error:
        reason = str(error) if is_packed(folder) else "no result.json: the run is unfinished"
        raise FileNotFoundError(reason) from None
    except ValueError as error:
        raise ValueError(f"result.json cannot be read: {error}") from None

    if (schema := _field(record, "schema", int)) != SCHEMA:
        raise ValueError(f"result.json has schema {schema}; this version reads schema {SCHEMA}")
    pretrain = _field(record, "pretrain", bool)
    objective = _field(record, "objective", str)
    valid = ("masked", "causal") if pretrain else ("masked", "causal", "joint")
    if objective not in valid:
        raise ValueError(f"result.json: objective is {objective!r}; valid: {', '.join(map(repr, valid))}")
    stages = ("pretrain", "finetune") if pretrain else ("finetune",)
    params = _positive(record, "params")
    tested = record.get("test")
    in_bits = isinstance(tested, dict) and "bits_per_character" in tested
    epochs = _of_stages(record, "epochs", stages)
    train_fraction = _share(record, "train_fraction", 1.0)
    if train_fraction == 0:
        raise ValueError("result.json: train_fraction is 0, outside (0, 1]")
    return Result(
        folder=folder,
        model=_field(record, "model", str),
        task=_field(record, "task", str),
        causal=_field(record, "causal", bool),
        pretraining=Pretraining(objective, _budget(record, "pretrain")) if pretrain else None,
        one_phase=_one_phase(record) if objective == "joint" else None,
        finetune_budget=_budget(record, "finetune"),
        total_budget=_budget(record, *stages),
        recipe=_field(record, "recipe", str),
        seed=_field(record, "seed", int),
        params=params,
        metric="bits_per_character" if in_bits else "accuracy",
        score=_amount(record, "test.bits_per_character") if in_bits else _share(record, "test.accuracy"),
        n_test=_positive(record, "n_test"),
        majority=_share(record, "majority"),
        task_note=_field(record, "task_note", str),
        hardware=_field(record, "hardware", str),
        epochs=tuple(epochs.values()) if len(epochs) == len(stages) else (),
        train_fraction=train_fraction,
        tuning=_optional(record, "tuning", "full", str),
        init=_optional(record, "init", "structured", str),
        precision=_optional(record, "precision", None, str) or _configured_precision(folder),
        optimizer=_optional(record, "optimizer", "adamw", str),
        augment=_optional(record, "augment", False, bool),
        packing=_optional(record, "packing", False, bool),
        learnt=_optional(record, "learnt.learnt", None, bool, NoneType),
        trained_params=_optional(record, "trained_params", params, int),
        pretrain_run=_name(record, "pretrain_run"),
        pretrain_tokens=_field(record, "tokens_seen.pretrain", int) if pretrain else 0,
        speed=_optional(record, "tokens_per_second.finetune", None, float, int, NoneType),
        pretrain_speed=_optional(record, "tokens_per_second.pretrain", None, float, int, NoneType),
        cpu_shares=_of_stages(record, "cpu_share", stages),
        utilisation=_optional(record, "mfu.finetune", None, float, int, NoneType),
        seconds=_optional(record, "seconds.total", None, float, int, NoneType),
        pretrain_seconds=_optional(record, "seconds.pretrain", None, float, int, NoneType) or 0.0,
        rates=_of_stages(record, "lr", stages),
        commit=_optional(record, "commit", "unknown", str),
        versions={
            printable(name): printable(str(version))
            for name, version in _optional(record, "versions", {}, dict).items()
        },
    )


def load_results(folders: Iterable[Path]) -> tuple[list[Result], list[LeftOut]]:
    """Every result of `folders`, or at or below them, and what has none to give. A run found twice counts once, and so
    do a run and its copies, such as its line of a study; a folder of it before a line.

    Args:
        folders: of runs, at any depth, or study files.
    """
    runs, left_out = find_runs(folders)
    results: list[Result] = []
    for run in runs:
        try:
            results.append(read_result(run))
        except (OSError, ValueError) as error:
            left_out.append(LeftOut(run, str(error)))
    return _once(results), left_out


def _once(results: Iterable[Result]) -> list[Result]:
    """The results without those of copies of a run, which have its name and all else that it has."""
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        same = found[result.folder.resolve().name]
        copy = next((place for place, other in enumerate(same) if replace(other, folder=result.folder) == result), None)
        if copy is None:
            same.append(result)
        elif is_packed(same[copy].folder) and not is_packed(result.folder):
            same[copy] = result
    return [result for same in found.values() for result in same]


def find_runs(folders: Iterable[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Every run at or below `folders`, once, and the studies, or lines of them, that cannot be read."""
    places: dict[Path, Path] = {}
    for folder in folders:
        for place in run_folders(folder) if folder.is_dir() else [folder]:
            places.setdefault(place.resolve(), place)
    runs: dict[Path, Path] = {}
    left_out: list[LeftOut] = []
    for resolved, place in places.items():
        if not place.is_file():
            runs.setdefault(resolved, place)
            continue
        try:
            study = read_study(place)
        except (OSError, ValueError) as error:
            left_out.append(LeftOut(place, str(error)))
            continue
        left_out += [LeftOut(place, fault) for fault in study.faults]
        for name in study.runs:
            runs.setdefault(resolved / name, place / name)
    return list(runs.values()), left_out


def _field(record: Any, key: str, *types: type) -> Any:
    """The value under a dotted key, text as it can be shown; JSON types are exact, so `true` is no integer."""
    value = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"result.json has no {key}")
        value = value[part]
    if type(value) not in types or not is_finite(value):
        valid = " or ".join("null" if kind is NoneType else kind.__name__ for kind in types)
        raise ValueError(f"result.json: {key} is {value!r}, not {valid}")
    return printable(value) if isinstance(value, str) else value


def _optional(record: Any, key: str, default: Any, *types: type) -> Any:
    """The value under a dotted key, or `default` where an older file does not have it."""
    value = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return _field(record, key, *types)


def _of_stages(record: Any, key: str, stages: Iterable[str]) -> dict[str, float]:
    """The numbers under a key, of the stages that have one."""
    numbers = {stage: _optional(record, f"{key}.{stage}", None, float, int, NoneType) for stage in stages}
    return {stage: number for stage, number in numbers.items() if number}


def _configured_precision(folder: Path) -> str:
    """What a run was trained in whose result does not say so."""
    path = folder / "config.yaml"
    try:
        if not is_packed(folder) and "bf16" not in read_text(path, LARGEST):  # to parse every YAML would take minutes
            return "fp32"
        configured = read(path).get("precision")
    except (OSError, ValueError):
        configured = None
    return configured if isinstance(configured, str) else "fp32"


def _name(record: Any, key: str) -> str | None:
    value = _optional(record, key, None, str, NoneType)
    if value is not None and not is_name(value):
        raise ValueError(f"result.json: {key} is {value!r}, not the name of a folder")
    return value


def _one_phase(record: Any) -> OnePhase:
    whole = _share(record, "joint.whole", 0.0)
    if whole == 1:
        raise ValueError("result.json: joint.whole is 1, outside [0, 1)")
    tied = whole > 0 and _optional(record, "augment", False, bool) and _optional(record, "joint.draws", 1, int) == 1
    return OnePhase(_amount(record, "joint.weight"), _positive(record, "joint.passes"), whole, tied)


def _budget(record: Any, *stages: str) -> int:
    """The tokens that `stages` were given together."""
    return sum(_field(record, f"token_budget.{stage}", int) for stage in stages)


def _share(record: Any, key: str, default: float | None = None) -> float:
    value = _field(record, key, float, int) if default is None else _optional(record, key, default, float, int)
    if not 0 <= value <= 1:
        raise ValueError(f"result.json: {key} is {value}, outside [0, 1]")
    return float(value)


def _positive(record: Any, key: str) -> int:
    value = _field(record, key, int)
    if value < 1:
        raise ValueError(f"result.json: {key} is {value}, not 1 or more")
    return value


def _amount(record: Any, key: str) -> float:
    value = _field(record, key, float, int)
    if not 0 <= value < math.inf:
        raise ValueError(f"result.json: {key} is {value}, not a number of 0 or more")
    return float(value)
