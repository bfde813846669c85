"""The gradient of decays, where those of queries and keys are known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import zero_padding
from ..documents import Documents


def decay_gradient(
    q: Tensor,
    dq: Tensor,
    k: Tensor,
    dk: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    of_last: Tensor | None,
) -> Tensor:
    """[B, T, H], of the log decay at each step: it multiplies all that a later query, or the last state, has of before.

    A sum of differences, right to the rounding of q·dq and k·dk: where nothing is left of what came before, it is
    rounding. `of_last` [B, H], of documents [N, H], is the last state times its gradient.
    """
    change = zero_padding((q * dq).sum(-1) - (k * dk).sum(-1), lengths)
    if starts is not None:
        documents = Documents(starts, q.shape[1])
        dg = _sum_to_the_end_of_documents(change.double(), documents)
        return (dg if of_last is None else dg + of_last[documents.of_steps()]).float()
    dg = _sum_to_the_end(change.double())
    if of_last is not None:
        dg = dg + of_last[:, None]
    return zero_padding(dg.float(), lengths)


def _sum_to_the_end_of_documents(x: Tensor, documents: Documents) -> Tensor:
    """Of x [1, T, H] at each step and all later ones of its document: of two, of four, and so on."""
    later = documents.starts[1:][documents.of_steps()] - torch.arange(documents.T, device=x.device)  # [T], and itself
    distance = 1
    while distance < documents.T:
        x = x + torch.where((later > distance)[:, None], x.roll(-distance, 1), 0)
        distance *= 2
    return x


def _sum_to_the_end(x: Tensor) -> Tensor:
    """Of x [B, T, H] at each step and all later ones.

    Products with triangles of ones: on a GPU a cumulative sum, of a single row at least, depends on which program comes
    first.
    """
    T, n = x.shape[1], 256
    blocks = F.pad(x.transpose(1, 2), (0, -T % n)).unflatten(-1, (-1, n))  # [B, H, T / n, n]
    later = x.new_ones(n, n).tril()
    behind = x.new_ones(blocks.shape[2], blocks.shape[2]).tril(-1)
    sums = blocks @ later + (blocks.sum(-1) @ behind)[..., None]
    return sums.flatten(2)[..., :T].transpose(1, 2)
