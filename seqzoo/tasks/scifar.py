"""Sequential CIFAR-10: what is on a colour picture, read pixel by pixel from the top left.

The pictures and splits of Long Range Arena's Image, with red, green and blue as three channels of each of the 1,024
positions, without augmentation. The model normalises by the channels' published means and deviations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..spec import TaskSpec
from .cache import Stored, cached
from .cifar10 import ARCHIVE, NUM_CLASSES, PIXELS, prepare
from .config import TaskConfig
from .data import Task, assemble
from .sources import provide


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before.

    Raises:
        DataError: the pictures are missing, incomplete or damaged.
        ValueError: a key of `config` is missing, does not belong to this task, or asks for other than 1,024 pixels.
    """
    settings = config.settings("val_fraction", "split_seed")
    if config.max_length != PIXELS:
        raise ValueError(f"task {config.name}: max_length is {config.max_length}; a picture has {PIXELS} pixels, uncut")

    def read(work: Path) -> Stored:
        return prepare(provide(ARCHIVE, data_dir, cache_dir / "downloads"), colours, **settings)

    stored = cached(cache_dir, config.name, settings, read)
    spec = TaskSpec(
        name=config.name,
        kind="pixels",
        vocab_size=256,
        max_length=PIXELS,
        num_classes=NUM_CLASSES,
        channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.243, 0.261),
        mask_ratio=config.mask_ratio,
    )
    return assemble(spec, stored.arrays)


def colours(planes: np.ndarray) -> np.ndarray:
    """Pixels, uint8 [N, T, 3], of red, green and blue planes one after another, uint8 [N, 3 * T]."""
    return planes.reshape(len(planes), 3, -1).transpose(0, 2, 1)
