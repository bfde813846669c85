"""Recordings as sequences of samples: 16-bit WAV files of one channel, exact, one sample a position.

Samples stay the int16 they were recorded as, 65,536 levels of either sign. A recording shorter than the longest is a
shorter sequence, with no silence added.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..spec import TaskSpec
from .config import TaskConfig
from .data import Task, assemble
from .store.cache import Stored, cached
from .store.sources import DataError

LEVELS = 2**16


def build(
    config: TaskConfig,
    settings: Mapping[str, Any],
    find: Callable[[], Mapping[str, Sequence[Path]]],
    label: Callable[[Path], int],
    *,
    rate: int,
    num_classes: int,
    source: str,
    note: str = "",
    cache_dir: Path,
) -> Task:
    """A task of recordings, normalised by mean and deviation of the training samples.

    Args:
        settings: what `find` depends on; part of the request.
        find: gives the recordings of each split; not called where the task is in the cache.
        label: the class of a recording, by its path.
        rate: samples a second.
        source: what `find` finds, for the manifest.

    Raises:
        DataError: as `find` and `read_recordings` do.
    """

    def prepare(work: Path) -> Stored:
        arrays: dict[str, np.ndarray] = {}
        for split, paths in find().items():
            values, offsets = read_recordings(paths, rate=rate, max_length=config.max_length)
            labels = np.array([label(path) for path in paths], np.int64)
            arrays |= {f"{split}_values": values, f"{split}_offsets": offsets, f"{split}_labels": labels}
        mean, std = mean_and_std(arrays["train_values"])
        return Stored(arrays, {"mean": mean, "std": std}, source)

    stored = cached(cache_dir, config.name, {"max_length": config.max_length, **settings}, prepare)
    spec = TaskSpec(
        name=config.name,
        kind="pixels",
        vocab_size=LEVELS,
        max_length=config.max_length,
        num_classes=num_classes,
        mean=(stored.facts["mean"],),
        std=(stored.facts["std"],),
        mask_ratio=config.mask_ratio,
    )
    return assemble(spec, stored.arrays, note=note)


def read_recordings(paths: Sequence[Path], *, rate: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples of all recordings one after another, int16, and where each begins, int64 [N + 1].

    Args:
        rate: samples a second that every file must have.
        max_length: in samples; longer recordings are cut.

    Raises:
        DataError: a file is damaged, empty, or not of one channel, 16 bits and `rate`.
    """
    from rich.console import Console
    from rich.progress import track

    samples = np.empty(len(paths) * max_length, np.int16)  # what is not filled takes no memory
    offsets = np.zeros(len(paths) + 1, np.int64)
    for i, path in enumerate(track(paths, "reading recordings", console=Console(stderr=True), transient=True)):
        recording = read_wav(path, rate)[:max_length]
        offsets[i + 1] = offsets[i] + len(recording)
        samples[offsets[i] : offsets[i + 1]] = recording
    return samples[: offsets[-1]], offsets


def read_wav(path: Path, rate: int) -> np.ndarray:
    """The samples of a file, int16 [T]; raises DataError as `read_recordings` does."""
    try:
        with wave.open(io.BytesIO(path.read_bytes())) as file:
            form = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
            expected = file.getnframes()
            samples = file.readframes(expected)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (wave.Error, EOFError, RuntimeError) as error:  # the last where one part of a file reaches beyond another
        raise DataError(f"{path} is no WAV file or is damaged: {error or 'it ends too early'}") from error
    if form != (1, 16, rate):
        raise DataError(f"{path}: {form[0]} channels, {form[1]} bits, {form[2]} Hz; expected 1, 16 and {rate}")
    if len(samples) != 2 * expected:
        raise DataError(f"{path} is cut short: {len(samples) // 2} samples of {expected}")
    if expected == 0:
        raise DataError(f"{path} holds no samples")
    return np.frombuffer(samples, np.int16)


def mean_and_std(samples: np.ndarray) -> tuple[float, float]:
    """Of samples over `LEVELS - 1`, as `TaskSpec` wants them; a deviation of 0 is given as 1."""
    total = squares = 0
    for start in range(0, len(samples), 1 << 22):
        part = samples[start : start + (1 << 22)].astype(np.int64)
        total += int(part.sum())
        squares += int(np.square(part).sum())
    N = len(samples)
    std = (N * squares - total**2) ** 0.5 / N  # of whole numbers, so that nothing cancels
    return total / N / (LEVELS - 1), std / (LEVELS - 1) or 1.0
