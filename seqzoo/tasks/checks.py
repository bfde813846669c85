"""Whether a prepared task is what it says: its bytes, numbers and splits and, where that can be told, its labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..spec import IGNORED, TaskSpec
from . import lra_listops, lra_pathfinder
from .data import Split, Task
from .store.cache import check, origin

CHUNK = 1 << 24  # values looked at together
SAMPLED = 1000  # labels worked out anew, of each split


class Answers(NamedTuple):
    """How a program tells the label of a sequence."""

    work_out: Callable[[np.ndarray, TaskSpec, Mapping[str, Any]], int | None]  # also given what was asked of the data
    mistaken: float  # share of sequences that it may be mistaken about


ANSWERS = {
    "lra_listops": Answers(lra_listops.answer, 0),
    **dict.fromkeys(lra_pathfinder.SIZES, Answers(lra_pathfinder.answer, 0.1)),
}


class Verdict(NamedTuple):
    faults: list[str]  # what must not be
    notes: list[str]  # what was found, in order


def verify(task: Task) -> Verdict:
    """Look at everything a task holds, after hashing its cache entry anew.

    Ids and intensities, labels and counts are in range; sequences fill the values without a gap; no token is <mask> or
    <pad>; labels follow from their sequences, in a sample. An example that is in two splits is a fault of generated
    data in a cache, and noted of others, which are what they are.

    Raises:
        DataError: the entry is damaged; says what to delete.
    """
    faults: list[str] = []
    notes: list[str] = []
    source, size = origin(task.folder)
    request: dict[str, Any] = {}
    examples: dict[str, int] = {}
    if task.folder is not None:
        manifest = check(task.folder)
        request, examples = manifest["request"], manifest["examples"]
        notes.append(f"{len(manifest['files'])} files, {size:,} bytes, as they were written")
    splits = {"train": task.train, "val": task.val, "test": task.test}
    for name, split in splits.items():
        if examples.get(name, len(split)) != len(split):
            faults.append(f"{name}: {len(split):,} examples; the manifest says {examples[name]:,}")
        found = [f"{name}: {fault}" for fault in _faults(split)]
        faults += found
        notes.append(f"{name}: {len(split):,} examples, {len(split.values):,} values")
        if task.folder is not None and task.spec.name in ANSWERS and not found:
            fault, agreed, asked = _compare_labels(split, ANSWERS[task.spec.name], request)
            faults += [f"{name}: {fault}"] if fault else []
            notes.append(f"{name}: {agreed:,} of {asked:,} labels worked out anew are the same")
    shared = _shared(splits)
    (faults if source == "generated" else notes).extend(shared)
    return Verdict(faults, notes)


def _faults(split: Split) -> list[str]:
    """What is out of range, each fault with the first example that has it."""
    spec, offsets = split.spec, split.offsets
    faults = []
    if int(offsets[0]) != 0 or int(offsets[-1]) * spec.channels != len(split.values):
        faults.append(
            f"sequences reach from {int(offsets[0]):,} to {int(offsets[-1]):,}; valid: 0 to "
            f"{len(split.values) // spec.channels:,}, all there is"
        )
    outside = (split.labels < 0) | (split.labels >= spec.num_classes)
    if outside.any():
        first = int(outside.int().argmax())
        faults.append(f"label {int(split.labels[first])} of example {first}; valid: 0 to {spec.num_classes - 1}")
    if split.targets is not None:
        targets = split.targets
        outside = (targets != IGNORED) & ((targets < 0) | (targets >= spec.vocab_size))
        if outside.any():
            at = int(outside.int().argmax())
            example = int(torch.searchsorted(offsets, at, right=True)) - 1
            valid = f"0 to {spec.vocab_size - 1}, or {IGNORED} where nothing is asked"
            faults.append(f"answer {int(targets[at])} in example {example}; valid: {valid}")
    reserved = [spec.mask_id, spec.pad_id] if spec.kind == "tokens" else []
    limits = torch.iinfo(split.values.dtype)
    every_value_is_valid = limits.max - limits.min + 1 == spec.vocab_size  # and sound has either sign
    for number, values in enumerate(split.values.split(CHUNK)):
        wrong = torch.zeros(len(values), dtype=torch.bool)
        if not every_value_is_valid:
            wrong |= (values < 0) | (values >= spec.vocab_size)
        for token in reserved:
            if token is not None:
                wrong |= values == token
        if wrong.any():
            at = int(wrong.int().argmax())
            sequence = int(torch.searchsorted(offsets, (number * CHUNK + at) // spec.channels, right=True)) - 1
            allowed = f"0 to {spec.vocab_size - 1}" + (", <mask> and <pad> excluded" if reserved else "")
            faults.append(f"{int(values[at])} in example {sequence // spec.num_inputs}; valid: {allowed}")
            break
    return faults


def _compare_labels(split: Split, answers: Answers, request: Mapping[str, Any]) -> tuple[str, int, int]:
    """What is wrong with the labels of a sample, if anything; how many are as worked out, and of how many."""
    asked = agreed = 0
    first = ""
    for example in range(0, len(split), max(1, len(split) // SAMPLED)):
        sequence = split.values[split.offsets[example] : split.offsets[example + 1]].numpy()
        try:
            expected = answers.work_out(sequence, split.spec, request)
        except ValueError as error:
            return f"example {example}: {error}", agreed, asked
        if expected is None:
            continue
        asked += 1
        agreed += expected == int(split.labels[example])
        if expected != split.labels[example] and not first:
            first = f"label {int(split.labels[example])} of example {example}; its sequence says {expected}"
    if asked - agreed > answers.mistaken * asked:
        return first, agreed, asked
    return "", agreed, asked


def _shared(splits: dict[str, Split]) -> list[str]:
    """How many examples of each split an earlier one has, by their inputs."""
    found = []
    before: dict[str, dict[bytes, int]] = {}
    for name, split in splits.items():
        digests = _digests(split)
        for other, there in before.items():
            if both := digests.keys() & there.keys():
                digest = min(both, key=digests.__getitem__)
                count = f"{len(both):,} example{'s' if len(both) > 1 else ''} of {name}"
                found.append(f"{count} in {other} too, such as example {digests[digest]}, {there[digest]} there")
        before[name] = digests
    return found


def _digests(split: Split) -> dict[bytes, int]:
    """Of each different example's inputs, with the first example that has them."""
    values = split.values.numpy()
    bounds = (split.offsets.view(-1) * split.spec.channels).tolist()
    digests: dict[bytes, int] = {}
    step = split.spec.num_inputs
    for example in range(len(split)):
        digest = hashlib.blake2b(digest_size=16)
        for row in range(example * step, (example + 1) * step):
            sequence = values[bounds[row] : bounds[row + 1]]
            digest.update(len(sequence).to_bytes(8, "little"))
            digest.update(sequence.tobytes())
        digests.setdefault(digest.digest(), example)
    return digests
