"""A folder of arrays per dataset, built once, checked when read, never half there.

An entry is `<cache_dir>/<name>-<hash>/`, where the hash covers everything that shapes the data: `.npy` files and a
`manifest.json` with what was asked for, where the data come from, facts about them, and the size and SHA-256 of each
file. It is written under another name and renamed when whole. A lock makes processes that ask at the same time build it
once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 2  # raise when what is stored, or how it is made, changes

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """What an entry holds: arrays by name, and facts that JSON can carry."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    source: str  # "generated", or the published files that were read


class _Damaged(Exception):
    """An entry that is not what was written."""


def cached(cache_dir: Path, name: str, request: Mapping[str, Any], build: Callable[[Path], Stored]) -> Stored:
    """The entry for `request`, built where there is none or where its files are damaged (which is logged).

    Args:
        request: everything that shapes the data, as JSON values.
        build: makes the arrays; runs in one process at a time. It is given a folder for work that takes long, made
            when first used: what a build that was stopped left there is there for the next, and goes when the entry is
            whole. An array that is a whole memory-mapped `.npy` file in it is not copied.

    Returns:
        The arrays memory-mapped; writing to them changes memory only, never the files.
    """
    request = {"format": FORMAT, "name": name, **request}
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
    entry = cache_dir / f"{name}-{key}"
    stored = None
    with suppress(_Damaged):
        stored = _load(entry)
    if stored is not None:
        return stored
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir / f".{entry.name}.lock"):
        try:
            stored = _load(entry)  # another process may have built it while this one waited
        except _Damaged as damage:
            log.warning("%s is damaged and will be built again: %s", entry, damage)
        if stored is None:
            work = cache_dir / f".{entry.name}.work"
            _save(entry, request, build(work), work)
            shutil.rmtree(work, ignore_errors=True)
            stored = _load(entry)
    assert stored is not None
    return stored


def _save(entry: Path, request: Mapping[str, Any], stored: Stored, work: Path) -> None:
    partial = entry.with_name(f".{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    files = {}
    for name, array in stored.arrays.items():
        path = partial / f"{name}.npy"
        _write(path, array, work)
        files[path.name] = {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "dtype": str(array.dtype),
            "shape": array.shape,
        }
    manifest = {"request": request, "source": stored.source, "facts": stored.facts, "files": files}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.rmtree(entry, ignore_errors=True)
    partial.rename(entry)


def _write(path: Path, array: np.ndarray, work: Path) -> None:
    if isinstance(array, np.memmap) and isinstance(array.filename, Path) and array.filename.parent == work:
        array.flush()
        if array.offset + array.nbytes == array.filename.stat().st_size:
            with suppress(OSError):  # of a disk that has no links
                path.hardlink_to(array.filename)
                return
    np.save(path, array)


def _load(entry: Path) -> Stored | None:
    """The entry, None where there is none; raises _Damaged where it is not what was written."""
    if not entry.is_dir():
        return None
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        arrays = {}
        for filename, expected in manifest["files"].items():
            path = entry / filename
            if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
                raise _Damaged(f"{filename} has changed since it was written")
            arrays[path.stem] = np.load(path, mmap_mode="c")
        return Stored(arrays, manifest["facts"], manifest["source"])
    except (OSError, ValueError, KeyError) as error:
        raise _Damaged(str(error)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; freed by the system should the process die."""
    import fcntl  # POSIX only, so not where the module is imported

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
