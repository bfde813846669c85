"""What every task is: three splits of a few tensors each, and batches cut from them by index."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..spec import IGNORED, Batch, TaskSpec

BUCKETS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # shares of max_length that batches are padded to


@dataclass(frozen=True, kw_only=True)
class Split(Dataset[dict[str, Tensor]]):
    """N examples as a few tensors: the sequences one after another, where each begins, and what is asked of them.

    `values` and `targets` move to the device that trains (`to`); the small tensors stay on the CPU, so that choosing a
    batch's padding never waits for a GPU.
    """

    spec: TaskSpec
    values: Tensor  # integer, flat: all positions of all sequences, each position's channels together
    offsets: Tensor  # int64 [N * num_inputs + 1], in positions
    labels: Tensor  # int64 [N]; zeros where no class is asked for
    targets: Tensor | None = None  # of answer "positions": integer, one a position, IGNORED where nothing is asked

    def __post_init__(self) -> None:
        sequences = len(self.labels) * self.spec.num_inputs
        if len(self.offsets) != sequences + 1:
            raise ValueError(
                f"{self.spec.name}: {sequences} sequences need {sequences + 1} offsets, got {len(self.offsets)}"
            )
        lengths = self.offsets.diff()
        if sequences and not 1 <= int(lengths.min()) <= int(lengths.max()) <= self.spec.max_length:
            raise ValueError(
                f"{self.spec.name}: sequences of {int(lengths.min())} to {int(lengths.max())} positions; "
                f"valid: 1 to max_length {self.spec.max_length}"
            )
        wanted = int(self.offsets[-1]) if self.spec.answer == "positions" else None
        given = None if self.targets is None else len(self.targets)
        if given != wanted:
            raise ValueError(
                f"{self.spec.name}: answer {self.spec.answer!r} takes {wanted or 'no'} targets, got {given or 'none'}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """int64 [N], or [N, 2] for pairs."""
        lengths = self.offsets.diff()
        return lengths if self.spec.num_inputs == 1 else lengths.view(-1, self.spec.num_inputs)

    @property
    def mean_length(self) -> float:
        """Positions per sequence."""
        return self.offsets[-1].item() / (len(self.offsets) - 1)

    @property
    def majority(self) -> float:
        """The share of the most frequent answer: the accuracy of a constant one. The values must lie on the CPU."""
        answers = self.labels
        if self.targets is not None:
            answers = self.targets[self.targets != IGNORED].long()
        elif self.spec.answer == "next":
            asked = torch.ones(len(self.values), dtype=torch.bool)
            asked[self.offsets[:-1]] = False  # the first of a sequence is next to nothing
            answers = self.values[asked].long()
        return answers.bincount().max().item() / len(answers)

    def batch(self, index: Tensor) -> Batch:
        """The examples `index` (int64 [B], on the CPU), padded to the smallest bucket that holds them.

        Few lengths mean few shapes: compiled models are compiled a handful of times.

        Raises:
            IndexError: an index is not in [0, N).
        """
        rows = self._rows(index)
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        longest = int(lengths.max()) if len(rows) else 0
        buckets = [math.ceil(share * self.spec.max_length) for share in BUCKETS]
        T = next(bucket for bucket in buckets if bucket >= longest)

        device = self.values.device
        starts, lengths, labels, index = (_copy(t, device) for t in (starts, lengths, self.labels[index], index))
        steps = torch.arange(T, device=device)
        valid = steps < lengths[:, None]
        positions = torch.where(valid, starts[:, None] + steps, 0)  # [B * num_inputs, T]
        if self.spec.kind == "tokens":
            inputs = torch.where(valid, self.values[positions].long(), self.spec.pad_id)
        else:
            pixels = self.values.view(-1, self.spec.channels)[positions]
            inputs = torch.where(valid[..., None], pixels, 0)
        if self.spec.num_inputs > 1:
            inputs, lengths = (t.unflatten(0, (-1, self.spec.num_inputs)) for t in (inputs, lengths))
        targets = None
        if self.targets is not None:
            targets = torch.where(valid, self.targets[positions].long(), IGNORED)
        return Batch(inputs, lengths, labels, index, targets)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """One example on its own, by the names of a `Batch`: inputs [T] or [T, channels], of pairs [2, T, ...].

        Raises:
            IndexError: there is no such example.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"example {number} of {len(self)} of {self.spec.name}")
        (example,) = self.__getitems__([number % len(self)])
        longest = int(example["lengths"].max())
        for name in {"inputs", "targets"} & example.keys():
            time = 1 if name == "inputs" and self.spec.num_inputs == 2 else 0
            example[name] = example[name].narrow(time, 0, longest)
        return example

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Tensor]]:
        """Several, padded to a common length: what PyTorch's DataLoader asks for, and puts together by itself."""
        batch = self.batch(torch.tensor(numbers))._asdict()
        held = {name: value for name, value in batch.items() if value is not None}
        return [{name: value[row] for name, value in held.items()} for row in range(len(numbers))]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.__getitem__, range(len(self)))

    def subset(self, index: Tensor, *, longest: int | None = None) -> Split:
        """A split of the examples `index` (int64 [n], on the CPU), in that order, their sequences cut to `longest`.

        Raises:
            IndexError: an index is not in [0, N).
        """
        rows = self._rows(index)
        lengths = (self.offsets[rows + 1] - self.offsets[rows]).clamp(1, longest)
        offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        positions = torch.arange(int(offsets[-1])) + (self.offsets[rows] - offsets[:-1]).repeat_interleave(lengths)
        positions = positions.to(self.values.device)
        values = self.values.view(-1, self.spec.channels)[positions].flatten()
        targets = None if self.targets is None else self.targets[positions]
        return replace(self, values=values, offsets=offsets, labels=self.labels[index], targets=targets)

    def to(self, device: torch.device | str) -> Split:
        """The same split with its values and targets on `device`."""
        targets = None if self.targets is None else self.targets.to(device)
        return replace(self, values=self.values.to(device), targets=targets)

    def _rows(self, index: Tensor) -> Tensor:
        """Which sequences make up the examples: [B] -> [B * num_inputs]."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"index {int(index.min())} to {int(index.max())} out of a split of {len(self)} examples")
        return (index[:, None] * self.spec.num_inputs + torch.arange(self.spec.num_inputs)).flatten()


def pack(batch: Batch, spec: TaskSpec, lengths: Tensor | None = None) -> Batch:
    """`batch` with its sequences one behind the other in a single row, without padding.

    Args:
        batch: padded.
        spec: of its task.
        lengths: its lengths, where they are on the CPU: otherwise the device is waited for.
    """
    inputs = batch.inputs if spec.num_inputs == 1 else batch.inputs.flatten(0, 1)
    lengths = (batch.lengths.cpu() if lengths is None else lengths).flatten()
    ends = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    ahead = (torch.arange(len(lengths)) * inputs.shape[1] - ends[:-1]).repeat_interleave(lengths)
    places, ends = (_copy(x, inputs.device) for x in (torch.arange(len(ahead)) + ahead, ends))
    inputs = inputs.flatten(0, 1)[places][None]
    targets = None if batch.targets is None else batch.targets.flatten()[places][None]
    return batch._replace(inputs=inputs, targets=targets, cu_seqlens=ends)


class Augmentation(Protocol):
    """Changes the examples of a training batch at random, and not their answers; see `seqzoo.tasks.augmentation`."""

    def __call__(self, batch: Batch, spec: TaskSpec, *, seed: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """A dataset ready to train on."""

    spec: TaskSpec
    train: Split
    val: Split
    test: Split
    note: str = ""  # how the data differs from the published benchmark's; empty where it does not
    symbols: tuple[str, ...] = ()  # of tokens that stand for text: what each id is
    folder: Path | None = None  # the cache entry its arrays are mapped from; None where they are in memory
    augmentation: Augmentation | None = None  # what `augment=true` does to training batches; None: it cannot be had

    @property
    def majority(self) -> float:
        """The share of the most frequent answer in the test split: the accuracy of a constant one."""
        return self.test.majority


def _copy(x: Tensor, device: torch.device) -> Tensor:
    """`x` [n] on `device`. From memory that is not pinned, a copy to a GPU waits for what the GPU has yet to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def assemble(spec: TaskSpec, arrays: Mapping[str, np.ndarray], *, note: str = "", symbols: Iterable[str] = ()) -> Task:
    """A task of arrays named `train_values`, `train_offsets`, `train_labels` and so on, shared, not copied.

    There is a `train_targets` too where the answers are at positions.
    """
    mapped = arrays["train_values"]
    folder = Path(mapped.filename).parent if isinstance(mapped, np.memmap) and mapped.filename else None
    parts = ("values", "offsets", "labels", *(("targets",) if spec.answer == "positions" else ()))

    def split(name: str) -> Split:
        return Split(spec=spec, **{part: torch.from_numpy(arrays[f"{name}_{part}"]) for part in parts})

    return Task(
        spec=spec,
        train=split("train"),
        val=split("val"),
        test=split("test"),
        note=note,
        symbols=tuple(symbols),
        folder=folder,
    )


