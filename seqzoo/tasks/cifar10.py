"""CIFAR-10 as its publisher packs it for Python: five files of training pictures and one of test pictures.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; 50,000 + 10,000
pictures of 10 classes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..files import inside
from . import pictures
from .config import TaskConfig
from .data import Task
from .pictures import Pictures
from .store.sources import Archive, DataError, check_md5, provide

ARCHIVE = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
)
TRAIN_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_FILES = {"test_batch": "40351d587109b95175f43aff81a1287e"}
PIXELS = 32 * 32
NUM_CLASSES = 10


Convert = Callable[[np.ndarray], np.ndarray]


def build(
    config: TaskConfig,
    convert: Convert,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    data_dir: Path | None,
    cache_dir: Path,
) -> Task:
    """A task of the pictures, one pixel a position; validation is a stratified part of training.

    Args:
        convert: makes pixels, uint8 [N, 1024] or [N, 1024, channels], of red, green and blue planes one after another,
            uint8 [N, 3 * 1024].
        mean, std: of each channel, of 1.

    Raises:
        DataError: the pictures are missing, incomplete or damaged.
        ValueError: a key of `config` is missing, does not belong to this task, or asks for a number of pixels
            that smaller pictures of these cannot have.
    """

    def read() -> tuple[Pictures, Pictures]:
        folder = provide(ARCHIVE, data_dir, inside(cache_dir, "downloads"))
        return _read(folder, TRAIN_FILES, convert), _read(folder, TEST_FILES, convert)

    return pictures.build(
        config,
        read,
        num_pixels=PIXELS,
        num_classes=NUM_CLASSES,
        mean=mean,
        std=std,
        source=ARCHIVE.folder,
        cache_dir=cache_dir,
    )


def _read(folder: Path, files: dict[str, str], convert: Convert) -> Pictures:
    """What is in files that match their MD5 sums."""
    pixels, labels = [], []
    for filename, md5 in files.items():
        path = folder / filename
        if not path.is_file():
            raise DataError(f"{path} is missing.\nDelete {folder} and unpack {ARCHIVE.filename} again.")
        check_md5(path, md5)
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        pixels.append(convert(batch[b"data"]))
        labels.append(np.array(batch[b"labels"], dtype=np.int64))
    return Pictures(np.concatenate(pixels), np.concatenate(labels))


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in plain containers and nothing else: a pickle may otherwise run any code."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),  # as NumPy 2 writes it
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of arrays; it was not loaded")
        return super().find_class(module, name)
