"""Tasks of published pictures, read pixel by pixel from the top left; validation is held out from those of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..spec import TaskSpec
from .config import TaskConfig
from .data import Task, assemble, hold_out, split_arrays
from .store.cache import Stored, cached


class Pictures(NamedTuple):
    pixels: np.ndarray  # uint8 [N, num_pixels], or [N, num_pixels, channels]
    labels: np.ndarray  # int64 [N]


def build(
    config: TaskConfig,
    read: Callable[[], tuple[Pictures, Pictures]],
    *,
    num_pixels: int,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    source: str,
    cache_dir: Path,
) -> Task:
    """A task of pictures, one pixel a position; validation is a stratified part of training.

    Args:
        read: gives the pictures to train on and those to test on; not called where the task is in the cache.
        mean, std: of each channel, of 1.
        source: what `read` reads, for the manifest.

    Raises:
        DataError: as `read` does.
        ValueError: a key of `config` is missing, does not belong to this task, or asks for other than `num_pixels`.
    """
    settings = config.settings("val_fraction", "split_seed")
    if config.max_length != num_pixels:
        raise ValueError(
            f"task {config.name}: max_length is {config.max_length}; a picture has {num_pixels} pixels, uncut"
        )

    def prepare(work: Path) -> Stored:
        trained, tested = read()
        train, val = hold_out(trained.labels, settings["val_fraction"], settings["split_seed"])
        arrays = {
            **split_arrays("train", trained.pixels[train], trained.labels[train], np.uint8),
            **split_arrays("val", trained.pixels[val], trained.labels[val], np.uint8),
            **split_arrays("test", *tested, np.uint8),
        }
        return Stored(arrays, {}, source)

    stored = cached(cache_dir, config.name, settings, prepare)
    spec = TaskSpec(
        name=config.name,
        kind="pixels",
        vocab_size=256,
        max_length=num_pixels,
        num_classes=num_classes,
        channels=len(mean),
        mean=mean,
        std=std,
        mask_ratio=config.mask_ratio,
    )
    return assemble(spec, stored.arrays)
