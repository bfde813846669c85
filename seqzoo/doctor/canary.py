"""The product of a transposed accumulator, which Triton 3.4 to 3.7.0 compiles wrongly for Hopper at some sizes.

No kernel of the package contains one. Some versions' answer is an illegal access: nothing else may run beside it.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from ..kernels.agreement import relative_error


@triton.jit
def _canary_kernel(q, k, do, v, out, T: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """dk = (q kᵀ ∘ do vᵀ)ᵀ q."""
    j, d = tl.arange(0, BLOCK), tl.arange(0, D)
    k_t = tl.load(k + j[:, None] * D + d[None, :])
    v_t = tl.load(v + j[:, None] * D + d[None, :])
    sums = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, T, BLOCK):
        q_t = tl.load(q + (start + j)[:, None] * D + d[None, :])
        do_t = tl.load(do + (start + j)[:, None] * D + d[None, :])
        ds = (tl.dot(q_t, tl.trans(k_t)) * tl.dot(do_t, tl.trans(v_t))).to(q_t.dtype)
        sums += tl.dot(tl.trans(ds), q_t)
    tl.store(out + j[:, None] * D + d[None, :], sums)


def sing(block: int, num_warps: int, device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """How wrong it is: some 0.002 if it is not."""
    T, D = 256, 64
    torch.manual_seed(0)
    q, do = (torch.randn(T, D, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(block, D, device=device).to(dtype) for _ in range(2))
    out = torch.empty(block, D, device=device)
    _canary_kernel[(1,)](q, k, do, v, out, T, block, D, num_warps=num_warps)
    wide = [x.double() for x in (q, k, do, v)]
    expected = ((wide[0] @ wide[1].T) * (wide[2] @ wide[3].T)).T @ wide[0]
    return relative_error(out, expected)[0]


if __name__ == "__main__":
    for block, num_warps in ((64, 4), (128, 8)):
        if sing(block, num_warps, "cuda") > 0.05:
            sys.exit(f"block {block}, {num_warps} warps")
