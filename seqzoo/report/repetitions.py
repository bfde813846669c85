"""Whether runs repeat one another: whether their configurations differ in the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records import LARGEST, read_text
from ..settings import WITHOUT_EFFECT, unused
from ..study import is_packed, read
from .results import Result

# What a cell's runs share anyway, as results have it, and what may be otherwise: how fast they were.
OF_CELLS = ("seed", "share", "pretrain", "size", "precision", "compile")
# What runs that are compared may differ in: how their training is divided between stages, and augmented.
OF_STAGES = ("objective", "joint", "pixel_loss", "pretraining", "augment", "finetuning.tokens", "finetuning.epochs")


def difference(runs: Sequence[Result], besides: Sequence[str] = ()) -> str | None:
    """A setting in which runs of one cell differ, with its values; None: there is none but the seed.

    Not compared are settings that have no effect on a run, those of which its configuration, being older than they are,
    says nothing, and `besides`, such as `OF_STAGES` for runs of two cells.
    """
    ignored = {*WITHOUT_EFFECT, *OF_CELLS, *besides}
    sections = [_sections(run.folder) for run in runs]
    names = dict.fromkeys(name for each in sections for name in each if name not in ignored)
    suspects = [name for name in names if _differ([each[name] for each in sections if name in each])]
    if _differ(data := [digest for run in runs if (digest := _data(run.folder))]):
        return f"data, by SHA-256 {', '.join(sorted({digest[:8] for digest in data}))}"
    if "pretraining" not in ignored and any(run.pretrain_run for run in runs):
        suspects.append("pretraining")
    if not suspects:
        return None
    settings = [_shaping(run, suspects, ignored) for run in runs]
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each[name] for each in settings if name in each]
        if _differ(values):
            return f"{name} {', '.join(sorted({str(value) for value in values}))}"
    return None


def _shaping(run: Result, names: Sequence[str], ignored: set[str]) -> dict[str, Any]:
    """Those of a run's settings that have an effect, under their dotted names; of pretraining, where that was done."""
    configuration = _configuration(run.folder)
    found = dict(_settings(configuration, names, ignored | {*unused(configuration)}))
    if isinstance(configuration.get("pretrain"), str) and "pretraining" in names:
        there = _configuration(run.folder.parent / run.pretrained_in)
        found |= _settings(there or {"pretraining": {"lr": run.rates.get("pretrain")}}, ["pretraining"], ignored)
    return found


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _sections(run: Path) -> Mapping[str, Any]:
    """A run's configuration by the keys at its top, not parsed: to parse every YAML would take minutes."""
    if is_packed(run):
        return _configuration(run)
    sections: dict[str, str] = {}
    name = ""
    try:
        for line in read_text(run / "config.yaml", LARGEST).splitlines():
            name = name if line.startswith((" ", "-")) else line.partition(":")[0]
            sections[name] = f"{sections.get(name, '')}{line}\n"
    except (OSError, ValueError):
        return {}
    return sections


def _configuration(run: Path) -> Mapping[str, Any]:
    try:
        return read(run / "config.yaml")
    except (OSError, ValueError):
        return {}


def _data(run: Path) -> str | None:
    """The SHA-256 of what it learnt from; None: the run is older than those."""
    try:
        return read(run / "task.json")["data"]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _settings(
    values: Mapping[str, Any], names: Sequence[str], ignored: set[str], above: str = ""
) -> Iterator[tuple[str, Any]]:
    """Each setting under its dotted name."""
    for key in names:
        name, value = f"{above}{key}", values.get(key)
        if key not in values or name in ignored:
            continue
        if isinstance(value, dict):
            yield from _settings(value, list(value), ignored, f"{name}.")
        else:
            yield name, value