def split_arrays(
    name: str, sequences: Iterable[np.ndarray], labels: np.ndarray, dtype: type[np.integer]
) -> dict[str, np.ndarray]:
    """The arrays of a split, as `assemble` takes them, from sequences [T] or [T, channels] and labels [N]."""
    sequences = list(sequences)
    return {
        f"{name}_values": np.concatenate([sequence.reshape(-1) for sequence in sequences]).astype(dtype, copy=False),
        f"{name}_offsets": np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        f"{name}_labels": labels.astype(np.int64, copy=False),
    }


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The smallest of uint8, int16 and int32 that holds the ids of a vocabulary."""
    return np.uint8 if vocab_size <= 2**8 else np.int16 if vocab_size <= 2**15 else np.int32


def stratified(labels: Tensor, n: int, seed: int) -> Tensor:
    """`n` indices into `labels` (int64 [N]), each class as frequent among them as in the whole; ascending.

    The same for the same arguments. Where shares are fractions, the classes with the largest ones get one more.

    Raises:
        ValueError: `n` is not in [0, N].
    """
    N = len(labels)
    if not 0 <= n <= N:
        raise ValueError(f"cannot take {n} of {N} examples; valid: 0 to {N}")
    classes = labels.unique(return_inverse=True)[1]
    counts = classes.bincount()
    quota = counts * n // max(N, 1)
    remainder = counts * n - quota * N
    quota[remainder.argsort(descending=True, stable=True)[: n - int(quota.sum())]] += 1
    return _first_of_classes(classes, quota, seed)


def nested(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of that fraction of each class of `labels` (int64 [N]), at least one; ascending.

    The first of one permutation for each class: what a fraction holds, every larger one holds too. (The shares of
    `stratified` are exact instead, and a class may lose an example when `n` grows.)

    Raises:
        ValueError: `fraction` is not above 0 and up to 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"cannot take a fraction of {fraction}; valid: above 0 and up to 1")
    classes = labels.unique(return_inverse=True)[1]
    takes = (classes.bincount().double() * fraction).round().clamp(min=1).long()
    return _first_of_classes(classes, takes, seed)


def _first_of_classes(classes: Tensor, takes: Tensor, seed: int) -> Tensor:
    """The first `takes[c]` examples of each class c in a random order of all (int64 [N] of classes); ascending."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    shuffled = classes[order]
    chosen = [order[(shuffled == c).nonzero().flatten()[:take]] for c, take in enumerate(takes.tolist())]
    return torch.cat(chosen).sort().values


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the examples kept and of a stratified `fraction` of them held out, both ascending.

    Raises:
        ValueError: nothing would be kept, or nothing held out.
    """
    if len(labels) < 2:
        raise ValueError(f"none of {len(labels)} can be held out; valid: 2 examples and more")
    n = round(len(labels) * fraction)
    if not 0 < n < len(labels):
        raise ValueError(f"cannot hold {n} of {len(labels)} examples out; valid: 1 to {len(labels) - 1}")
    held_out = stratified(torch.from_numpy(labels), n, seed).numpy()
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def epoch_order(n: int, *, seed: int, epoch: int) -> Tensor:
    """The order, int64 [n], in which an epoch visits `n` examples: a function of its arguments alone."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1)
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(state[0])))
