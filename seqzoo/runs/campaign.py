"""A sweep as a campaign: its runs in an order that makes the table useful early, each skipped if it is finished and
continued if it was interrupted, until all are done or the time is up.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import CONFIGS, Config, ConfigError, compose, is_text, seconds, validated
from ..messages import shortened, unknown
from ..tasks import DataError
from .attempt import DONE, FAILED, INTERRUPTED, MISUSED, UNFINISHED, attempt, fail, say
from .cell import Cell
from .folder import BUSY, pretraining_key, run_name
from .launch import launch

TASKS_FIRST = ("lra_image", "lra_pathfinder", "lra_listops", "lra_text")
MODELS_FIRST = ("transformer", "lru")
STUDY = "study="
QUIET = 3.0  # seconds until a long sweep says that it is being composed, and again
CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)  # as Hydra writes them, beside a,b,c
RANGE = re.compile(r"range\(.*\)", re.DOTALL)
OUTSIDE_QUOTES = re.compile(r"""(?:^|(?<=,))(?:'[^']*'|"[^"]*"|[^,])*""", re.DOTALL)  # what commas part


def expand(overrides: Sequence[str]) -> list[list[list[str]]]:
    """The parts of a sweep, each a list of runs, each a list of overrides; the last sweep varies fastest.

    `study=<name>` stands for the overrides in `configs/study/<name>.yaml`, less those of keys that are given too. Where
    these are a list, each of it is a part; otherwise there is one.

    Raises:
        ConfigError: an override that is not Hydra's syntax, a sweep that has no list of values, or an unknown study.
    """
    return [
        [list(cell) for cell in itertools.product(*(_values(override) for override in part))]
        for part in _with_study(overrides)
    ]


def single(overrides: Sequence[str]) -> list[str]:
    """The overrides of one run, in which a comma in a path is a part of it.

    Raises:
        ConfigError: as `expand` does; or they ask for several runs.
    """
    if any(override.startswith(STUDY) for override in overrides):
        raise ConfigError("study= stands for several runs; add -m to run them one after another")
    for override in overrides:
        if not is_text(override) and len(_values(override)) > 1:
            raise ConfigError(f"{override} are {len(_values(override))} runs; add -m to run them one after another")
    return list(overrides)


def run_campaign(sweep: Sequence[Sequence[Sequence[str]]]) -> int:
    """Runs what is left of a sweep, of `expand`, and returns how it ended, like `attempt`; 1 if any run failed."""
    start = time.monotonic()
    cells, failed = plan(sweep)
    if not cells:
        return MISUSED
    done = [cell for cell in cells if cell.finished]
    left = [cell for cell in cells if not cell.finished]
    begun = sum(cell.begun for cell in left)
    say(f"{len(cells)} runs: {len(done)} finished, {begun} begun, {len(left) - begun} to begin")
    first = cells[0].config
    if first.launcher.cluster is None:
        deadline = None if first.budget is None else start + seconds(first.budget)
        ends = _here(left, deadline)
    else:
        ends = launch(left, first.launcher, Path(first.runs_dir) / "jobs")
    unfinished = 0
    try:
        for cell, status in ends:
            if status == INTERRUPTED:
                return INTERRUPTED
            if status == DONE:
                done.append(cell)
            elif status in (UNFINISHED, BUSY):
                unfinished += 1
            else:
                failed.append(" ".join(cell.overrides))
    except KeyboardInterrupt:
        return fail("stopped; the same command goes on. Jobs of a cluster, if there are any, do too", INTERRUPTED)
    say(f"{len(done)} of {len(cells)} runs finished")
    for overrides in failed:
        say(f"failed: {overrides}")
    if unfinished:
        say(f"unfinished: {unfinished}; the same command goes on")
    return FAILED if failed else UNFINISHED if unfinished else DONE


def plan(sweep: Sequence[Sequence[Sequence[str]]]) -> tuple[list[Cell], list[str]]:
    """The runs of a sweep in the order to run them, none twice, and the overrides that no run can be made of.

    One part after another. In a part first seeds; within a seed the Transformer and the LRU before other models, and
    tasks in the order Image, Pathfinder, ListOps, Text before others; from scratch before pretrained or in one phase.
    Otherwise as listed.
    """
    cells: dict[Path, Cell] = {}
    ranks: dict[Path, tuple[int, ...]] = {}
    failed = []
    known: dict[tuple[str, ...], Config] = {}
    said = time.monotonic()
    runs = [(number, overrides) for number, part in enumerate(sweep) for overrides in part]
    for done, (number, overrides) in enumerate(runs):
        if time.monotonic() >= said + QUIET:
            said = time.monotonic()
            say(f"{done} of {len(runs)} runs composed")
        try:
            config = _compose(overrides, known)
            cell = Cell(
                tuple(overrides),
                config,
                Path(config.runs_dir) / run_name(config),
                pretraining_key(config) if config.pretrain is True else None,
            )
        except (ConfigError, DataError) as error:
            fail(str(error), MISUSED)
            failed.append(" ".join(overrides))
            continue
        cells.setdefault(cell.folder, cell)
        ranks.setdefault(cell.folder, (number, *_rank(config)))
    return sorted(cells.values(), key=lambda cell: ranks[cell.folder]), failed


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# Keys that nothing else is composed of, and what reads their values.
PLAIN: dict[str, Callable[[str], Any]] = {
    "seed": int,
    "share": float,
    "objective": str,
    "pretrain": _truth,
    "augment": _truth,
}


