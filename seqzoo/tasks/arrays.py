"""A task from arrays of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..records import is_name
from ..spec import TaskSpec
from .data import Task, assemble, hold_out, split_arrays, token_dtype

OF_SEQZOO = Path(__file__).resolve().parents[1] / "configs" / "task"  # a file for each
LARGEST = 2**31 - 3  # of counts: ids are int32, and <mask> and <pad> stand behind them


class _Examples(NamedTuple):
    name: str
    sequences: list[np.ndarray]  # N * num_inputs times [T], or [T, channels] for pixels
    labels: np.ndarray  # int64 [N]


def from_arrays(
    name: str,
    *,
    kind: Literal["tokens", "pixels"],
    inputs: Sequence[Any],
    labels: Sequence[int],
    val: tuple[Sequence[Any], Sequence[int]] | None = None,
    test: tuple[Sequence[Any], Sequence[int]] | None = None,
    vocab_size: int | None = None,
    num_classes: int | None = None,
    num_inputs: int = 1,
    max_length: int | None = None,
    mask_ratio: float = 0.15,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    split_seed: int = 42,
) -> Task:
    """A task from training examples, and validation and test examples where there are any.

        task = from_arrays("mine", kind="tokens", inputs=[[3, 1, 4], [1, 5]], labels=[0, 1], val=..., test=...)

    Args:
        inputs: sequences of integers; lists of any lengths or one array [N, T]. Pixels may have channels, [N, T, C].
            With `num_inputs=2`, pairs of sequences or an array [N, 2, T].
        labels: N classes from 0.
        val: inputs and labels; None cuts a stratified `val_fraction` from training.
        test: inputs and labels; None cuts a stratified `test_fraction` from training, before validation.
        vocab_size: how many ids the inputs use, 256 for pixels unless given. None infers it from the largest id. For
            tokens, <mask> and <pad> are added after them.
        num_classes: None infers it from the largest label.
        max_length: None takes the longest sequence's.

    Raises:
        ValueError: the name is none for a folder, or a benchmark's; inputs and labels differ in number, a sequence is
            empty, too long or not of integers, an id or a label is out of range, or there are too few examples to cut a
            split from.
    """
    if (OF_SEQZOO / f"{name}.yaml").exists():
        raise ValueError(f"name={name!r}: valid: a plain name that no task of seqzoo has")
    if not is_name(name):
        raise ValueError(f"name={name!r}: valid: a plain name, which run folders can be called by")
    if kind not in ("tokens", "pixels"):
        raise ValueError(f"{name}: kind is {kind!r}; valid: 'tokens', 'pixels'")
    if num_inputs not in (1, 2):
        raise ValueError(f"{name}: num_inputs is {num_inputs}; valid: 1, 2")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"{name}: mask_ratio is {mask_ratio}; valid: between 0 and 1")
    for what, count in (("vocab_size", vocab_size), ("num_classes", num_classes), ("max_length", max_length)):
        if count is not None and not (isinstance(count, int | np.integer) and 0 < count <= LARGEST):
            raise ValueError(f"{name}: {what} is {count!r}; valid: an integer from 1 to {LARGEST:,}, or None")
    for what, held_out in (("val", val), ("test", test)):
        if held_out is not None and len(held_out) != 2:
            raise ValueError(f"{name}: {what} is of {len(held_out)} parts; valid: inputs and labels")
    given = {"train": (inputs, labels), "val": val, "test": test}
    splits = {
        split: _examples(f"{name}, {split}", *pair, kind, num_inputs)
        for split, pair in given.items()
        if pair is not None
    }

    sequences = [sequence for split in splits.values() for sequence in split.sequences]
    if vocab_size is None:
        vocab_size = 256 if kind == "pixels" else min(LARGEST, 1 + max(0, *(int(x.max()) for x in sequences)))
    if kind == "pixels" and not 2 <= vocab_size <= 256:
        raise ValueError(f"{name}: vocab_size is {vocab_size}; pixels are uint8, valid: 2 to 256")
    if num_classes is None:
        num_classes = 1 + max(int(split.labels.max()) for split in splits.values())
    if max_length is None:
        max_length = max(map(len, sequences))
    channels = sequences[0].shape[1] if kind == "pixels" else 1
    for split in splits.values():
        _check(split, vocab_size, num_classes, max_length, channels, num_inputs)
    for missing, fraction in (("test", test_fraction), ("val", val_fraction)):
        if missing not in splits:
            splits["train"], splits[missing] = _cut(splits["train"], missing, fraction, split_seed, num_inputs)

    if kind == "tokens":
        spec = TaskSpec(
            name=name,
            kind=kind,
            vocab_size=vocab_size + 2,
            max_length=max_length,
            num_classes=num_classes,
            mask_id=vocab_size,
            pad_id=vocab_size + 1,
            num_inputs=num_inputs,
            mask_ratio=mask_ratio,
        )
    else:
        pixels = np.concatenate(splits["train"].sequences)  # [positions, channels]
        brightest = vocab_size - 1
        spec = TaskSpec(
            name=name,
            kind=kind,
            vocab_size=vocab_size,
            max_length=max_length,
            num_classes=num_classes,
            channels=channels,
            num_inputs=num_inputs,
            mean=tuple((pixels.mean(0) / brightest).tolist()),
            std=tuple(std or 1.0 for std in (pixels.std(0) / brightest).tolist()),  # of a channel that never changes, 1
            mask_ratio=mask_ratio,
        )
    arrays: dict[str, np.ndarray] = {}
    for split_name, split in splits.items():
        arrays |= split_arrays(split_name, split.sequences, split.labels, token_dtype(spec.vocab_size))
    return assemble(spec, arrays)


def _examples(name: str, inputs: Sequence[Any], labels: Sequence[int], kind: str, num_inputs: int) -> _Examples:
    """Inputs and labels of whatever form as arrays, their number and shapes checked."""
    for what, them in (("inputs", inputs), ("labels", labels)):
        if not hasattr(them, "__len__") or isinstance(them, np.ma.MaskedArray):
            raise ValueError(f"{name}: {what} are a {type(them).__name__}; valid: a list, an array or a tensor")
    if len(inputs) != len(labels) or len(inputs) == 0:
        raise ValueError(f"{name}: {len(inputs)} inputs and {len(labels)} labels; valid: as many of both, at least one")
    if num_inputs > 1:
        for i, example in enumerate(inputs):
            count = len(example) if hasattr(example, "__len__") else 0
            if count != num_inputs:
                raise ValueError(f"{name}: example {i} has {count} sequences; valid: {num_inputs}")
        inputs = [sequence for example in inputs for sequence in example]
    dimensions = (1,) if kind == "tokens" else (1, 2)
    sequences = []
    for i, given in enumerate(inputs):
        where = _where(name, i, num_inputs)
        try:
            sequence = np.asarray(given)
        except ValueError as error:
            raise ValueError(f"{where} has rows of unequal length, or no numbers: {error}") from error
        if sequence.size == 0:
            raise ValueError(f"{where} is empty; valid: one position and more")
        if sequence.ndim not in dimensions or sequence.dtype.kind not in "iu":
            shapes = "[T]" if kind == "tokens" else "[T] or [T, channels]"
            raise ValueError(f"{where} is {sequence.dtype} {list(sequence.shape)}; valid: integers {shapes}")
        sequences.append(sequence[:, None] if kind == "pixels" and sequence.ndim == 1 else sequence)
    classes = np.asarray(labels)
    if classes.ndim != 1 or classes.dtype.kind not in "iu":
        raise ValueError(f"{name}: labels are {classes.dtype} {list(classes.shape)}; valid: integers [N]")
    return _Examples(name, sequences, classes.astype(np.int64))


def _cut(train: _Examples, split: str, fraction: float, seed: int, num_inputs: int) -> tuple[_Examples, _Examples]:
    """What is left of `train`, and the examples cut from it."""
    try:
        kept, cut = hold_out(train.labels, fraction, seed)
    except ValueError as error:
        raise ValueError(f"{train.name}: no {split} examples are given, and {error}; give {split}=") from error

    def take(index: np.ndarray) -> _Examples:
        rows = (index[:, None] * num_inputs + np.arange(num_inputs)).reshape(-1)
        return _Examples(train.name, [train.sequences[row] for row in rows], train.labels[index])

    return take(kept), take(cut)


def _check(
    split: _Examples, vocab_size: int, num_classes: int, max_length: int, channels: int, num_inputs: int
) -> None:
    for i, sequence in enumerate(split.sequences):
        where = _where(split.name, i, num_inputs)
        if len(sequence) > max_length:
            raise ValueError(f"{where} has {len(sequence)} positions; valid: up to max_length {max_length}")
        if sequence.ndim == 2 and sequence.shape[1] != channels:
            raise ValueError(f"{where} has {sequence.shape[1]} channels; valid: {channels}, as the first has")
        outside = (sequence < 0) | (sequence >= vocab_size)
        if outside.any():
            at = np.argwhere(outside)[0]
            raise ValueError(f"{where} has {sequence[tuple(at)]} at position {at[0]}; valid: 0 to {vocab_size - 1}")
    outside = (split.labels < 0) | (split.labels >= num_classes)
    if outside.any():
        i = int(outside.argmax())
        raise ValueError(f"{split.name}: label {split.labels[i]} of example {i}; valid: 0 to {num_classes - 1}")


def _where(name: str, row: int, num_inputs: int) -> str:
    return f"{name}: sequence {row}" if num_inputs == 1 else f"{name}: sequence {row % 2} of example {row // 2}"
