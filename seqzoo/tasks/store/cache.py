"""A folder of arrays per dataset, built once, checked when read, never half there.

An entry is `<cache_dir>/<name>-<hash>/`, where the hash covers everything that shapes the data: `.npy` files and a
`manifest.json` with what was asked for, where the data come from, facts about them, the examples in each split, the
project's version, the size and SHA-256 of each file, and a SHA-256 of all that. It is written under another name and
renamed when whole. A lock makes processes that ask at the same time build it once; reading takes none, so a folder that
cannot be written serves what it holds.

Hashing gigabytes takes longer than a short run, so opening hashes a file only where its size or its date is not the one
the manifest gives. Files are dated a minute back when they are made: a later write shows, however soon it comes. A file
that was copied without its date is hashed once and dated again. What changes bytes and leaves the date, such as a
failing disk, is seen by `check`, which always hashes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ...files import LinkError, flush, without_links, write_text
from ...files import lock as lock_file
from ...messages import printable, say_once
from ...records import is_name, read_json
from ...version import __version__
from .sources import DataError, unwritable

FORMAT = 3  # raise when what is stored, or how it is made, changes
FULL = (errno.ENOSPC, errno.EDQUOT, None)  # None: NumPy's own, of a file that was written in part
DATED_BACK = 60  # seconds: more than the coarsest clock of a file system

log = logging.getLogger(__name__)
_filled: ContextVar[Path | None] = ContextVar("_filled", default=None)


class Stored(NamedTuple):
    """What an entry holds: arrays by name, and facts that JSON can carry."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    source: str  # "generated", or the published files that were read


class _Damaged(Exception):
    """An entry that is not what was written."""


