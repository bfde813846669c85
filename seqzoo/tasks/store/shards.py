"""Arrays that take long to fill: files that threads fill piece by piece, and that can be completed when interrupted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from ...files import inside, replacing_by_name
from .sources import DataError

ROWS_PER_SHARD = 256


def num_shards(rows: int) -> int:
    return -(-rows // ROWS_PER_SHARD)


def array_file(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.memmap:
    """A memory-mapped `.npy` file of zeros to be written to, or the file of that name as it was left.

    Raises:
        DataError: there is no room for it on the disk, which is found out here and not hours later.
    """
    if not inside(path.parent, path.name).exists():
        with replacing_by_name(path) as partial:
            np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
            try:
                _reserve(partial)
            except OSError as error:
                raise DataError(
                    f"{path}: {int(np.prod(shape)) * np.dtype(dtype).itemsize / 1e9:.1f} GB do not fit on the disk.\n"
                    "Free some space, or set cache_dir=<path> to a folder on another disk."
                ) from error
    return np.lib.format.open_memmap(path, mode="r+")


def fill(
    write: Callable[[int, slice], object],
    arrays: Sequence[np.ndarray],
    done: np.ndarray,
    *,
    workers: int | None,
    finished: Callable[[int], object],
) -> None:
    """Call `write(shard, rows)` for every shard of `arrays` that is not done.

    Args:
        write: fills those rows of the arrays; called by several threads.
        arrays: of equal length; those that are memory-mapped are flushed before a shard counts as done.
        done: bool [num_shards], set shard by shard; what is True is left as it is.
        workers: how many threads, None for one a core.
        finished: called with the number of rows whenever some are done.
    """
    total = len(arrays[0])

    def run(shard: int) -> tuple[int, int]:
        rows = slice(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, total))
        write(shard, rows)
        return shard, rows.stop - rows.start

    pool = ThreadPoolExecutor((os.cpu_count() or 1) if workers is None else workers)
    try:
        for future in as_completed([pool.submit(run, int(shard)) for shard in np.flatnonzero(~done)]):
            shard, rows = future.result()
            for array in arrays:
                if isinstance(array, np.memmap):
                    array.flush()
            done[shard] = True
            finished(rows)
    finally:
        pool.shutdown(cancel_futures=True)


def _reserve(path: Path) -> None:
    """Take the file's whole size on the disk: a write to a mapped file that finds no room kills the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # any other error says that this kind of disk cannot reserve