def _compose(overrides: Sequence[str], known: dict[tuple[str, ...], Config]) -> Config:
    """As `compose` does, which takes a sixth of a second: once for all runs that differ in plain keys alone."""
    given = {key: value for key, _, value in (override.partition("=") for override in overrides) if key in PLAIN}
    others = tuple(override for override in overrides if override.partition("=")[0] not in PLAIN)
    if len(given) + len(others) < len(overrides):
        return compose(overrides)
    try:
        if others not in known:
            known[others] = compose(others)
        values = {key: PLAIN[key](value) for key, value in given.items()}
        return validated(replace(deepcopy(known[others]), **values))
    except (KeyError, ValueError):  # none of these alone, which may be for lack of the others
        return compose(overrides)


def _rank(config: Config) -> tuple[int, ...]:
    return (
        config.seed,
        int(config.model.name not in MODELS_FIRST),
        TASKS_FIRST.index(config.task.name) if config.task.name in TASKS_FIRST else len(TASKS_FIRST),
        MODELS_FIRST.index(config.model.name) if config.model.name in MODELS_FIRST else len(MODELS_FIRST),
        int(config.pretrain is not False or config.objective == "joint"),
    )


def _here(cells: Sequence[Cell], deadline: float | None) -> Iterator[tuple[Cell, int]]:
    """Runs `cells` one after another in this process; yields each with how it ended.

    What another process has in hand is tried once more after the others, as long as that finds something to do.
    """
    waiting, number = list(cells), 0
    while waiting:
        busy = []
        for cell in waiting:
            if deadline is not None and time.monotonic() >= deadline:
                yield cell, UNFINISHED
                continue
            number += 1
            print(f"[{number}/{len(cells)}] {' '.join(cell.overrides)}", file=sys.stderr)
            try:
                status = attempt(cell.overrides, deadline)
            except Exception:  # a bug, or no memory left, in one run says nothing of the next
                traceback.print_exc()
                status = FAILED
            if status == BUSY:
                busy.append(cell)
                number -= 1
            else:
                yield cell, status
        if len(busy) == len(waiting):
            yield from ((cell, BUSY) for cell in busy)
            return
        waiting = busy


def _values(override: str) -> list[str]:
    """An override for each value that a sweep is to try."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, RangeSweep
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    if is_text(override) and not RANGE.fullmatch(value):
        choice = CHOICE.fullmatch(value)
        return [f"{key}={part.strip()}" for part in OUTSIDE_QUOTES.findall(choice[1] if choice else value)]
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, RecursionError, ValueError):
        raise ConfigError(
            f"{shortened(override)} cannot be read; valid: key=value, the value in quotes if it is more than "
            "letters, digits and . - _ / of ASCII: 'key=\"value\"'"
        ) from None
    if not parsed.is_sweep_override():
        return [override]
    if not isinstance(parsed.value(), ChoiceSweep | RangeSweep):
        raise ConfigError(f"{override} has no list of values to sweep over; valid: a,b,c or range(...) or choice(...)")
    return [f"{key}={value}" for value in parsed.sweep_string_iterator()]


def _with_study(overrides: Sequence[str]) -> list[list[str]]:
    """`overrides` with `study=` replaced by what it stands for, part by part."""
    from omegaconf import OmegaConf

    named = [override.removeprefix(STUDY) for override in overrides if override.startswith(STUDY)]
    if not named:
        return [list(overrides)]
    studies = {path.stem: path for path in (CONFIGS / "study").glob("*.yaml")}
    if named[-1] not in studies:
        raise ConfigError(unknown("study", named[-1], sorted(studies)))
    given = [override for override in overrides if not override.startswith(STUDY)]
    keys = {override.partition("=")[0] for override in given}
    study: Any = OmegaConf.to_container(OmegaConf.load(studies[named[-1]]))
    parts = study if isinstance(study, list) else [study]
    return [[*(f"{key}={value}" for key, value in part.items() if key not in keys), *given] for part in parts]
