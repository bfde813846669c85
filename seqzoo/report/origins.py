"""Where the numbers of the page come from: what was run in total, and run by run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..messages import printable
from .charts import relative, short
from .results import Pretraining, Result

SHORT_COMMIT = 7
RUN_HEADER = (
    "number",
    "run folder",
    "model",
    "parameters",
    "task",
    "recipe",
    "training",
    "variant",
    "seed",
    "test score",
    "tokens per second",
    "model-flops utilisation",
    "minutes",
    "share of cores",
    "hardware",
    "commit",
)


def overview(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """(what, its values) of all runs together: models, tasks, budgets, seeds, hardware, commits, versions."""
    pretrained = [result for result in results if result.pretraining]
    seconds = _seconds(results)
    in_one_phase = sum(result.one_phase is not None for result in results)
    from_scratch = len(results) - len(pretrained) - in_one_phase
    finished = f"{len(results)}: {from_scratch} from scratch, {len(pretrained)} self-pretrained"
    finished += f", {in_one_phase} in one phase" if in_one_phase else ""
    versions = Counter(f"{name} {version}" for result in results for name, version in result.versions.items())
    return [
        ("Finished runs", [finished]),
        ("Training", [f"{seconds / 3600:.1f} hours in all"]),
        ("Models", _counted(result.model for result in results)),
        ("Tasks", _counted(result.task for result in results)),
        ("Recipes", _counted(result.recipe for result in results)),
        ("Precision", _counted(result.precision for result in results)),
        ("Seeds", _counted(result.seed for result in results)),
        ("Pretraining", _counted((result.pretraining for result in pretrained), _pretraining)),
        ("Fine-tuning", _counted((result.finetune_budget for result in results), lambda n: f"{short(n)} tokens")),
        ("Hardware", _counted(result.hardware for result in results)),
        ("Commits", _counted(_short(result.commit) for result in results)),
        ("Versions", sorted(versions)),
    ]


def _seconds(results: Iterable[Result]) -> float:
    """Of all training, a pretraining that several runs have in common counted once."""
    total, pretrained = 0.0, dict[str, float]()
    for result in results:
        total += (result.seconds or 0.0) - result.pretrain_seconds
        pretrained[result.pretrained_in] = result.pretrain_seconds
    return total + sum(pretrained.values())


def run_lines(results: Iterable[Result], base: Path) -> list[list[str]]:
    """What stands under `RUN_HEADER`, a line for each run; folders relative to `base`."""
    return [
        [
            str(number),
            printable(relative(result.folder, base)),
            result.model,
            f"{result.params:,}",
            result.task,
            result.recipe,
            _training(result),
            _variant(result),
            str(result.seed),
            f"{100 * result.score:.2f} %" if result.metric == "accuracy" else f"{result.score:.3f} bits",
            "" if result.speed is None else f"{result.speed:,.0f}",
            "" if result.utilisation is None else f"{100 * result.utilisation:.1f} %",
            "" if result.seconds is None else f"{result.seconds / 60:.1f}",
            " + ".join(f"{share:.2f}" for share in result.cpu_shares.values()),
            result.hardware,
            _short(result.commit),
        ]
        for number, result in enumerate(results, start=1)
    ]


def _counted(values: Iterable[Any], say: Callable[[Any], object] = str) -> list[str]:
    """Each value with the number of runs that have it."""
    return [f"{say(value)} ({count})" for value, count in sorted(Counter(values).items())]


def _pretraining(pretraining: Pretraining | None) -> str:
    return f"{pretraining.objective}, {short(pretraining.budget)} tokens" if pretraining else ""


def _training(result: Result) -> str:
    direction = "causal" if result.causal else "bidirectional"
    finetuning = f"fine-tuned on {short(result.finetune_budget)}"
    if result.one_phase:
        weight, passes, whole, tied = result.one_phase
        finetuning = f"one phase on {short(result.finetune_budget)}, masked loss times {weight:g}, passes {passes}"
        finetuning += f", {whole:g} of inputs whole" if whole else ""
        finetuning += " by the draw that augments them" if tied else ""
    return ", ".join(part for part in (direction, _pretraining(result.pretraining), finetuning) if part)


def _variant(result: Result) -> str:
    parts = [
        f"{100 * result.train_fraction:g} % of the data" if result.train_fraction != 1 else "",
        f"{result.tuning} tuning of {result.trained_params:,} parameters" if result.tuning != "full" else "",
        f"{result.init} initialisation" if result.init != "structured" else "",
        result.precision if result.precision != "fp32" else "",
        result.optimizer if result.optimizer != "adamw" else "",
        "augmented" if result.augment else "",
        "packed" if result.packing else "",
    ]
    return ", ".join(part for part in parts if part)


def _short(commit: str) -> str:
    """The commit as it is usually written, still with its "+dirty"."""
    revision, plus, state = commit.partition("+")
    return revision[:SHORT_COMMIT] + plus + state
