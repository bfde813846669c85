"""Sequential CIFAR-10: what is on a colour picture, read pixel by pixel from the top left.

The pictures and splits of Long Range Arena's Image, with red, green and blue as three channels of each of the 1,024
positions, without augmentation. The model normalises by the channels' published means and deviations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import cifar10
from .config import TaskConfig
from .data import Task


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before; raises as `cifar10.build`."""
    return cifar10.build(
        config,
        colours,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.243, 0.261),
        data_dir=data_dir,
        cache_dir=cache_dir,
    )


def colours(planes: np.ndarray) -> np.ndarray:
    """Pixels, uint8 [N, T, 3], of red, green and blue planes one after another, uint8 [N, 3 * T]."""
    from einops import rearrange

    return rearrange(planes, "n (channel pixel) -> n pixel channel", channel=3)
