"""Long Range Arena's Image: what is on a grey CIFAR-10 picture, read pixel by pixel from the top left.

The data are Krizhevsky's 50,000 + 10,000 pictures (2009, "Learning Multiple Layers of Features from Tiny Images") as
1,024 intensities of 256 levels, without augmentation. Grey is the ITU-R 601-2 luma in the integer arithmetic of PIL's
`convert("L")`; the model normalises by 122.6 / 255 and 61 / 255, as published. Validation is a stratified tenth of the
training pictures, where published pipelines take a random or the last tenth.
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
        return prepare(provide(ARCHIVE, data_dir, cache_dir / "downloads"), grey, **settings)

    stored = cached(cache_dir, config.name, settings, read)
    spec = TaskSpec(
        name=config.name,
        kind="pixels",
        vocab_size=256,
        max_length=PIXELS,
        num_classes=NUM_CLASSES,
        mean=(122.6 / 255,),
        std=(61 / 255,),
        mask_ratio=config.mask_ratio,
    )
    return assemble(spec, stored.arrays)


def grey(planes: np.ndarray) -> np.ndarray:
    """The luma, uint8 [N, T], of red, green and blue planes one after another, uint8 [N, 3 * T]."""
    red, green, blue = np.split(planes.astype(np.uint32), 3, axis=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
