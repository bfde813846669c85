"""The draws of `seqzoo.tasks.recall` as tasks: so many sequences a split, made anew from a seed, nothing stored.

Every split is a stream of its own, and a smaller split is the beginning of a larger one. All sequences have
`max_length` positions. Nothing keeps splits from sharing a sequence but how many different ones there are, which at the
lengths these tasks are for is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..spec import TaskSpec
from ..valid import physical_memory
from .config import COUNTS, TaskConfig
from .data import Task, assemble, token_dtype
from .recall import associative_recall, induction_heads, selective_copying

DRAWN_AT_ONCE = 1024  # sequences; changing it changes the data


class _Recall(NamedTuple):
    draw: Callable[..., tuple[Tensor, Tensor]]
    options: tuple[str, ...]  # that `draw` takes, as `TaskConfig` names them
    symbols: Callable[[int], list[str]]  # of `num_symbols`: what each id stands for


RECALL = {
    "associative_recall": _Recall(
        associative_recall,
        ("num_pairs", "num_queries", "num_symbols"),
        lambda n: [*(f"k{i}" for i in range(n)), *(f"v{i}" for i in range(n)), "."],
    ),
    "selective_copying": _Recall(
        selective_copying, ("num_tokens", "num_symbols"), lambda n: [*map(str, range(n)), ".", "?"]
    ),
    "induction_heads": _Recall(induction_heads, ("num_symbols",), lambda n: [*map(str, range(n)), "?"]),
}


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, drawn.

    Raises:
        ValueError: a key of `config` is missing, out of range or does not belong to this task.
    """
    recall = RECALL[config.name]
    settings = config.settings(*recall.options, *COUNTS.values(), "generator_seed")
    options = {name: settings[name] for name in recall.options}

    symbols = [*recall.symbols(options["num_symbols"]), "<mask>", "<pad>"]
    spec = TaskSpec(
        name=config.name,
        kind="tokens",
        vocab_size=len(symbols),
        max_length=config.max_length,
        num_classes=len(symbols),
        answer="positions",
        mask_id=len(symbols) - 2,
        pad_id=len(symbols) - 1,
        mask_ratio=config.mask_ratio,
    )
    dtypes = _dtypes(spec)
    needed = config.max_length * sum(settings[key] for key in COUNTS.values()) * sum(each.itemsize for each in dtypes)
    if needed > physical_memory():
        raise ValueError(
            f"num_train={settings['num_train']}: {needed / 1e9:,.0f} GB of sequences, which are kept in memory, of "
            f"{physical_memory() / 1e9:,.0f} GB here; valid: fewer or shorter ones"
        )
    arrays: dict[str, np.ndarray] = {}
    for number, (split, count) in enumerate(COUNTS.items()):
        seed = int(np.random.SeedSequence([settings["generator_seed"], number]).generate_state(1)[0])
        arrays |= _draw(recall.draw, split, settings[count], seed, spec, options)
    told = {"length": config.max_length, **options, "num_train": settings["num_train"]}
    note = ", ".join(f"{name} {value:,}" for name, value in told.items())
    return assemble(spec, arrays, note=note, symbols=symbols)


def _draw(
    draw: Callable[..., tuple[Tensor, Tensor]], split: str, n: int, seed: int, spec: TaskSpec, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays of a split, as `assemble` takes them."""
    T, generator = spec.max_length, torch.Generator().manual_seed(seed)
    values, targets = (np.empty((n, T), dtype) for dtype in _dtypes(spec))
    for start in range(0, n, DRAWN_AT_ONCE):
        tokens, answers = draw(DRAWN_AT_ONCE, length=T, generator=generator, **options)
        rows = slice(start, min(n, start + DRAWN_AT_ONCE))
        values[rows] = tokens[: rows.stop - start]
        targets[rows] = answers[: rows.stop - start]
    return {
        f"{split}_values": values.reshape(-1),
        f"{split}_targets": targets.reshape(-1),
        f"{split}_offsets": np.arange(n + 1, dtype=np.int64) * T,
        f"{split}_labels": np.zeros(n, np.int64),
    }


def _dtypes(spec: TaskSpec) -> tuple[np.dtype, np.dtype]:
    """Of values and of targets."""
    dtype = np.dtype(token_dtype(spec.vocab_size))
    return dtype, np.promote_types(dtype, np.int16)  # which holds IGNORED
