"""Long Range Arena's Pathfinder, Path-X and Path-X-256: are two marked tips the ends of one dashed contour?

Grey images of 32, 128 and 256 pixels a side, read pixel by pixel from the top left. The benchmark's own images are used
where its folder `pathfinder<size>/curv_contour_length_14` is found and nothing else is asked for; otherwise images are
generated, as `seqzoo.tasks.pathfinder.generator` says, and so are smaller ones, for what trains on a CPU. The
benchmark's are split as published pipelines do: a random permutation of seed 42 of all rows, in the order of their
metadata, of which 80 % are for training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..spec import TaskSpec
from .config import COUNTS, TaskConfig
from .data import Task, assemble
from .pathfinder.parameters import SMALLER_SIZES, parameters_of
from .pathfinder.release import decode, metadata_files, read_metadata, split_rows
from .store.cache import Stored, cached
from .store.release import released_folder
from .store.shards import ROWS_PER_SHARD, array_file, num_shards

SIZES = {"lra_pathfinder": 32, "lra_pathx": 128, "lra_pathx256": 256}
PUBLISHED = {
    "difficulty": "curv_contour_length_14",
    "num_train": 160_000,
    "num_val": 20_000,
    "num_test": 20_000,
    "generator_seed": 0,  # of images that are generated: another asks for others than the released ones
}

Filler = Callable[..., None]  # see `generate`, from `images` on


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before.

    Raises:
        DataError: the released folder is incomplete or damaged, or the images do not fit on the disk.
        ValueError: a key of `config` is missing, does not belong to this task, or asks for another number of pixels.
    """
    settings = config.settings("difficulty", *COUNTS.values(), "generator_seed", optional=("workers",))
    workers = settings.pop("workers")
    size = _size(config)
    parameters = parameters_of(size, settings["difficulty"])
    counts = {split: settings[name] for split, name in COUNTS.items()}
    changed = _changed(config)
    folder = _released(config, data_dir, cache_dir)
    request: dict[str, Any] = dict(settings)
    if size != SIZES[config.name]:
        request["size"] = size
    if folder is not None:
        request["released"] = _fingerprint(folder)

    def prepare(work: Path) -> Stored:
        fillers: dict[str, Filler]
        if folder is not None:
            rows = split_rows(read_metadata(folder), counts, where=folder)
            fillers = {split: partial(decode, folder, rows[split]) for split in COUNTS}
        else:
            from .pathfinder.generator import generate

            seed = settings["generator_seed"]
            fillers = {split: partial(generate, parameters, seed=(seed, i)) for i, split in enumerate(COUNTS)}
        arrays = _fill(work, fillers, counts, size, workers, "generating" if folder is None else "reading")
        return Stored(arrays, {}, "generated" if folder is None else f"lra_release/{_name(config)}")

    notes = ["generated"] if folder is None else []
    notes += [f"images of {size} x {size}"] if "size" in request else []
    notes += [f"{name} {value:,}" if isinstance(value, int) else str(value) for name, value in changed.items()]
    spec = TaskSpec(
        name=config.name,
        kind="pixels",
        vocab_size=256,
        max_length=size * size,
        num_classes=2,
        mean=(0.5,),
        std=(0.5,),
        mask_ratio=config.mask_ratio,
    )
    stored = cached(cache_dir, config.name, request, prepare)
    return assemble(spec, stored.arrays, note=", ".join(notes))


def origin(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> dict[str, Any]:
    """Names and bytes of the benchmark's own metadata where they are what is read; generated images are the default."""
    folder = _released(config, data_dir, cache_dir)
    return {} if folder is None else {"origin": {path.name: path.stat().st_size for path in metadata_files(folder)}}


def answer(values: np.ndarray, spec: TaskSpec, request: Mapping[str, Any]) -> int | None:
    """Whether a tracer finds the marked tips connected; it is mistaken about 1 in 100 images of 32 pixels a side."""
    from .pathfinder.tracer import connected

    size = math.isqrt(spec.max_length)
    return int(connected(values.reshape(1, size, size), parameters_of(size, request["difficulty"]))[0])


def _fill(
    work: Path, fillers: dict[str, Filler], counts: dict[str, int], size: int, workers: int | None, verb: str
) -> dict[str, np.ndarray]:
    """The arrays of all splits, in files in `work`: what is there already is left as it is."""
    from rich.console import Console
    from rich.progress import Progress

    arrays: dict[str, np.ndarray] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"{verb} {size} x {size} images", total=sum(counts.values()))
        for split, count in counts.items():
            values = array_file(work / f"{split}_values.npy", (count * size * size,), np.uint8)
            labels = array_file(work / f"{split}_labels.npy", (count,), np.int64)
            done = array_file(work / f"{split}_done.npy", (num_shards(count),), np.bool_)
            progress.advance(bar, min(count, int(done.sum()) * ROWS_PER_SHARD))
            fillers[split](
                values.reshape(count, size, size),
                labels,
                done=done,
                workers=workers,
                finished=lambda images: progress.advance(bar, images),
            )
            arrays[f"{split}_values"], arrays[f"{split}_labels"] = values, labels
            arrays[f"{split}_offsets"] = np.arange(count + 1, dtype=np.int64) * size * size
    return arrays


def _size(config: TaskConfig) -> int:
    """Pixels a side.

    Raises:
        ValueError: `config` asks for a number of pixels that no image of the task has.
    """
    own = SIZES[config.name]
    sides = (own, *SMALLER_SIZES) if config.name == "lra_pathfinder" else (own,)
    for side in sides:
        if config.max_length == side * side:
            return side
    smaller = ", ".join(str(side * side) for side in sides[1:])
    raise ValueError(
        f"task {config.name}: max_length is {config.max_length}; an image has {own * own} pixels, uncut"
        + (f"; valid: {own * own}, or {smaller} for smaller images" if smaller else "")
    )


def _changed(config: TaskConfig) -> dict[str, Any]:
    """What is asked for that the benchmark has otherwise."""
    return {name: getattr(config, name) for name, published in PUBLISHED.items() if getattr(config, name) != published}


def _released(config: TaskConfig, data_dir: Path | None, cache_dir: Path) -> Path | None:
    """The benchmark's own folder, where it is found and nothing else is asked for."""
    if _changed(config) or config.max_length != SIZES[config.name] ** 2:
        return None
    return released_folder(_name(config), data_dir, cache_dir)


def _name(config: TaskConfig) -> str:
    return f"pathfinder{SIZES[config.name]}/{config.difficulty}"


def _fingerprint(folder: Path) -> str:
    """Changes when a metadata file does; images are too many to look at each time."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in metadata_files(folder)]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
