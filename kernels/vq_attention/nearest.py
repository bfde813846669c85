"""The nearest code of every key in Triton: product with the codebook and argmax in one, nothing of it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from ..common import contiguous
from ..launching import launch
from ..tiles import dot

PRECISIONS = {torch.float32: "tf32x3", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Config(NamedTuple):
    keys: int  # in a block
    codes: int
    channels: int
    num_warps: int
    num_stages: int


BLOCKS = Blocks("nearest_code", Path(__file__).with_name("nearest.csv"), Config)


@triton.jit(do_not_specialize=["rows"])
def _nearest_kernel(
    k,  # [rows, H, D]
    codebook,  # [H, S, D]
    codes,  # [rows, H], int64
    valid,  # [rows], bool, or None: all
    rows,
    H,
    S,
    D,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    CODES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    h = tl.program_id(0) % H
    first = (tl.program_id(0) // H).to(tl.int64) * KEYS
    row = tl.arange(0, KEYS)
    inside = first + row < rows
    read = inside
    if valid is not None:
        read = inside & tl.load(valid + first + row, mask=inside, other=0).to(tl.int1)
    k += (first * H + h) * D
    codebook += h.to(tl.int64) * S * D
    best = tl.full([KEYS], float("-inf"), tl.float32)
    found = tl.zeros([KEYS], tl.int32)
    for start in range(0, S, CODES):
        code = start + tl.arange(0, CODES)
        closeness = tl.zeros([KEYS, CODES], tl.float32)  # k·c - |c|² / 2
        for low in tl.range(0, D, CHANNELS, num_stages=STAGES):
            channel = low + tl.arange(0, CHANNELS)
            in_d = (channel < D)[None, :]
            k_t = tl.load(k + row[:, None] * (H * D) + channel[None, :], mask=read[:, None] & in_d, other=0.0)
            c_t = tl.load(codebook + code[:, None] * D + channel[None, :], mask=(code < S)[:, None] & in_d, other=0.0)
            wide = c_t.to(tl.float32)
            closeness += dot(k_t, tl.trans(c_t), PRECISION) - (tl.sum(wide * wide, 1) / 2)[None, :]
        closeness = tl.where((code < S)[None, :], closeness, float("-inf"))
        nearest, index = tl.max(closeness, 1, return_indices=True)
        closer = nearest > best
        best, found = tl.where(closer, nearest, best), tl.where(closer, start + index, found)
    tl.store(codes + (first + row) * H + h, found.to(tl.int64), mask=inside)


@torch.library.custom_op("seqzoo::nearest_code_fused", mutates_args=())
def nearest_code_fused(k: Tensor, codebook: Tensor, valid: Tensor | None) -> Tensor:
    """int64 [B, T, H], of k [B, T, H, D] and codebook [H, S, D], in the wider of their dtypes.

    Keys that are not `valid` [B, T] are not read.
    """
    B, T, H, D = k.shape
    dtype = torch.promote_types(k.dtype, codebook.dtype)
    k, codebook, valid = contiguous(k.to(dtype), codebook.to(dtype), valid)
    config = BLOCKS.of("nearest", k.device, dtype, D)
    codes = torch.empty(B, T, H, dtype=torch.int64, device=k.device)
    launch(
        _nearest_kernel,
        triton.cdiv(B * T, config.keys) * H,
        k,
        codebook,
        codes,
        valid,
        B * T,
        H,
        codebook.shape[1],
        D,
        PRECISION=PRECISIONS[dtype],
        KEYS=config.keys,
        CODES=config.codes,
        CHANNELS=config.channels,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return codes


@nearest_code_fused.register_fake
def _(k: Tensor, codebook: Tensor, valid: Tensor | None) -> Tensor:
    return torch.empty(k.shape[:-1], dtype=torch.int64, device=k.device)
