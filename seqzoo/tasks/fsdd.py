"""Free Spoken Digit Dataset: which digit is spoken, from samples at 8 kHz; small, and free to have.

The data are `recordings/<digit>_<speaker>_<take>.wav` (github.com/Jakobovski/free-spoken-digit-dataset): six speakers,
50 takes of each digit in the current version. Takes 0 to 4 are the test split, as its authors say, so that every
speaker is heard in training. Validation is a tenth of the others, stratified by digit. The samples are raw, see
`seqzoo.tasks.sound`; the model normalises them by mean and deviation of the training samples.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from . import sound
from .config import TaskConfig
from .data import Task, hold_out
from .identity import combined
from .store.sources import DataError, MissingData, given_folder, sha256_of

FOLDER = "fsdd"
ADVICE = f"Put its folder recordings into a folder {FOLDER} and set data_dir to the folder that holds it."
RATE = 8_000
TEST_TAKES = range(5)
NUM_CLASSES = 10
LONGEST = 8_192  # samples, to which a few recordings are cut unless more is asked for


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before from the same recordings.

    Raises:
        DataError: the recordings are missing, incomplete or damaged.
        ValueError: a key of `config` is missing or does not belong to this task.
    """
    settings = config.settings("val_fraction", "split_seed")
    recordings = given_folder(FOLDER, data_dir, ADVICE) / "recordings"

    def find() -> dict[str, list[Path]]:
        trained, tested = find_recordings(recordings)
        digits = np.array([_digit(path) for path in trained], np.int64)
        train, val = hold_out(digits, settings["val_fraction"], settings["split_seed"])
        return {"train": [trained[i] for i in train], "val": [trained[i] for i in val], "test": tested}

    return sound.build(
        config,
        {**settings, **_digest(recordings)},
        find,
        _digit,
        rate=RATE,
        num_classes=NUM_CLASSES,
        source=FOLDER,
        note="" if config.max_length == LONGEST else f"recordings cut to {config.max_length:,} samples",
        cache_dir=cache_dir,
    )


def origin(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> dict[str, Any]:
    """What the recordings are, of which every version has more; nothing where there are none."""
    try:
        return {"origin": _digest(given_folder(FOLDER, data_dir, ADVICE) / "recordings")}
    except MissingData:
        return {}


def _digest(recordings: Path) -> dict[str, str]:
    """SHA-256 of the names and contents of all files."""
    return {"recordings": combined({path.name: sha256_of(path) for path in recordings.glob("*.wav")})}


def _digit(recording: Path) -> int:
    """What is spoken in a file that is named as the published ones."""
    return int(recording.name[0])


def find_recordings(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files to train on and to test on, in the order of digit, speaker and take.

    Raises:
        DataError: a file is named otherwise, or a speaker's takes 0 to 4 of a digit, or all others, are missing.
    """
    takes: dict[tuple[int, str], dict[int, Path]] = {}
    for path in sorted(folder.glob("*.wav")):
        match = re.fullmatch(r"(\d)_([^_]+)_(0|[1-9]\d*)\.wav", path.name, re.ASCII)
        if match is None:
            raise DataError(f"{path} is not named <digit>_<speaker>_<take>.wav")
        takes.setdefault((int(match[1]), match[2]), {})[int(match[3])] = path
    speakers = sorted({speaker for _, speaker in takes})
    if not speakers:
        raise DataError(f"{folder} holds no recordings.\n{ADVICE}")
    trained: list[Path] = []
    tested: list[Path] = []
    for digit in range(NUM_CLASSES):
        for speaker in speakers:
            found = takes.get((digit, speaker), {})
            if not set(TEST_TAKES) < set(found):
                raise DataError(
                    f"{folder} holds takes {sorted(found)} of {digit} by {speaker}; expected 0 to 4 and others"
                )
            for take in sorted(found):
                (tested if take in TEST_TAKES else trained).append(found[take])
    return trained, tested
