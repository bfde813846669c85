"""Sequential MNIST: which digit is on a grey picture of 28 by 28 pixels, read pixel by pixel from the top left.

The data are the 60,000 + 10,000 pictures of LeCun, Bottou, Bengio and Haffner 1998 ("Gradient-Based Learning Applied to
Document Recognition"), intensities of 256 levels. Validation is a stratified tenth of the training pictures. The model
normalises by 0.1307 and 0.3081, mean and deviation of the training pictures.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from ..spec import TaskSpec
from .cache import Stored, cached
from .config import TaskConfig
from .data import Task, assemble, hold_out, split_arrays
from .sources import DataError, given_folder

FOLDER = "mnist"
# of the files unpacked
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
ADVICE = (
    f"Put {', '.join(MD5)}, as they are or packed (.gz), into a folder {FOLDER} and set data_dir to the folder that "
    "holds it."
)
PIXELS = 28 * 28
NUM_CLASSES = 10


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before.

    Raises:
        DataError: the pictures are missing, incomplete or damaged.
        ValueError: a key of `config` is missing, does not belong to this task, or asks for other than 784 pixels.
    """
    settings = config.settings("val_fraction", "split_seed")
    if config.max_length != PIXELS:
        raise ValueError(f"task {config.name}: max_length is {config.max_length}; a picture has {PIXELS} pixels, uncut")

    def prepare(work: Path) -> Stored:
        return _prepare(given_folder(FOLDER, data_dir, ADVICE), **settings)

    stored = cached(cache_dir, config.name, settings, prepare)
    spec = TaskSpec(
        name=config.name,
        kind="pixels",
        vocab_size=256,
        max_length=PIXELS,
        num_classes=NUM_CLASSES,
        mean=(0.1307,),
        std=(0.3081,),
        mask_ratio=config.mask_ratio,
    )
    return assemble(spec, stored.arrays)


def _prepare(folder: Path, *, val_fraction: float, split_seed: int) -> Stored:
    pictures, labels = _read(folder, "train")
    test_pictures, test_labels = _read(folder, "t10k")
    train, val = hold_out(labels, val_fraction, split_seed)
    arrays = {
        **split_arrays("train", pictures[train], labels[train], np.uint8),
        **split_arrays("val", pictures[val], labels[val], np.uint8),
        **split_arrays("test", test_pictures, test_labels, np.uint8),
    }
    return Stored(arrays, {}, FOLDER)


def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, uint8 [N, 784], and labels, int64 [N]."""
    # A header says what the checked content is known to be: 4 bytes, and 4 for each dimension.
    pictures = np.frombuffer(_content(folder, f"{part}-images-idx3-ubyte"), np.uint8, offset=16)
    labels = np.frombuffer(_content(folder, f"{part}-labels-idx1-ubyte"), np.uint8, offset=8)
    return pictures.reshape(-1, PIXELS), labels.astype(np.int64)


def _content(folder: Path, filename: str) -> bytes:
    """What is in a file that may be packed; raises DataError unless it has the published MD5 sum."""
    plain, packed = folder / filename, folder / f"{filename}.gz"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise DataError(f"{plain} is missing, packed (.gz) or not.\n{ADVICE}")
    try:
        content = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.\nDelete it and fetch it again.") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != MD5[filename]:
        raise DataError(
            f"{path} is truncated or damaged: the MD5 sum of its content is {found}, that of the published file "
            f"{MD5[filename]}.\nDelete it and fetch it again."
        )
    return content
