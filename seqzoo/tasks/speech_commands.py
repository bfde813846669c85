"""Speech Commands: which of 35 words is spoken, from the samples of a second of sound.

The data are version 0.02 of Warden 2018 ("Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition"),
105,829 recordings of at most 16,000 samples at 16 kHz, with the published validation and test lists. The samples are
raw, see `seqzoo.tasks.sound`; the model normalises them by mean and deviation of the training samples. Published
pipelines pad the one recording in ten that is shorter than a second to its end; here it is a shorter sequence.
"""

from __future__ import annotations

from pathlib import Path

from . import sound
from .config import TaskConfig
from .data import Task
from .store.sources import DataError, given_folder

FOLDER = "speech_commands_v0.02"
ADVICE = (
    f"Unpack {FOLDER}.tar.gz, 2.4 GB, which holds no folder of its own, into a folder of that name:\n"
    f"  mkdir {FOLDER} && tar -xzf {FOLDER}.tar.gz -C {FOLDER}\n"
    "and set data_dir to the folder that holds it."
)
WORDS = (
    *("backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy"),
    *("house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six"),
    *("stop", "three", "tree", "two", "up", "visual", "wow", "yes", "zero"),
)
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
NUM_RECORDINGS = 105_829
RATE = 16_000
PUBLISHED_LENGTH = 16_000


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before.

    Raises:
        DataError: the recordings or lists are missing, incomplete or damaged.
        ValueError: a key of `config` does not belong to this task.
    """
    settings = config.settings()

    def find() -> dict[str, list[Path]]:
        folder = given_folder(FOLDER, data_dir, ADVICE)
        return {split: [folder / name for name in names] for split, names in split_recordings(folder).items()}

    return sound.build(
        config,
        settings,
        find,
        lambda recording: WORDS.index(recording.parent.name),
        rate=RATE,
        num_classes=len(WORDS),
        source=FOLDER,
        note="" if config.max_length >= PUBLISHED_LENGTH else f"recordings cut to {config.max_length:,} samples",
        cache_dir=cache_dir,
    )


def split_recordings(folder: Path) -> dict[str, list[str]]:
    """Names such as "bed/004ae714_nohash_0.wav" by split, in the order of word and name.

    Raises:
        DataError: a recording or a list is missing, or a list names something else or twice the same.
    """
    names = {f"{word}/{path.name}" for word in WORDS for path in (folder / word).glob("*.wav")}
    if len(names) != NUM_RECORDINGS:
        raise DataError(
            f"{folder} holds {len(names):,} recordings of the {len(WORDS)} words, expected {NUM_RECORDINGS:,}.\n"
            f"Delete it. {ADVICE}"
        )
    splits: dict[str, list[str]] = {"train": []}
    listed: dict[str, str] = {}
    for split, filename in LISTS.items():
        path = folder / filename
        if not path.is_file():
            raise DataError(f"{path} is missing.\n{ADVICE}")
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            name = line.decode("utf-8", "backslashreplace")
            if name not in names or name in listed:
                fault = f"{name[:80]!r} is listed twice" if name in listed else f"there is no recording {name[:80]!r}"
                raise DataError(f"{path}, row {number}: {fault}")
            listed[name] = split
        splits[split] = []
    for name in sorted(names):
        splits[listed.get(name, "train")].append(name)
    for split, recordings in splits.items():
        if not recordings:
            raise DataError(f"{folder} leaves no recording for the {split} split; its lists are not the published ones")
    return splits
