"""What tests of attention over documents, and within a window, share."""

from __future__ import annotations

import torch
from agreement import assert_close
from fused_cases import DEVICE
from torch import Tensor

from seqzoo.kernels import attention

LENGTHS = [5, 0, 1, 37, 64, 90]
ASKED = [9, 3, 0, 64, 5, 37]  # queries of each document, where there are others


def starts(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def make(T: int, S: int, H: int, G: int, D: int, Dv: int, dtype=torch.float64, seed=0) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, T, H, D), (1, S, G, D), (1, S, G, Dv), (1, T, H, Dv)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(q, k, v, w, **options) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    o = attention(q, k, v, **options)
    return [o, *torch.autograd.grad(o, (q, k, v), w)]


def one_by_one(q, k, v, w, asked: list[int], lengths: list[int], *, causal: bool, scale=None, **options):
    """What the definition makes of each document alone."""
    outputs = [torch.zeros_like(x) for x in (w, q, k, v)]
    for n, keys in enumerate(lengths):
        rows = slice(sum(asked[:n]), sum(asked[: n + 1]))
        there = slice(sum(lengths[:n]), sum(lengths[: n + 1]))
        if keys == 0 or asked[n] == 0:
            continue
        given = {"scale": scale[rows] if isinstance(scale, Tensor) else scale, "causal": causal, **options}
        if causal and asked is not lengths:
            given["position"] = torch.tensor([keys - asked[n]])
        values = run(q[:, rows], k[:, there], v[:, there], w[:, rows], **given, backend="reference")
        for output, value, place in zip(outputs, values, (rows, rows, there, there), strict=True):
            output[:, place] = value
    return outputs


def check(tensors, asked, lengths, tolerance, backend, dtype=torch.int64, **options) -> None:
    scale = options.get("scale")
    wide = {**options, "scale": scale.double() if isinstance(scale, Tensor) else scale}
    expected = one_by_one(*(x.double() for x in tensors), asked, lengths, **wide)
    device = DEVICE if backend == "fused" else torch.device("cpu")
    given = {**options, "cu_seqlens": starts(lengths, dtype).to(device), "backend": backend}
    if asked is not lengths:
        given["query_cu_seqlens"] = starts(asked, dtype).to(device)
    if isinstance(scale, Tensor):
        given["scale"] = scale.to(device)
    for name, actual, target in zip(
        ("o", "dq", "dk", "dv"), run(*(x.to(device) for x in tensors), **given), expected, strict=True
    ):
        assert_close(actual.cpu(), target, tolerance, name)
