from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels.common import valid_positions, zero_padding
from ..spec import TaskSpec

POOLINGS = ("mean", "max", "last", "first")


def pool(x: Tensor, lengths: Tensor, how: str) -> Tensor:
    """One vector for each sequence, from its valid positions: [B, T, D] -> [B, D]; zero where it has none."""
    if how == "mean":
        return zero_padding(x, lengths).sum(1) / lengths.clamp(min=1)[:, None]
    if how == "first":
        pooled = x[:, 0]
    elif how == "last":
        pooled = x[torch.arange(len(x), device=x.device), lengths - 1]
    else:
        pooled = x.masked_fill(~valid_positions(lengths, x.shape[1])[..., None], -torch.inf).amax(1)
    return torch.where(lengths[:, None] > 0, pooled, 0)


class ClassificationHead(nn.Module):
    """Pooled sequences to class scores: [B, T, D] -> [B, classes]. `kind` is "linear" or "mlp" (one hidden layer)."""

    def __init__(self, d_model: int, num_classes: int, *, pooling: str, kind: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}; valid: {', '.join(POOLINGS)}")
        if kind not in ("linear", "mlp"):
            raise ValueError(f"head={kind!r}; valid: linear, mlp")
        self.pooling = pooling
        hidden = [nn.Linear(d_model, d_model), nn.ReLU()] if kind == "mlp" else []
        self.scores = nn.Sequential(*hidden, nn.Linear(d_model, num_classes))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.scores(pool(x, lengths, self.pooling))


class PairHead(nn.Module):
    """Two sequences to class scores, from [a, b, a - b, a·b]: [2B, T, D] -> [B, classes], a pair in neighbouring rows.

    Source: Tay et al., "Long Range Arena" (2021), two-tower retrieval.
    """

    def __init__(self, d_model: int, num_classes: int, *, pooling: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}; valid: {', '.join(POOLINGS)}")
        self.pooling = pooling
        self.scores = nn.Sequential(nn.Linear(4 * d_model, d_model), nn.GELU(), nn.Linear(d_model, num_classes))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        a, b = rearrange(pool(x, lengths, self.pooling), "(B pair) D -> pair B D", pair=2)
        return self.scores(torch.cat([a, b, a - b, a * b], -1))


class PositionHead(nn.Module):
    """Scores for every position: [B, T, D] -> [B, T, vocabulary], or per channel of pixels [B, T, channels, levels].

    With `regress`, one number for each channel: [B, T, channels].
    """

    def __init__(self, d_model: int, spec: TaskSpec, *, regress: bool) -> None:
        super().__init__()
        if regress and spec.kind != "pixels":
            raise ValueError(f"{spec.name}: only pixels can be regressed, its inputs are {spec.kind}")
        self.shape = (spec.channels,) if regress else (spec.channels, spec.vocab_size)
        if spec.kind == "tokens":
            self.shape = (spec.vocab_size,)
        self.scores = nn.Linear(d_model, torch.Size(self.shape).numel())

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.scores(x).unflatten(-1, self.shape)
