"""Long Range Arena's Retrieval: does one paper of the ACL Anthology cite the other, both read character by character.

The data are the released pairs, `tsv_data/new_aan_pairs.{train,eval,test}.tsv`: five columns between tabs, no header,
label, two paper ids, two texts. What published pipelines leave open or do differently is decided thus:

- A quotation mark is a character like any other, so that a row is a line. Readers that take quotes for delimiters, as
  CSV readers do unless told, join rows wherever a text holds an odd number of them.
- Texts are taken as they are written. What stands in them as an escape, such as a backslash and an n, is read as those
  characters and never decoded.
- A text is cut to `max_length - 1` characters and closed by <eos>; each of the two is a sequence of its own.
- The vocabulary are the characters seen `min_frequency` times and more in the distinct texts of training, after the
  cut, the most frequent first and ties by code point. Others are <unk>.
- Validation is the released `eval` split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .characters import Alphabet, code_points, text_spec
from .config import TaskConfig
from .data import Task, assemble, split_arrays
from .store.cache import Stored, cached
from .store.release import not_released, released_folder
from .store.sources import DataError

FOLDER = "tsv_data"
FILES = {"train": "new_aan_pairs.train.tsv", "val": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
ROWS = {"train": 147_086, "val": 18_090, "test": 17_437}  # Smith et al. 2023, "Simplified State Space Layers", appendix
LABELS = {"0.0": 0, "1.0": 1}
PUBLISHED_LENGTH = 4000


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before.

    Raises:
        DataError: the pairs are missing, incomplete or damaged.
        ValueError: a key of `config` is missing or does not belong to this task.
    """
    settings = config.settings("min_frequency")

    def prepare(work: Path) -> Stored:
        folder = released_folder(FOLDER, data_dir, cache_dir)
        if folder is None:
            raise not_released(FOLDER, data_dir)
        return _prepare(folder, config.max_length, **settings)

    stored = cached(cache_dir, config.name, {"max_length": config.max_length, **settings}, prepare)
    symbols = stored.facts["symbols"]
    spec = text_spec(config, symbols, num_classes=len(LABELS), num_inputs=2)
    note = "" if config.max_length == PUBLISHED_LENGTH else f"texts cut to {config.max_length:,} characters"
    return assemble(spec, stored.arrays, note=note, symbols=symbols)


def _prepare(folder: Path, max_length: int, *, min_frequency: int) -> Stored:
    # A paper is in many pairs: each text is kept once.
    texts: dict[str, int] = {}
    splits = {}
    for split, filename in FILES.items():
        splits[split] = _read(folder / filename, ROWS[split], max_length - 1, texts)
        if split == "train":
            num_trained = len(texts)
    documents = [code_points(text) for text in texts]
    alphabet = Alphabet(documents[:num_trained], min_frequency)
    tokens = [alphabet.tokens(document) for document in documents]

    arrays: dict[str, np.ndarray] = {}
    for split, (pairs, labels) in splits.items():
        arrays |= split_arrays(split, (tokens[i] for pair in pairs for i in pair), labels, alphabet.dtype)
    return Stored(arrays, {"symbols": alphabet.symbols}, f"lra_release/{FOLDER}")


def _read(
    path: Path, count: int, max_characters: int, texts: dict[str, int]
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Pairs and labels, int64 [N], of a file; a pair are the numbers of its texts in `texts`, to which it adds."""
    pairs, labels = [], []
    if not path.is_file():
        raise DataError(f"{path} is missing.\nUnpack lra_release.gz again.")
    with path.open("rb") as file:  # as bytes: a row ends at a newline and at nothing else that Unicode calls a line end
        for number, line in enumerate(file, start=1):
            where = f"{path}, row {number}"
            try:
                columns = line.removesuffix(b"\n").decode("utf-8").split("\t")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: {error}") from error
            if len(columns) != 5:
                raise DataError(f"{where}: {len(columns)} columns; expected 5, label, two ids and two texts")
            label, _, _, *pair = columns
            if label not in LABELS:
                raise DataError(f"{where}: the label is {label[:20]!r}; valid: {', '.join(LABELS)}")
            first, second = (texts.setdefault(text[:max_characters], len(texts)) for text in pair)
            pairs.append((first, second))
            labels.append(LABELS[label])
    if len(pairs) != count:
        raise DataError(f"{path} holds {len(pairs):,} rows, expected {count:,}; it was cut short, unpack it again")
    return pairs, np.array(labels, dtype=np.int64)
