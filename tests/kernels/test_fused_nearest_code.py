"""The nearest code in Triton against the distances themselves."""

from __future__ import annotations

import pytest
import torch
from fused_cases import DEVICE, poisoned

from seqzoo.kernels import nearest_code

SLACK = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of a distance


@pytest.mark.parametrize(
    ("B", "T", "H", "S", "D", "lengths", "dtype"),
    [
        (1, 1, 1, 1, 1, None, torch.float32),
        (2, 15, 2, 33, 8, [15, 4], torch.float32),
        (2, 65, 1, 128, 100, [0, 65], torch.float32),
        (1, 100, 3, 16, 24, None, torch.float16),
        (3, 257, 1, 70, 64, [257, 130, 1], torch.float32),
    ],
)
def test_no_code_is_nearer(B, T, H, S, D, lengths, dtype):
    k, codebook = torch.randn(B, T, H, D).to(DEVICE, dtype), torch.randn(H, S, D).to(DEVICE, dtype)
    valid = torch.ones(B, T, dtype=torch.bool)
    if lengths is not None:
        valid = torch.arange(T) < torch.tensor(lengths)[:, None]
        k = k.masked_fill(~valid[..., None, None].to(DEVICE), float("nan"))
        lengths = torch.tensor(lengths, device=DEVICE)
    with poisoned():
        codes = nearest_code(k, codebook, lengths=lengths, backend="fused").cpu()
    assert codes.dtype == torch.int64
    assert ((codes >= 0) & (codes < S)).all()
    distances = torch.cdist(k.double().cpu().transpose(1, 2), codebook.double().cpu()).transpose(1, 2)  # [B, T, H, S]
    chosen, least = distances.gather(-1, codes[..., None])[..., 0], distances.min(-1).values
    assert ((chosen - least)[valid] <= SLACK[dtype] * least[valid]).all()


def test_the_first_of_equals():
    codebook = torch.randn(1, 1, 8).expand(1, 70, 8).to(DEVICE)
    assert (nearest_code(torch.randn(1, 9, 1, 8).to(DEVICE), codebook, backend="fused") == 0).all()


def test_operator():
    k, codebook = torch.randn(2, 9, 2, 4).to(DEVICE), torch.randn(2, 5, 4).to(DEVICE)
    valid = (torch.arange(9) < torch.tensor([[9], [4]])).to(DEVICE)
    torch.library.opcheck(torch.ops.seqzoo.nearest_code_fused.default, (k, codebook, valid))
