"""What every layer of a model does on real inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..blocks import Block
from ..blocks.modes import evaluating
from ..models import SequenceModel
from ..spec import Batch
from .matrix import mixing_matrix
from .statistics import (
    distance_profile,
    effective_rank,
    mean_distance,
    normalized_entropy,
    reachable,
    row_entropy,
    shares,
    window_share,
)

WINDOW = 16  # positions to either side that count as near
PICTURE = 256  # pixels a side


@dataclass(frozen=True, kw_only=True)
class LayerMixing:
    """The mixing matrices of one layer: means over rows, then over examples; of each head, H of them."""

    layer: str  # the block's path in the model
    block: str  # its class
    entropy: list[float]  # of a row, nats
    normalized_entropy: list[
        float
    ]  # over that of uniform weights, in [0, 1]; NaN where all sequences have one position
    effective_rank: list[float]  # from 1 to the length
    mean_distance: list[float]  # positions
    window_share: list[float]  # within WINDOW positions to either side, in [0, 1]
    distance_profile: list[float]  # share of weight at |t - s| = 0, 1, ..., mean over heads; sums to 1
    picture: (
        Tensor  # float32 [P, P], P <= PICTURE: the first example's shares times reachable positions, mean over heads
    )


def mixing_report(model: SequenceModel, batch: Batch) -> list[LayerMixing]:
    """The mixing of every block of `model`, in order, on the sequences of `batch` (a pair's two count as two).

    Every sequence is looked at alone and cut to its own length, T: memory is a few [H, T, T], time mostly that of a
    singular value decomposition of [T, T] for every layer, head and sequence, and for blocks that convolve that of
    2 · d_model sequences of the longest T.

    Raises:
        ValueError: the batch does not fit the model, or a block does not mix through `Block.over_time`.
    """
    inputs, lengths = batch.inputs, batch.lengths
    if lengths.dim() == 2:
        inputs, lengths = inputs.flatten(0, 1), lengths.flatten()
    blocks = {path: module for path, module in model.backbone.named_modules() if isinstance(module, Block)}
    seen: dict[str, list[Tensor]] = {path: [] for path in blocks}
    with evaluating(model), torch.no_grad():
        with _keeping_inputs(blocks, seen):
            for sequence, length in zip(inputs, lengths.tolist(), strict=True):
                model.backbone(sequence[None, :length], None)
        return [
            _mean([_measure(path, block, weights) for weights in _matrices(block, seen[path])])
            for path, block in blocks.items()
        ]


def _matrices(block: Block, inputs: list[Tensor]) -> Iterator[Tensor]:
    """[H, T, T] of each sequence, from the block's inputs [T, d_model]. A convolution has one gain for all of them."""
    if not block.convolves:
        yield from (mixing_matrix(block, x[None])[0] for x in inputs)
        return
    lengths = torch.tensor([len(x) for x in inputs], device=inputs[0].device)
    for weights, n in zip(mixing_matrix(block, pad_sequence(inputs, batch_first=True), lengths), lengths, strict=True):
        yield weights[:, :n, :n]


def _measure(path: str, block: Block, weights: Tensor) -> LayerMixing:
    """Of one sequence; weights [H, T, T]."""
    T = weights.shape[-1]
    reach = reachable(T, causal=block.causal).to(weights.device)
    profile = distance_profile(weights).mean(0)
    relative = (shares(weights).nan_to_num(0) * reach[:, None]).mean(0)
    return LayerMixing(
        layer=path,
        block=type(block).__name__,
        entropy=row_entropy(weights).nanmean(-1).tolist(),
        normalized_entropy=normalized_entropy(weights, reach).nanmean(-1).tolist(),
        effective_rank=effective_rank(weights).tolist(),
        mean_distance=mean_distance(weights).nanmean(-1).tolist(),
        window_share=window_share(weights, WINDOW).nanmean(-1).tolist(),
        distance_profile=(F.pad(profile[T:], (1, 0)) + profile[:T].flip(0)).tolist(),
        picture=F.adaptive_avg_pool2d(relative[None].float(), min(T, PICTURE))[0].cpu(),
    )


def _mean(layers: list[LayerMixing]) -> LayerMixing:
    """Over sequences, the shorter ones' profiles continued by zeros; the picture is that of the first."""
    longest = max(len(layer.distance_profile) for layer in layers)

    def mean(name: str) -> list[float]:
        rows = [torch.tensor(getattr(layer, name), dtype=torch.float64) for layer in layers]
        size = longest if name == "distance_profile" else len(rows[0])
        return torch.stack([F.pad(row, (0, size - len(row))) for row in rows]).nanmean(0).tolist()

    return LayerMixing(
        layer=layers[0].layer,
        block=layers[0].block,
        entropy=mean("entropy"),
        normalized_entropy=mean("normalized_entropy"),
        effective_rank=mean("effective_rank"),
        mean_distance=mean("mean_distance"),
        window_share=mean("window_share"),
        distance_profile=mean("distance_profile"),
        picture=layers[0].picture,
    )


@contextmanager
def _keeping_inputs(blocks: dict[str, Block], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Within it, every forward pass of one sequence adds what each block was given, [T, d_model]."""

    def keep(path: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[path].append(arguments[0][0])

    hooks = [block.register_forward_pre_hook(partial(keep, path)) for path, block in blocks.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
