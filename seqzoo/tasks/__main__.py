"""The command line of the data: `python -m seqzoo.tasks prepare lra_listops`.

It stands above the rooms, as `train.py` does, and takes the same configuration.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..config import Config, ConfigError, compose
from ..failures import ends, told
from ..messages import printable, printable_lines, unknown
from ..plugins import import_plugins
from . import OWN, TASKS, DataError, MissingData, Split, Task, build_task
from .checks import verify
from .samples import as_text, pick, save_sheet
from .store.cache import origin

FAILED, MISUSED = 1, 2
SPLITS = ("train", "val", "test")
COLUMNS = ("task", "source", "train", "val", "test", "lengths", "classes", "MB", "seconds", "folder")
EPILOG = f"""tasks: {", ".join(TASKS)}

  python -m seqzoo.tasks prepare all --data-dir data     make or read every task whose data are there, list the others
  python -m seqzoo.tasks prepare lra_listops task.num_train=1000
  python -m seqzoo.tasks verify lra_image                hash and look at everything anew
  python -m seqzoo.tasks show lra_text -n 4 --split test
  python -m seqzoo.tasks show lra_image --out sheet.png

Overrides are those of train.py; recipe=tiny prepares what that recipe trains on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0: done; 1: data are missing or damaged; 2: the arguments ask for what does not exist; 130: interrupted. With `all`,
    a task whose data are nowhere is named and does not count.
    """
    return ends("seqzoo.tasks", lambda: _main(argv), stopped="stopped; the same command goes on")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    given = parser.parse_intermixed_args(argv)
    names = [argument for argument in given.arguments if "=" not in argument]
    every = names == ["all"]
    overrides = [argument for argument in given.arguments if "=" in argument]
    import_plugins(overrides)
    if not names:
        parser.error("name a task, or all")
    if given.command == "show" and (every or len(names) != 1):
        parser.error("show takes one task")
    if given.command != "show" and (given.n is not None or given.split or given.out):
        parser.error("-n, --split and --out belong to show")
    configs = [_config(name, overrides, given) for name in (TASKS if every else names)]
    if given.command == "prepare":
        return _prepare(configs, every)
    if given.command == "verify":
        return max([_attempt(config, every, _verify) for config in configs])
    show = partial(_show, n=given.n or 8, name=given.split or "train", out=given.out)
    return _attempt(configs[0], every, show)


def _config(name: str, overrides: list[str], given: argparse.Namespace) -> Config:
    if name not in TASKS:
        raise ConfigError(unknown("task", name, TASKS))
    recipe = ["recipe=tiny"] if name in OWN else []  # of which data know nothing; others want budgets of such a task
    config = compose([f"task={name}", *recipe, *overrides])
    config.data_dir = given.data_dir or config.data_dir
    config.cache_dir = given.cache_dir or config.cache_dir
    return config


def _attempt(config: Config, every: bool, use: Callable[[Task], int]) -> int:
    """What `use` makes of a task, or the status that stands for why there is none, which is said.

    Of all tasks, one whose data are nowhere, or that needs to be told more, is left out and no failure.
    """
    name = config.task.name
    try:
        return use(build_task(config.task, data_dir=config.data_dir, cache_dir=config.cache_dir))
    except MissingData as error:
        return _fail(f"{name} is left out: {error}" if every else str(error), 0 if every else FAILED)
    except (DataError, OSError) as error:
        failure = told(error)
        assert failure is not None
        return _fail(*failure)
    except ValueError as error:
        return _fail(f"{name} is left out: {error}" if every else f"task={name}: {error}", 0 if every else MISUSED)


def _prepare(configs: list[Config], every: bool) -> int:
    rows: list[tuple[str, ...]] = []
    start = time.perf_counter()

    def add(task: Task) -> int:
        rows.append(_row(task, time.perf_counter() - start))
        return 0

    status = 0
    for config in configs:
        start = time.perf_counter()
        status = max(status, _attempt(config, every, add))
    if rows:
        _print_table(rows)
    return status


def _row(task: Task, seconds: float) -> tuple[str, ...]:
    splits = [task.train, task.val, task.test]
    lengths = [split.lengths for split in splits]
    shortest, longest = min(int(t.min()) for t in lengths), max(int(t.max()) for t in lengths)
    mean = sum(int(t.sum()) for t in lengths) / sum(t.numel() for t in lengths)
    source, size = origin(task.folder)
    return (
        task.spec.name,
        task.note if task.note.startswith(source) else source + (f" ({task.note})" if task.note else ""),
        *(f"{len(split):,}" for split in splits),
        f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}, mean {mean:,.0f}",
        f"{task.spec.num_classes:,}",
        f"{size / 1e6:,.1f}" if size else "",
        f"{seconds:.1f}",
        str(task.folder or ""),
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=10_000)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in COLUMNS:
        text = column in ("task", "source", "folder")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table)


def _verify(task: Task) -> int:
    verdict = verify(task)
    name = task.spec.name
    print(printable_lines("\n  ".join([f"{name}:", *verdict.notes])))
    if verdict.faults:
        return _fail("\n  ".join([f"{name} is not as it should be:", *verdict.faults]), FAILED)
    return 0


def _show(task: Task, n: int, name: str, out: Path | None) -> int:
    split: Split = getattr(task, name)
    examples = pick(split, n)
    if task.spec.kind == "pixels":
        path = out or Path(f"{task.spec.name}-{name}.png")
        try:
            save_sheet(task, name, examples, path)
        except (OSError, ValueError) as error:
            return _fail(f"--out {path}: {error}", MISUSED)
        print(printable(str(path)))
        return 0
    if out is not None:
        return _fail(f"--out {out}: {task.spec.name} is text, which is printed; leave --out away", MISUSED)
    print("\n\n".join(as_text(task, split, example) for example in examples))
    return 0


def _fail(message: str, status: int) -> int:
    print(printable_lines(f"seqzoo.tasks: {message}"), file=sys.stderr)
    return status


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: valid: 1 and more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m seqzoo.tasks",
        description="Prepare the data of tasks, verify what was prepared, or look at some of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("prepare", "verify", "show"))
    parser.add_argument("arguments", nargs="+", metavar="TASK|all|key=value", help="which task, and its overrides")
    parser.add_argument("--data-dir", metavar="FOLDER", help="where published data lie; data_dir= of train.py")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="where prepared data are kept; cache_dir= of train.py")
    parser.add_argument("-n", type=_positive, metavar="EXAMPLES", help="show: how many; 8 unless given")
    parser.add_argument("--split", choices=SPLITS, help="show: train unless given")
    parser.add_argument("--out", type=Path, metavar="PNG", help="show: where the sheet of a task of pixels is written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
