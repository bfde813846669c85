"""What tasks and models say to each other: a `TaskSpec` describes the data, a `Batch` carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # the target where nothing is asked


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """All a model knows of a task.

    `kind="tokens"` are ids in `[0, vocab_size)`; `kind="pixels"` are intensities in `[0, vocab_size)`, `channels` of
    them per position, which the model normalises to `(x / (vocab_size - 1) - mean) / std`, channel by channel. They are
    uint8; samples of sound, with `vocab_size=65_536`, are int16 as recorded, of either sign.

    `answer` is what is asked for. "class": one of `num_classes`, once for an example. "positions": an id of the
    vocabulary, at the positions that `Batch.targets` names. "next": at every position the id of the next, so that the
    model must be causal. The last two are of tokens in single sequences, and their `num_classes` is `vocab_size`.
    """

    name: str
    kind: Literal["tokens", "pixels"]
    vocab_size: int
    max_length: int
    num_classes: int
    answer: Literal["class", "positions", "next"] = "class"
    channels: int = 1
    pad_id: int = 0
    mask_id: int | None = None  # tokens only: the id of <mask>
    num_inputs: int = 1  # 2: a pair of sequences is classified
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    mask_ratio: float = 0.15

    def normalise(self, pixels: Tensor) -> Tensor:
        """Intensities [..., channels] as the model sees them: of mean zero and unit variance over the data."""
        scaled = pixels / (self.vocab_size - 1)
        if len(self.mean) == 1:
            return (scaled - self.mean[0]) / self.std[0]
        channels = zip(scaled.unbind(-1), self.mean, self.std, strict=True)
        return torch.stack([(x - mean) / std for x, mean, std in channels], -1)


class Batch(NamedTuple):
    """Some examples of a split, padded to a common length T.

    With `num_inputs=2`, `inputs` and `lengths` have an axis of 2 after the batch axis.

    A packed batch has its N sequences, two for each example of a pair, one behind the other in a single row: inputs
    [1, T] or [1, T, channels] and targets [1, T] without padding, the rest as it is.
    """

    inputs: Tensor  # tokens: int64 [B, T]; pixels: uint8 or int16 [B, T, channels]
    lengths: Tensor  # int64 [B]; what lies past them is padding
    labels: Tensor  # int64 [B]; zeros where no class is asked for
    index: Tensor  # type: ignore[assignment]  # int64 [B], positions in the split
    targets: Tensor | None = None  # of answer "positions": int64 [B, T], IGNORED where nothing is asked
    cu_seqlens: Tensor | None = None  # of a packed batch: int64 [N + 1], where each sequence begins, and T
    part: Any = None  # `seqzoo.blocks.Part` of the T steps, where the model is given that; the batch is whole
