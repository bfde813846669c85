"""Which data a task is of: digests of what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from .data import Task
from .store.cache import manifest_of


class Fingerprint(NamedTuple):
    """Of a task's data; equal digests, equal data, wherever they lie."""

    sha256: str
    source: str  # in words

    def __str__(self) -> str:
        return f"{self.source} (sha256 {self.sha256[:16]})"


def fingerprint(task: Task) -> Fingerprint:
    """Of all arrays of all splits. The manifest of a cache's entry knows their digests: nothing is hashed anew.

    Raises:
        DataError: the entry is damaged.
    """
    if task.folder is not None:
        manifest = manifest_of(task.folder)
        files = {name: file["sha256"] for name, file in manifest["files"].items()}
        return Fingerprint(combined(files), manifest["source"])
    files = {}
    for name in ("train", "val", "test"):
        split = getattr(task, name)
        for part in ("values", "offsets", "labels", "targets"):
            if (tensor := getattr(split, part)) is not None:
                files[f"{name}_{part}.npy"] = _as_a_file(tensor.cpu().numpy())
    return Fingerprint(combined(files), "arrays in memory")


def digest_of_arrays(task: Task) -> str:
    """SHA-256 of the arrays' bytes, which is in the names of runs on tasks of one's own."""
    digest = hashlib.sha256()
    for split in (task.train, task.val, task.test):
        for tensor in (split.values, split.lengths, split.labels, split.targets):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def combined(files: Mapping[str, str]) -> str:
    """SHA-256 of the digests of files, by their names."""
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def _as_a_file(array: np.ndarray) -> str:
    """SHA-256 of the `.npy` file that `array` would be in a cache."""
    digest = hashlib.sha256()
    np.lib.format.write_array(SimpleNamespace(write=digest.update), array)
    return digest.hexdigest()
