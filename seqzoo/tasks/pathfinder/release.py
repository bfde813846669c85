"""Pathfinder images as Long Range Arena and the original generator store them.

A folder such as `curv_contour_length_14` has `imgs/<batch>/sample_<number>.png` and `metadata/<batch>.npy`. Metadata
has a row for each image, of which these columns are read: 0 its folder, 1 its name, 3 its label. The released files are
text, in spite of their name; those of the generator are NumPy arrays of strings.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..store.shards import fill
from ..store.sources import DataError

COLUMNS = 11
SPLIT_SEED = 42
PNG_DEPTH = 24  # the byte of the file that says how many bits a channel has
REPAIR = "Unpack that folder of lra_release.gz again."


class Row(NamedTuple):
    """An image as metadata names it."""

    image: str  # relative to the folder
    label: int
    where: str  # file and number of the row


def metadata_files(folder: Path) -> list[Path]:
    """The metadata files in their order, that of their numbers.

    Raises:
        DataError: there are none, or one is not named by a number.
    """
    paths = list((folder / "metadata").glob("*.npy"))
    if not paths:
        raise DataError(f"{folder / 'metadata'} holds no .npy file.\n{REPAIR}")
    if strange := [path for path in paths if not re.fullmatch("[0-9]+", path.stem)]:
        raise DataError(f"{strange[0]} is not one of the metadata files, which are named by numbers, such as 17.npy")
    return sorted(paths, key=lambda path: int(path.stem))


def read_metadata(folder: Path) -> list[Row]:
    """All rows of all metadata files.

    Raises:
        DataError: a file cannot be read, or a row is not one of metadata or names an image that was named before.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for path in metadata_files(folder):
        for number, fields in enumerate(_table(path), start=1):
            where = f"{path}, row {number}"
            if len(fields) != COLUMNS:
                raise DataError(f"{where}: {len(fields)} columns, expected {COLUMNS}.\n{REPAIR}")
            image = f"{fields[0]}/{fields[1]}"
            if not re.fullmatch(r"imgs/[0-9]+/sample_[0-9]+\.png", image):
                raise DataError(
                    f"{where}: {image[:80]!r} is no image; expected such as imgs/3/sample_17.png.\n{REPAIR}"
                )
            if fields[3] not in ("0", "1"):
                raise DataError(f"{where}: label {fields[3][:20]!r}; valid: 0, 1.\n{REPAIR}")
            if image in seen:
                raise DataError(f"{where}: {image} has been named before.\n{REPAIR}")
            seen.add(image)
            rows.append(Row(image, int(fields[3]), where))
    return rows


def split_rows(rows: list[Row], counts: dict[str, int], *, where: Path) -> dict[str, list[Row]]:
    """The rows of each split.

    Raises:
        DataError: there are not as many rows as the splits need together.
    """
    total = sum(counts.values())
    if len(rows) != total:
        raise DataError(f"{where / 'metadata'} has {len(rows):,} rows, expected {total:,}.\n{REPAIR}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    splits = {}
    start = 0
    for split, count in counts.items():
        splits[split] = [rows[i] for i in order[start : start + count]]
        start += count
    return splits


def decode(
    folder: Path,
    rows: list[Row],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    workers: int | None,
    done: np.ndarray,
    finished: Callable[[int], object],
) -> None:
    """Fill `images` (uint8 [N, size, size]) and `labels` (int64 [N]); see `seqzoo.tasks.store.shards.fill`.

    Raises:
        DataError: an image is missing, empty, damaged, of another size, or of more than 8 bits a channel.
    """

    def write(shard: int, places: slice) -> None:
        for place in range(places.start, places.stop):
            images[place] = _pixels(folder / rows[place].image, images.shape[1], rows[place].where)
            labels[place] = rows[place].label

    fill(write, (images, labels), done, workers=workers, finished=finished)


def _table(path: Path) -> list[list[str]]:
    """The fields of each row of a metadata file of either kind."""
    content = path.read_bytes()
    try:
        if not content.startswith(b"\x93NUMPY"):
            return [line.split() for line in content.decode("utf-8").splitlines()]
        table = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        if table.ndim != 2 or table.dtype.kind not in "SU":
            raise ValueError(f"expected strings [rows, {COLUMNS}], got {table.dtype} {list(table.shape)}")
        return table.astype(str).tolist()
    except Exception as error:  # NumPy's reader has many ways to stumble over a damaged header
        raise DataError(f"{path} cannot be read: {error}\n{REPAIR}") from error


def _pixels(path: Path, size: int, where: str) -> np.ndarray:
    from PIL import Image

    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing ({where}).\n{REPAIR}") from error
    if not content:
        raise DataError(f"{path} is empty ({where}).\n{REPAIR}")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            width, height = image.size
            image.verify()  # checksums, which decoding does not look at; nothing can be read from the image after it
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("L")) if (width, height) == (size, size) else None
    except Exception as error:  # a decoder has many ways to stumble over a damaged file
        raise DataError(f"{path} is damaged ({where}): {error}\n{REPAIR}") from error
    if (depth := content[PNG_DEPTH]) > 8:  # of which the decoder would clip grey and cut colours
        raise DataError(f"{path} has {depth} bits a channel, expected 8 ({where})")
    if pixels is None:
        raise DataError(f"{path} has {width} x {height} pixels, expected {size} x {size} ({where})")
    return pixels
