"""Long Range Arena's ListOps: what a nested expression of MIN, MAX, MED and SM over digits is worth.

The rows are generated here, with the published grammar, lengths and counts, unless the benchmark's own files
(`basic_train.tsv`, `basic_val.tsv`, `basic_test.tsv`) are under `data_dir` and nothing else is asked for. All rows are
distinct, so the splits share none. Brackets stay and parentheses go; the vocabulary and its order are fixed, digits in
their own order, and each expression is closed by <eos>.

Labels are not uniform: 0 and 9 are about twice as frequent as the others, and a constant answer scores 17.5 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..spec import TaskSpec
from .config import COUNTS, TaskConfig
from .data import Task, assemble, split_arrays
from .listops.grammar import EOS, MASK, PAD, SYMBOLS, Grammar, evaluate, tokenise
from .store.cache import Stored, cached
from .store.release import released_folder
from .store.sources import DataError

FOLDER = "listops-1000"
FILES = {"train": "basic_train.tsv", "val": "basic_val.tsv", "test": "basic_test.tsv"}
GRAMMAR = ("max_depth", "max_args", "min_length", "length_bound")
PUBLISHED = {
    "max_depth": 10,
    "max_args": 10,
    "min_length": 500,
    "length_bound": 2000,
    "num_train": 96_000,
    "num_val": 2_000,
    "num_test": 2_000,
    "generator_seed": 0,  # of rows that are generated: another asks for others than the released ones
}


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before.

    Raises:
        DataError: a released file is missing, incomplete or damaged.
        ValueError: a key of `config` is missing or does not belong to this task, or too few such expressions exist.
    """
    settings = config.settings(*GRAMMAR, *COUNTS.values(), "generator_seed", optional=("workers",))
    workers = settings.pop("workers")
    grammar = Grammar(**{name: settings[name] for name in GRAMMAR})
    counts = {split: settings[name] for split, name in COUNTS.items()}
    changed = _changed(config)
    released = _released(config, data_dir, cache_dir)
    request: dict[str, Any] = {"max_length": config.max_length, **settings}
    if released is not None:
        stats = {split: path.stat() for split, path in released.items()}
        request["released"] = {split: [stat.st_size, stat.st_mtime_ns] for split, stat in stats.items()}

    def prepare(work: Path) -> Stored:
        if released is not None:
            rows = {split: _read(path, counts[split]) for split, path in released.items()}
        else:
            rows = _generate(grammar, counts, settings["generator_seed"], workers)
        arrays: dict[str, np.ndarray] = {}
        for split, (expressions, labels) in rows.items():
            arrays |= split_arrays(split, (_close(e, config.max_length) for e in expressions), labels, np.uint8)
        return Stored(arrays, {}, "generated" if released is None else f"lra_release/{FOLDER}")

    notes = [f"{name} {value:,}" for name, value in changed.items()]
    if released is None and not changed:
        notes.append("generated")
    if config.max_length < grammar.length_bound:
        notes.append(f"expressions cut to {config.max_length:,} symbols")
    spec = TaskSpec(
        name=config.name,
        kind="tokens",
        vocab_size=len(SYMBOLS),
        max_length=config.max_length,
        num_classes=10,
        pad_id=PAD,
        mask_id=MASK,
        mask_ratio=config.mask_ratio,
    )
    stored = cached(cache_dir, config.name, request, prepare)
    return assemble(spec, stored.arrays, note=", ".join(notes), symbols=SYMBOLS)


def origin(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> dict[str, Any]:
    """Names and bytes of the benchmark's own files where they are what is read; generated rows are the default."""
    released = _released(config, data_dir, cache_dir)
    return {} if released is None else {"origin": {path.name: path.stat().st_size for path in released.values()}}


def answer(tokens: np.ndarray, spec: TaskSpec, request: Mapping[str, Any]) -> int | None:
    """What an expression is worth, as ids with <eos>; None where it may have been cut.

    Raises:
        ValueError: it is not a well-formed expression.
    """
    return evaluate(tokens[:-1]) if len(tokens) < spec.max_length else None


def _close(expression: np.ndarray, max_length: int) -> np.ndarray:
    return np.append(expression[: max_length - 1], np.uint8(EOS))


def _generate(
    grammar: Grammar, counts: dict[str, int], seed: int, workers: int | None
) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    from rich.console import Console
    from rich.progress import Progress

    from .listops.generator import generate

    total = sum(counts.values())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("generating ListOps", total=total)
        rows, labels = generate(
            grammar, total, seed=seed, workers=workers, advance=lambda rows: progress.advance(bar, rows)
        )
    splits = {}
    start = 0
    for split, count in counts.items():
        splits[split] = rows[start : start + count], labels[start : start + count]
        start += count
    return splits


def _changed(config: TaskConfig) -> dict[str, Any]:
    """What is asked for that the benchmark has otherwise."""
    return {name: getattr(config, name) for name, published in PUBLISHED.items() if getattr(config, name) != published}


def _released(config: TaskConfig, data_dir: Path | None, cache_dir: Path) -> dict[str, Path] | None:
    """The benchmark's own files, where their folder is found and nothing else is asked for."""
    if _changed(config):
        return None
    folder = released_folder(FOLDER, data_dir, cache_dir)
    if folder is None:
        return None
    paths = {split: folder / filename for split, filename in FILES.items()}
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{path} is missing.\nPut it there; without the folder, rows are generated.")
    return paths


def _read(path: Path, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The expressions and labels of a tab-separated file with the header `Source<TAB>Target`."""
    expressions, labels = [], []
    with path.open("rb") as file:
        header = file.readline().rstrip(b"\r\n")
        if header != b"Source\tTarget":
            raise DataError(f"{path}: the header is {header[:80]!r}, expected 'Source<TAB>Target'")
        for number, line in enumerate(file, start=2):
            where = f"{path}, row {number}"
            expression, _, label = line.rstrip(b"\r\n").partition(b"\t")
            try:
                tokens = tokenise(expression.decode("ascii"))
            except ValueError as error:  # a byte that is no ASCII is one too
                raise DataError(f"{where}: {error}") from error
            if len(tokens) == 0 or len(label) != 1 or not label.isdigit():
                raise DataError(f"{where}: expected an expression, a tab and a digit, got {line[-20:]!r}")
            expressions.append(tokens)
            labels.append(int(label))
    if len(labels) != count:
        raise DataError(f"{path} holds {len(labels):,} rows, expected {count:,}; it was cut short, fetch it again")
    return expressions, np.array(labels, dtype=np.int64)
