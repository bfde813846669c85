#!/usr/bin/env bash
# Triton 3.7.1 with NumPy 2.4.6: `tl.dot` in the interpreter depends on the processor, and on where a column stands.
#
# Expected: a product of float32 that sums each entry in one order, as a matrix unit does: equal columns give equal
# entries, and a test that passes on one machine passes on all. Seen: it is NumPy's matmul, hence OpenBLAS's kernel for
# the processor that it finds. With those of Haswell (AVX2, EPYC of the third generation too) the columns past the first
# 16 of 32 equal ones differ from these in the last bit; with Sandybridge's they do not, and the numbers are other ones.
# Output: "Haswell: equal columns differ in 5 rows of 16", "Sandybridge: equal columns differ in 0 rows of 16", "Haswell
# and Sandybridge agree: False".
# Why a user minds: an argmin over equal distances takes the 17th instead of the first, and errors next to a tolerance
# pass on machines with AVX512 and fail on those without, in tests of kernels that have no fault.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 triton==3.7.1
cd "$folder"
cat > product.py <<'PYTHON'
import sys

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    y = tl.dot(tl.load(a + m[:, None] * K + k), tl.load(b + k[:, None] * N + n), input_precision="ieee")
    tl.store(out + m[:, None] * N + n, y)


M, K, N = 16, 32, 32
torch.manual_seed(0)
a, b, out = torch.randn(M, K), torch.randn(K, 1).repeat(1, N), torch.empty(M, N)
product[(1,)](a, b, out, M, K, N)
print(f"{sys.argv[1]}: equal columns differ in {int((out != out[:, :1]).any(1).sum())} rows of {M}")
np.save(f"{sys.argv[1]}.npy", out.numpy())
PYTHON
for core in Haswell Sandybridge; do
    TRITON_INTERPRET=1 OPENBLAS_CORETYPE=$core "$folder/venv/bin/python" product.py $core
done | tee said
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np

haswell, sandybridge = (np.load(f"{core}.npy") for core in ("Haswell", "Sandybridge"))
print("Haswell and Sandybridge agree:", bool((haswell == sandybridge).all()))
assert (haswell != haswell[:, :1]).any(), "equal columns are equal now"
assert (haswell != sandybridge).any(), "processors agree now"
PYTHON