def default_folder() -> Path:
    """Where tokenised and generated data are kept unless a folder is named: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqzoo"


@contextmanager
def reading(folder: Path | None) -> Iterator[None]:
    """Inside it, what another cache folder holds serves too; nothing is written there."""
    token = _filled.set(folder)
    try:
        yield
    finally:
        _filled.reset(token)


def places(cache_dir: Path) -> list[Path]:
    """The folders to look in for what `cache_dir` may hold."""
    filled = _filled.get()
    return [cache_dir] if filled is None else [cache_dir, filled]


def cached(cache_dir: Path, name: str, request: Mapping[str, Any], build: Callable[[Path], Stored]) -> Stored:
    """The entry for `request`, built where there is none or where its files are damaged (which is logged).

    Args:
        request: everything that shapes the data, as JSON values.
        build: makes the arrays; runs in one process at a time. It is given a folder for work that takes long, made
            when first used: what a build that was stopped left there is there for the next, and goes when the entry is
            whole. An array that is a whole `.npy` file in it, memory-mapped, becomes the entry's without being copied.

    Returns:
        The arrays memory-mapped; writing to them changes memory only, never the files.

    Raises:
        DataError: there is no such entry, and `cache_dir` cannot be written or has no room for it.
    """
    asked: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "name": name, **request}))
    key = hashlib.sha256(_canonical(asked)).hexdigest()[:16]
    entry = cache_dir / f"{name}-{key}"
    for place in places(cache_dir):
        with suppress(_Damaged):
            if stored := _load(place / entry.name, asked, dating=place == cache_dir):
                return stored
    stored = None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        held = lock(cache_dir / f".{entry.name}.lock")
    except OSError as error:
        raise unwritable(cache_dir, error) from error
    with held:
        try:
            stored = _load(entry, asked)  # another process may have built it while this one waited
        except _Damaged as damage:
            log.warning("%s is damaged and will be built again: %s", entry, printable(str(damage)))
        if stored is None:
            say_once(f"preparing {name}, which {cache_dir} does not hold yet")
            work = cache_dir / f".{entry.name}.work"
            _save(entry, asked, _build(build, work), work)
            shutil.rmtree(work, ignore_errors=True)
            stored = _load(entry, asked)
    assert stored is not None
    return stored


def manifest_of(entry: Path) -> dict[str, Any]:
    """The manifest of an entry.

    Raises:
        DataError: it is missing or not as it was written.
    """
    try:
        return _manifest(entry)
    except _Damaged as damage:
        raise _broken(entry, damage) from damage


def origin(entry: Path | None) -> tuple[str, int]:
    """Where a task's data come from, in words, and the bytes they take in its entry; None is a task that has none.

    Raises:
        DataError: as `manifest_of` does.
    """
    if entry is None:
        return "made on the fly", 0
    manifest = manifest_of(entry)
    return manifest["source"], sum(file["bytes"] for file in manifest["files"].values())


def check(entry: Path) -> dict[str, Any]:
    """Hash every file of an entry, whatever its date, and return the manifest.

    Raises:
        DataError: a file is missing or not as it was written.
    """
    manifest = manifest_of(entry)
    for filename, expected in manifest["files"].items():
        try:
            _check_bytes(entry / filename, expected)
        except _Damaged as damage:
            raise _broken(entry, damage) from damage
    return manifest


def lock(path: Path) -> IO[bytes]:
    """An open file that one process has at a time, until it closes it or dies."""
    return lock_file(path, lambda: log.warning("waiting for another process, which has %s", path))


def _build(build: Callable[[Path], Stored], work: Path) -> Stored:
    try:
        return build(without_links(work))
    except OSError as error:
        if error.errno in FULL or isinstance(error, LinkError):
            raise unwritable(work.parent, error) from error
        raise


def _save(entry: Path, request: dict[str, Any], stored: Stored, work: Path) -> None:
    partial = entry.with_name(f".{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    date = int(time.time()) - DATED_BACK
    try:
        partial.mkdir()
        files = {}
        for name, array in stored.arrays.items():
            path = partial / f"{name}.npy"
            _write(path, array, work)
            os.utime(path, (date, date))
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
                "dtype": str(array.dtype),
                "shape": array.shape,
            }
        manifest = {
            "version": __version__,
            "request": request,
            "source": stored.source,
            "examples": {
                name.removesuffix("_labels"): len(array)
                for name, array in stored.arrays.items()
                if name.endswith("_labels")
            },
            "facts": stored.facts,
            "dated": date,
            "files": files,
        }
        manifest["sha256"] = hashlib.sha256(_canonical(manifest)).hexdigest()
        write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(entry, ignore_errors=True)
        partial.rename(entry)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            needed = sum(array.nbytes for array in stored.arrays.values())
            raise unwritable(entry.parent, error, needed=needed) from error
        raise


def _write(path: Path, array: np.ndarray, work: Path) -> None:
    if (made := _made_in(work, array)) is not None:
        with suppress(OSError):  # a file system without hard links
            os.link(made, path)  # stays in `work` too, should this process be killed before the entry is whole
            return
    with path.open("xb") as file:
        np.save(file, array)
        flush(file)


def _made_in(work: Path, array: np.ndarray) -> Path | None:
    """The file in `work` that holds `array` and nothing else, if it is the whole of one."""
    if not isinstance(array, np.memmap) or array.mode == "c" or array.filename is None:
        return None
    made = Path(array.filename)
    if made.parent.resolve() != work.resolve() or made.suffix != ".npy" or not array.flags.c_contiguous:
        return None
    array.flush()
    whole = np.load(made, mmap_mode="r")
    return made if (whole.shape, whole.dtype) == (array.shape, array.dtype) else None


def _load(entry: Path, request: dict[str, Any], *, dating: bool = True) -> Stored | None:
    """The entry, None where there is none; raises _Damaged where it is not what was written.

    Its files are dated as the manifest says where they are not, so that they are not hashed again, unless not `dating`.
    """
    if not entry.is_dir():
        return None
    manifest = _manifest(entry)
    if manifest["request"] != request:
        raise _Damaged("it was made for another request")
    date = manifest["dated"]
    arrays = {}
    for filename, expected in manifest["files"].items():
        path = entry / filename
        try:
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (expected["bytes"], date * 10**9):
                _check_bytes(path, expected)
                with suppress(OSError):  # of a folder that cannot be written
                    if dating:
                        os.utime(path, (date, date), follow_symlinks=False)
            arrays[path.stem] = np.load(path, mmap_mode="c")
        except (OSError, ValueError) as error:
            raise _Damaged(str(error)) from error
    return Stored(arrays, manifest["facts"], manifest["source"])


def _manifest(entry: Path) -> dict[str, Any]:
    try:
        manifest = read_json(entry / "manifest.json")
    except (OSError, ValueError) as error:
        raise _Damaged(f"manifest.json: {error}") from error
    written = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
    if written is None or written != hashlib.sha256(_canonical(manifest)).hexdigest():
        raise _Damaged("manifest.json has changed since it was written")
    if not all(map(is_name, manifest["files"])):
        raise _Damaged("manifest.json names files elsewhere")
    return manifest


def _check_bytes(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise _Damaged(f"{path.name} has changed since it was written")
    except OSError as error:
        raise _Damaged(str(error)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(entry: Path, damage: _Damaged) -> DataError:
    return DataError(f"{entry} is damaged: {damage}.\nDelete this folder: it is built again when next asked for.")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
