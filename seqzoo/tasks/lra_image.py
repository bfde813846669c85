"""Long Range Arena's Image: what is on a grey CIFAR-10 picture, read pixel by pixel from the top left.

The data are Krizhevsky's 50,000 + 10,000 pictures (2009, "Learning Multiple Layers of Features from Tiny Images") as
1,024 intensities of 256 levels, without augmentation. Grey is the ITU-R 601-2 luma in the integer arithmetic of PIL's
`convert("L")`; the model normalises by 122.6 / 255 and 61 / 255, as published. Validation is a stratified tenth of the
training pictures, where published pipelines take a random or the last tenth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import cifar10
from .config import TaskConfig
from .data import Task


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before; raises as `cifar10.build`."""
    return cifar10.build(config, grey, mean=(122.6 / 255,), std=(61 / 255,), data_dir=data_dir, cache_dir=cache_dir)


def grey(planes: np.ndarray) -> np.ndarray:
    """The luma, uint8 [N, T], of red, green and blue planes one after another, uint8 [N, 3 * T]."""
    red, green, blue = np.split(planes.astype(np.uint32), 3, axis=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
