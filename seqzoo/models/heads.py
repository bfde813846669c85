from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Part
from ..kernels.common import accumulation_dtype, valid_positions, zero_padding
from ..kernels.documents import Documents
from ..spec import TaskSpec

POOLINGS = ("mean", "max", "last", "first")


def pool(x: Tensor, lengths: Tensor, how: str) -> Tensor:
    """One vector for each sequence, from its valid positions: [B, T, D] -> [B, D]; zero where it has none."""
    if how == "mean":
        return _mean(_sum(x, lengths), lengths, x.dtype)
    if how == "first":
        pooled = x[:, 0]
    elif how == "last":
        pooled = x[torch.arange(len(x), device=x.device), lengths - 1]
    else:
        pooled = x.masked_fill(~valid_positions(lengths, x.shape[1])[..., None], -torch.inf).amax(1)
    return torch.where(lengths[:, None] > 0, pooled, 0)


def pool_documents(x: Tensor, documents: Documents, how: str) -> Tensor:
    """The same of N documents in a row: [1, T, D] -> [N, D]."""
    (_, T, D), dtype = x.shape, accumulation_dtype(x.dtype)
    lengths, document = documents.lengths[:, None], documents.of_steps()
    if how == "mean":
        sums = x.new_zeros(documents.N, D, dtype=dtype).index_add(0, document, x[0].to(dtype))
        return _mean(sums, documents.lengths, x.dtype)
    if how == "max":
        lowest = x.new_full((documents.N, D), -torch.inf)
        pooled = lowest.scatter_reduce(0, document[:, None].expand(T, D), x[0], "amax")
    else:
        at = documents.starts[:-1] if how == "first" else documents.starts[1:] - 1
        pooled = x[0, at.clamp(0, T - 1)]
    return torch.where(lengths > 0, pooled, 0)


def pool_parts(x: Tensor, lengths: Tensor, how: str, part: Part) -> Tensor:
    """The same of sequences of which this rank has a part, and others the others: [B, T of the part, D] -> [B, D], on
    each rank. `lengths` are those of the whole sequences."""
    own: Any = part.lengths(lengths)
    if how == "mean":
        return _mean(part.total(_sum(x, own)), lengths, x.dtype)
    if how == "max":
        among = x.new_zeros(part.ranks, len(x), x.shape[2])
        valid = valid_positions(own, x.shape[1])[..., None]
        among = part.total(
            among.index_add(0, own.new_full((1,), part.rank), x.masked_fill(~valid, -torch.inf).amax(1)[None])
        )
        return torch.where(lengths[:, None] > 0, among.amax(0), 0)
    at = (torch.zeros_like(lengths) if how == "first" else lengths - 1) - part.start
    here = (at >= 0) & (at < own)
    return part.total(
        torch.where(here[:, None], x[torch.arange(len(x), device=x.device), at.clamp(0, x.shape[1] - 1)], 0)
    )


def _sum(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Over time, in single precision at least: half would overflow, and forget what is far smaller."""
    return zero_padding(x, lengths).sum(1, dtype=accumulation_dtype(x.dtype))


def _mean(sums: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    return (sums / lengths.clamp(min=1)[:, None]).to(dtype)


class ClassificationHead(nn.Module):
    """Pooled sequences to class scores: [B, T, D] -> [B, classes], or of N documents [1, T, D] -> [N, classes].

    `kind` is "linear" or "mlp" (one hidden layer).
    """

    def __init__(self, d_model: int, num_classes: int, *, pooling: str, kind: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}; valid: {', '.join(POOLINGS)}")
        if kind not in ("linear", "mlp"):
            raise ValueError(f"head={kind!r}; valid: linear, mlp")
        self.pooling = pooling
        hidden = [nn.Linear(d_model, d_model), nn.ReLU()] if kind == "mlp" else []
        self.scores = nn.Sequential(*hidden, nn.Linear(d_model, num_classes))

    def forward(
        self, x: Tensor, lengths: Tensor | None, documents: Documents | None = None, part: Part | None = None
    ) -> Tensor:
        return self.scores(_pooled(x, lengths, documents, part, self.pooling))


class PairHead(nn.Module):
    """Two sequences to class scores, from [a, b, a - b, a·b]: [2B, T, D] -> [B, classes], a pair in neighbouring rows.

    Of documents [1, T, D], a pair follow each other.

    Source: Tay et al., "Long Range Arena" (2021), two-tower retrieval.
    """

    def __init__(self, d_model: int, num_classes: int, *, pooling: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}; valid: {', '.join(POOLINGS)}")
        self.pooling = pooling
        self.scores = nn.Sequential(nn.Linear(4 * d_model, d_model), nn.GELU(), nn.Linear(d_model, num_classes))

    def forward(
        self, x: Tensor, lengths: Tensor | None, documents: Documents | None = None, part: Part | None = None
    ) -> Tensor:
        pooled = _pooled(x, lengths, documents, part, self.pooling)
        a, b = pooled[::2], pooled[1::2]
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

    def forward(
        self, x: Tensor, lengths: Tensor | None, documents: Documents | None = None, part: Part | None = None
    ) -> Tensor:
        return self.scores(x).unflatten(-1, self.shape)


def _pooled(x: Tensor, lengths: Tensor | None, documents: Documents | None, part: Part | None, how: str) -> Tensor:
    if documents is not None:
        return pool_documents(x, documents, how)
    if lengths is None:
        lengths = torch.full((len(x),), x.shape[1] if part is None else part.T, device=x.device)
    return pool(x, lengths, how) if part is None else pool_parts(x, lengths, how, part)
