"""Character language modelling on any text: at every character, which one is next.

What has to be decided for bits per character to mean something is decided thus:

- A character is a Unicode character, and the text is taken as it is, line ends and all.
- The text is split by position: the end of it is the test split, what stands before that validation, the rest training.
- A split is cut into windows of `max_length` that share one character, the last of one being the first of the next. So
  every character of a split but its first is asked for exactly once, in validation and test as in training.
- A window knows nothing of the one before it. A character is told by those before it in its window, on average half of
  `max_length`: scores at different `max_length` differ, and are a little worse than with all of the text before.
- The vocabulary are the characters seen `min_frequency` times and more in training, the most frequent first and ties by
  code point. Others are <unk>, one symbol for all of them; where the test split has any, the task says how many.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..spec import TaskSpec
from .characters import PAD, UNK, Alphabet, code_points
from .config import TaskConfig
from .data import Task, assemble, split_arrays
from .store.cache import Stored, cached
from .store.sources import DataError, MissingData


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where the same text has been built before.

    Raises:
        DataError: there is no text, it is not UTF-8, or it is too short for three splits.
        ValueError: a key of `config` is missing or does not belong to this task, or nothing is left to train on.
    """
    settings = config.settings("val_fraction", "test_fraction", "min_frequency", optional=("text",))
    if settings["val_fraction"] + settings["test_fraction"] >= 1:
        raise ValueError(
            f"task {config.name}: val_fraction {settings['val_fraction']} and test_fraction "
            f"{settings['test_fraction']} leave nothing to train on; valid: less than 1 together"
        )
    path, content = read_text(settings.pop("text"), data_dir)
    request = {"max_length": config.max_length, **settings, "sha256": hashlib.sha256(content).hexdigest()}
    stored = cached(
        cache_dir, config.name, request, lambda work: _prepare(path, content, config.max_length, **settings)
    )
    symbols, unknown = stored.facts["symbols"], stored.facts["unknown"]
    spec = TaskSpec(
        name=config.name,
        kind="tokens",
        vocab_size=len(symbols),
        max_length=config.max_length,
        num_classes=len(symbols),
        answer="next",
        pad_id=PAD,
        mask_ratio=config.mask_ratio,
    )
    note = f"{path.name}, windows of {config.max_length:,} characters"
    if unknown:
        note += f", {unknown:,} of the test split's <unk>"
    return assemble(spec, stored.arrays, note=note, symbols=symbols)


def origin(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> dict[str, Any]:
    """What the text says, in place of where it is."""
    if config.text is None:
        return {}
    return {"text": hashlib.sha256(read_text(config.text, data_dir)[1]).hexdigest()}


def read_text(text: str | None, data_dir: Path | None) -> tuple[Path, bytes]:
    """The file that `task.text` names, and what it holds.

    Raises:
        DataError: it cannot be read; MissingData where none is named or there.
    """
    if text is None:
        raise MissingData("char_lm has no text of its own; give it one: task.text=<a UTF-8 file>")
    path = (data_dir or Path()) / Path(os.path.expanduser(text))  # an absolute path stays what it is
    if not path.is_file():
        raise MissingData(f"{path} is no file; task.text takes a UTF-8 file, its path absolute or relative to data_dir")
    try:
        return path, path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _prepare(
    path: Path, content: bytes, max_length: int, *, val_fraction: float, test_fraction: float, min_frequency: int
) -> Stored:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8 ({error.reason}); "
            "convert the file to UTF-8"
        ) from error
    points = code_points(text)
    num_val, num_test = (round(share * len(points)) for share in (val_fraction, test_fraction))
    parts = dict(
        zip(
            ("train", "val", "test"),
            np.split(points, [len(points) - num_val - num_test, len(points) - num_test]),
            strict=True,
        )
    )
    if min(map(len, parts.values())) < 2:
        counts = ", ".join(f"{len(part)} for {split}" for split, part in parts.items())
        raise DataError(f"{path} has {len(points):,} characters, {counts}; a split needs 2: take a longer text")

    alphabet = Alphabet([parts["train"]], min_frequency)
    arrays: dict[str, np.ndarray] = {}
    for split, part in parts.items():
        tokens = alphabet.ids(part)
        windows = [tokens[start : start + max_length] for start in range(0, len(tokens) - 1, max_length - 1)]
        arrays |= split_arrays(split, windows, np.zeros(len(windows)), alphabet.dtype)
    unknown = int((alphabet.ids(parts["test"]) == UNK).sum())
    return Stored(arrays, {"symbols": alphabet.symbols, "unknown": unknown}, path.name)
