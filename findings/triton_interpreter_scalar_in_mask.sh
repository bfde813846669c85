#!/usr/bin/env bash
# Triton 3.9.0: its interpreter refuses a mask that a scalar condition is part of, which 3.8.0's takes.
#
# Expected: `mask=(row < n) & (column < width)`, a condition of the program and one of its lanes, is a block of booleans
# by the usual broadcasting, in the interpreter as for a GPU (3.9.0 compiles it). Seen: 3.8.0's interpreter copies the
# rows; 3.9.0's raises "ValueError('mask has unsupported dtype')" at the load, whichever of the two stands first. With
# the scalar inside a block's comparison, `column < tl.where(row < n, width, 0)`, it takes it.
# Output: "3.8.0 scalar: copied", "3.8.0 inside: copied", "3.9.0 scalar: mask has unsupported dtype", "3.9.0 inside: copied".
# Why a user minds: rows that are not there are hidden in this way everywhere; after an upgrade tests in the interpreter
# fail in kernels that compile and run as before, and the message names neither the line of the mask nor the scalar.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
for version in 3.8.0 3.9.0; do
    "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/$version" triton==$version
done
cd "$folder"
cat > rows.py <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def copy(x, y, n, width, INSIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    if INSIDE:
        mask = column < tl.where(row < n, width, 0)
    else:
        mask = (row < n) & (column < width)
    tl.store(y + row * width + column, tl.load(x + row * width + column, mask=mask, other=0.0), mask=mask)


for inside in (False, True):
    x, y = torch.arange(15.0).reshape(3, 5), torch.zeros(3, 5)
    try:
        copy[(3,)](x, y, 2, 5, INSIDE=inside, BLOCK=8)
        said = "copied" if torch.equal(y[:2], x[:2]) and not y[2].any() else "something else"
    except Exception as error:
        said = "mask has unsupported dtype" if "mask has unsupported dtype" in str(error) else repr(error)
    print(triton.__version__, "inside:" if inside else "scalar:", said)
PYTHON
for version in 3.8.0 3.9.0; do
    TRITON_INTERPRET=1 PYTHONPATH="$folder/$version" "$folder/venv/bin/python" rows.py
done | tee said
diff said - <<'SAID'
3.8.0 scalar: copied
3.8.0 inside: copied
3.9.0 scalar: mask has unsupported dtype
3.9.0 inside: copied
SAID
