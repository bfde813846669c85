"""The command line of `train.py`.

Sweeps are expanded with Hydra's parser and run one cell after another here, because Hydra's own sweeper composes all
cells before the first and stops at the first failure.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import GROUPS, ConfigError, available, compose, to_dict
from ..tasks import DataError
from .errors import Interrupted, TrainingError
from .run import run

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
EPILOGUE = """{groups}

every other key is a dotted override; --cfg shows them all:
  python train.py model=lru task=lra_text recipe=tiny pretrain=true
  python train.py model=transformer finetuning.lr=3e-4 seed=1
  python train.py -m model=transformer,lru pretrain=false,true seed=0,1,2
  python train.py pretrain=runs/<folder> finetuning.lr=1e-4     reuse that run's pretraining
  python train.py resume=runs/<folder>                          continue an interrupted run
  torchrun --nproc-per-node 2 train.py model=lru                one run on two GPUs

The same command again continues what is unfinished and skips what is finished.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; returns the exit status.

    0: done; 1: a run failed; 2: the arguments ask for something that does not exist; 130: interrupted, and saved.
    """
    arguments = _parser().parse_intermixed_args(argv)
    try:
        cells = expand(arguments.overrides) if arguments.multirun else [single(arguments.overrides)]
        if arguments.cfg:
            for cell in cells:
                _print_config(cell)
            return 0
    except ConfigError as error:
        return _fail(str(error), MISUSED)
    if len(cells) == 1:
        return _run(cells[0])
    outcomes = []
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {' '.join(cell)}", file=sys.stderr)
        try:
            status = _run(cell)
        except Exception:  # a bug, or no memory left, in one cell says nothing of the next
            traceback.print_exc()
            status = FAILED
        if status == INTERRUPTED:
            return INTERRUPTED
        outcomes.append((cell, status))
    failed = [cell for cell, status in outcomes if status]
    _say(f"{len(cells) - len(failed)} of {len(cells)} runs finished")
    for cell in failed:
        _say(f"failed: {' '.join(cell)}")
    return FAILED if failed else 0


def single(overrides: Sequence[str]) -> list[str]:
    """The overrides of one run.

    Raises:
        ConfigError: they ask for several.
    """
    cells = expand(overrides)
    if len(cells) > 1:
        raise ConfigError(f"{' '.join(overrides)} are {len(cells)} runs; add -m to run them one after another")
    return list(overrides)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The cells of a sweep, each a list of overrides; the last sweep varies fastest.

    Raises:
        ConfigError: an override that is not Hydra's syntax, or a sweep that has no list of values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}; valid: key=value") from None
    choices = []
    for text, override in zip(overrides, parsed, strict=True):
        if not override.is_sweep_override():
            choices.append([text])
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{text} has no list of values to sweep over; valid: a,b,c or range(...) or choice(...)")
    return [list(cell) for cell in itertools.product(*choices)]


def _run(overrides: list[str]) -> int:
    """One run, with every error that has a name reported in a line."""
    try:
        if len(overrides) > 1 and any(override.startswith("resume=") for override in overrides):
            raise ConfigError("resume= takes the run's own configuration and no other override")
        result = run(compose(overrides))
    except ConfigError as error:
        return _fail(str(error), MISUSED)
    except (DataError, TrainingError) as error:
        return _fail(str(error), FAILED)
    except Interrupted as stopped:
        return _fail(str(stopped), INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("stopped; the same command continues from the last checkpoint, if there is one", INTERRUPTED)
    _report(result)
    return 0


def _report(result: dict[str, Any]) -> None:
    test = result["test"]
    bits = f"{test['bits_per_character']:.4f} bits per character, " if "bits_per_character" in test else ""
    _say(
        f"{result['model']} on {result['task']}: test {bits}accuracy {test['accuracy']:.4f} on {result['n_test']} "
        f"examples (majority class {result['majority']:.4f})"
    )
    if result["task_note"]:
        _say(f"note: {result['task_note']}")
    _say(f"run folder: {result['folder']}")
    _say(f"compare: python eval_lra.py {Path(result['folder']).parent}")


def _say(message: str) -> None:
    """Prints, on the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(message)


def _fail(message: str, status: int) -> int:
    print(f"train.py: {message}", file=sys.stderr)
    return status


def _print_config(overrides: list[str]) -> None:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.create(to_dict(compose(overrides)))), end="")


def _parser() -> argparse.ArgumentParser:
    groups = "\n".join(f"{group + '=':<9}{', '.join(available(group))}" for group in GROUPS)
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a sequence mixer on a task, from scratch or after self-pretraining on the same data.",
        epilog=EPILOGUE.format(groups=groups),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choose model=, task=, recipe=; set any key")
    parser.add_argument("-m", "--multirun", action="store_true", help="sweep: comma lists are run one after another")
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and exit")
    return parser
