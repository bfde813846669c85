"""Whether runs repeat one another: whether their configurations differ in the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records import LARGEST, read_text
from ..settings import OF_PRETRAINING, WITHOUT_EFFECT
from ..study import is_packed, read
from .results import Result

# What a cell's runs share anyway, as results have it, and what may be otherwise: how fast they were.
OF_CELLS = ("seed", "share", "pretrain", "size", "precision", "search", "compile")


def difference(runs: Sequence[Result]) -> str | None:
    """A setting in which runs of one cell differ, with its values; None: there is none but the seed.

    Not compared are settings of which a run's configuration, being older than they are, says nothing.
    """
    ignored = {*WITHOUT_EFFECT, *OF_CELLS, *({"lora", "ladder"} - {runs[0].tuning})}
    if runs[0].pretraining is None:
        ignored |= {*OF_PRETRAINING}
    sections = [_sections(run.folder) for run in runs]
    names = dict.fromkeys(name for each in sections for name in each if name not in ignored)
    suspects = [name for name in names if _differ([each[name] for each in sections if name in each])]
    if not suspects:
        return None
    settings = [dict(_settings(_configuration(run.folder), suspects, ignored)) for run in runs]
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each[name] for each in settings if name in each]
        if _differ(values):
            return f"{name} {', '.join(sorted({str(value) for value in values}))}"
    return None


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
