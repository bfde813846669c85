"""Long Range Arena's Text: is a film review positive, read character by character.

The data are the 25,000 + 25,000 labelled reviews of Maas et al. 2011 (ACL, "Learning Word Vectors for Sentiment
Analysis"). What published pipelines leave open or do differently is decided thus:

- A character is a Unicode character, not a byte; a review is cut to `max_length - 1` of them and closed by <eos>.
- Validation is a stratified tenth of the training reviews. The benchmark has none, and its users choose by the test
  split.
- The vocabulary are the characters seen `min_frequency` times and more in training, after both cuts, the most frequent
  first and ties by code point. Others are <unk>.
- Reviews are in the order of class and number, so that nothing depends on how a file system lists them.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..files import inside
from ..messages import say_once
from ..records import read_bytes
from .characters import Alphabet, code_points, text_spec
from .config import TaskConfig
from .data import Task, assemble, hold_out, split_arrays
from .store.cache import Stored, cached
from .store.sources import Archive, DataError, provide

ACL_IMDB = Archive(
    url="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    md5="7c2ac02c03563afcf9b574c7e56c153a",
    folder="aclImdb",
)
REVIEWS_PER_FOLDER = 12_500
PUBLISHED = {  # SHA-256 of what is in a folder: of each review, by number, its name, size and bytes, zeros between
    "train/neg": "5f267769d910826b3175d23db2599c1731dae9f1602a6f06026451c597747bba",
    "train/pos": "6e7722b85b76125dcab92982787f2b81587f3697416981b15d19ebf6f08a7a34",
    "test/neg": "7ad02c3a3fa32620280743182380908275f9840a63ca376798f7d375bd810d86",
    "test/pos": "09adcbbb39b0e835d61094dd905363efc386018cb5bce48d03538f4f0e775b57",
}
PUBLISHED_SIZES = "8ac751435df60eee17195fd852a393964912d96c28968d40b9b14aeb4ab274d9"  # of all of them, in this order
CHANGED = "reviews that are not the published ones"
CLASSES = ("neg", "pos")
PUBLISHED_LENGTH = 4096


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before.

    Raises:
        DataError: the reviews are missing, incomplete or damaged.
        ValueError: a key of `config` is missing or does not belong to this task.
    """
    settings = config.settings("val_fraction", "split_seed", "min_frequency")

    def prepare(work: Path) -> Stored:
        folder = provide(ACL_IMDB, data_dir, inside(cache_dir, "downloads"))
        return _prepare(folder, config.max_length, **settings)

    request = {"max_length": config.max_length, **settings, **_changed_sizes(data_dir, cache_dir)}
    stored = cached(cache_dir, config.name, request, prepare)
    symbols = stored.facts["symbols"]
    spec = text_spec(config, symbols, num_classes=len(CLASSES))
    notes = [CHANGED] if stored.source != ACL_IMDB.folder else []
    if config.max_length != PUBLISHED_LENGTH:
        notes.append(f"text cut to {config.max_length:,} characters")
    return assemble(spec, stored.arrays, note=", ".join(notes), symbols=symbols)


def origin(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> dict[str, Any]:
    """What tells reviews from the published ones, which are the default, by names and sizes."""
    changed = _changed_sizes(data_dir, cache_dir)
    return {"origin": changed} if changed else {}


def _changed_sizes(data_dir: Path | None, cache_dir: Path) -> dict[str, str]:
    """A digest of names and sizes where reviews are unpacked whose ones are not the published ones."""
    for place in (data_dir, cache_dir / "downloads"):
        if place is not None and (place / ACL_IMDB.folder).is_dir():
            folders = [place / ACL_IMDB.folder / name for name in PUBLISHED]
            sizes = _sizes(tuple((folder, folder.stat().st_mtime_ns) for folder in folders if folder.is_dir()))
            return {} if sizes == PUBLISHED_SIZES else {"reviews": sizes}
    return {}


@cache
def _sizes(folders: tuple[tuple[Path, int], ...]) -> str:
    """SHA-256 of names and sizes of what is in folders of these dates: asked for by every run, listed once."""
    digest = hashlib.sha256()
    for folder, _ in folders:
        for name, size in sorted((entry.name, _size(entry)) for entry in os.scandir(folder)):
            digest.update(f"{name} {size}\n".encode())
    return digest.hexdigest()


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere, which `_read` names
        return -1


def _prepare(folder: Path, max_length: int, *, val_fraction: float, split_seed: int, min_frequency: int) -> Stored:
    digests: dict[str, str] = {}
    texts, labels = _read(folder, "train", max_length - 1, digests)
    test_texts, test_labels = _read(folder, "test", max_length - 1, digests)
    train, val = hold_out(labels, val_fraction, split_seed)

    alphabet = Alphabet((texts[i] for i in train), min_frequency)

    arrays = {
        **split_arrays("train", [alphabet.tokens(texts[i]) for i in train], labels[train], alphabet.dtype),
        **split_arrays("val", [alphabet.tokens(texts[i]) for i in val], labels[val], alphabet.dtype),
        **split_arrays("test", map(alphabet.tokens, test_texts), test_labels, alphabet.dtype),
    }
    source = ACL_IMDB.folder
    if changed := [name for name, digest in digests.items() if digest != PUBLISHED[name]]:
        said = f"the reviews in {', '.join(changed)} are not those published, to which scores do not compare"
        say_once(f"{folder}: {said}")
        source += ", changed"
    return Stored(arrays, {"symbols": alphabet.symbols}, source)


def _read(
    folder: Path, split: str, max_characters: int, digests: dict[str, str]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The reviews of `<folder>/<split>/{neg,pos}/<number>_<rating>.txt` as code points (uint32), and their labels; adds
    to `digests` what `PUBLISHED` has of the published ones."""
    texts: list[np.ndarray] = []
    for name in CLASSES:
        numbered, digest = {}, hashlib.sha256()
        for path in (folder / split / name).glob("*.txt"):
            if match := re.fullmatch(r"(\d+)_\d+\.txt", path.name):
                numbered[int(match[1])] = path
        if len(numbered) != REVIEWS_PER_FOLDER:
            raise DataError(
                f"{folder / split / name} holds {len(numbered):,} reviews named <number>_<rating>.txt, expected "
                f"{REVIEWS_PER_FOLDER:,}.\nDelete {folder} and unpack {ACL_IMDB.filename} again."
            )
        for number in sorted(numbered):
            path = numbered[number]
            try:
                content = read_bytes(path)
                text = content.decode("utf-8")
            except (OSError, ValueError) as error:
                raise DataError(f"{path} is damaged: {error}") from error
            if not text.strip():
                raise DataError(f"{path} is empty.\nDelete {folder} and unpack {ACL_IMDB.filename} again.")
            digest.update(b"%b\0%d\0%b" % (path.name.encode(), len(content), content))
            texts.append(code_points(text[:max_characters]))
        digests[f"{split}/{name}"] = digest.hexdigest()
    return texts, np.repeat(np.arange(len(CLASSES)), REVIEWS_PER_FOLDER)
