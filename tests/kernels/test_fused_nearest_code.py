"""The nearest code in Triton against the distances themselves."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from fused_cases import DEVICE, poisoned
from layouts import KINDS, LAYOUTS, integers, lay_out

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("apart", [2e-4, 2e-6])
def test_codes_closer_than_the_keys_precision(dtype, apart):
    """Keys in half precision are told apart by a codebook in single precision, as it stands."""
    k = torch.ones(1, 4, 1, 2).to(DEVICE, dtype)
    k[0, :, 0, 1] = torch.tensor([2.0, 3.0, 4.0, 5.0])
    codebook = torch.tensor([[[1 + 3 * apart, 0.0], [1 + 2 * apart, 0.0], [1 + apart, 0.0], [1.0, 1.0]]], device=DEVICE)
    codebook[0, :3, 1] = 2.0
    codes = nearest_code(k, codebook, backend="fused")
    assert codes[0, 0, 0] == 2
    assert torch.equal(codes, nearest_code(k, codebook, backend="chunked"))


def test_a_code_beyond_half_precision():
    k = torch.randn(2, 50, 1, 4).to(DEVICE, torch.float16)
    codebook = torch.cat([torch.full((1, 1, 4), 7e4), torch.randn(1, 5, 4)], 1).to(DEVICE)
    codes = nearest_code(k, codebook, backend="fused")
    assert (codes > 0).all()
    assert torch.equal(codes, nearest_code(k, codebook, backend="chunked"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=", ".join(case.values()))
        for case in covering(
            {
                "layout": [*LAYOUTS, "mixed"],
                "lengths": ["none", *KINDS],
                "size": ["2 9 2 3", "1 9 2 3", "2 9 1 3", "2 1 2 3", "2 9 2 1", "1 1 1 1"],
                "dtype": ["float32", "float16", "bfloat16", "float16 and float32"],
            }
        )
    ],
)
def test_inputs_as_users_have_them(case):
    B, T, H, D = map(int, case["size"].split())
    of_keys, *of_codes = (getattr(torch, dtype) for dtype in case["dtype"].split(" and "))
    k = lay_out(torch.randn(B, T, H, D).to(DEVICE, of_keys), case["layout"], 3)
    codebook = lay_out(torch.randn(H, 5, D).to(DEVICE, *of_codes or [of_keys]), case["layout"], 4)
    lengths, valid = None, torch.ones(B, T, dtype=torch.bool)
    if case["lengths"] != "none":
        lengths = integers(case["lengths"], [max(1, T - 2), 0][:B])
        valid = torch.arange(T) < lengths[:, None]
    with poisoned():
        codes = nearest_code(k, codebook, lengths=lengths, backend="fused").cpu()
    assert ((codes >= 0) & (codes < 5)).all()
    distances = torch.cdist(k.double().cpu().transpose(1, 2), codebook.double().cpu()).transpose(1, 2)
    chosen, least = distances.gather(-1, codes[..., None])[..., 0], distances.min(-1).values
    assert ((chosen - least)[valid] <= SLACK[k.dtype] * distances.max()).all()
