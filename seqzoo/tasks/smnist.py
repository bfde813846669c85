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

from . import pictures
from .config import TaskConfig
from .data import Task
from .pictures import Pictures
from .store.sources import DataError, given_folder

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
        ValueError: a key of `config` is missing, does not belong to this task, or asks for a number of pixels
            that smaller pictures of these cannot have.
    """

    def read() -> tuple[Pictures, Pictures]:
        folder = given_folder(FOLDER, data_dir, ADVICE)
        return _read(folder, "train"), _read(folder, "t10k")

    return pictures.build(
        config,
        read,
        num_pixels=PIXELS,
        num_classes=NUM_CLASSES,
        mean=(0.1307,),
        std=(0.3081,),
        source=FOLDER,
        cache_dir=cache_dir,
    )


def _read(folder: Path, part: str) -> Pictures:
    # A header says what the checked content is known to be: 4 bytes, and 4 for each dimension.
    pixels = np.frombuffer(_content(folder, f"{part}-images-idx3-ubyte"), np.uint8, offset=16)
    labels = np.frombuffer(_content(folder, f"{part}-labels-idx1-ubyte"), np.uint8, offset=8)
    return Pictures(pixels.reshape(-1, PIXELS), labels.astype(np.int64))


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
