#!/usr/bin/env bash
# torch 2.13.0: on a CPU, torch.cumsum over chunks of states takes several times as long as a Python loop of additions.
#
# Expected: a cumulative sum along an inner dimension reads and writes memory once, row after row, as a copy does.
# Seen: on one thread, for [4, 64, 65536] in float32 (states of 256 x 256 after each of 64 chunks) 230 ms, where a copy
# takes 35 and 64 additions of whole rows 40; transposing first, for a sum over the last dimension, takes 122. For each
# element it goes down its column, pages apart at every step. Sums of 16 to 64 rows of 64 to 256 numbers take 4 to 10
# times a copy.
# Why a user minds: so chunked linear attention can be written in plain PyTorch, the states of all chunks by one
# cumsum. The loop over chunks, which it is written to avoid, is the faster form on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
states = torch.randn(4, 64, 256 * 256)


def by_rows():
    sums = states.clone()
    for chunk in range(1, sums.shape[1]):
        sums[:, chunk] += sums[:, chunk - 1]
    return sums


forms = {
    "cumsum": lambda: states.cumsum(1),
    "transposed first": lambda: states.mT.contiguous().cumsum(-1).mT,
    "a loop of additions": by_rows,
    "a copy": states.clone,
}
torch.testing.assert_close(forms["cumsum"](), by_rows(), rtol=1e-4, atol=1e-4)
ms = {name: [] for name in forms}
for _ in range(7):
    for name, form in forms.items():
        start = time.process_time()
        form()
        ms[name].append(1e3 * (time.process_time() - start))
least = {name: min(times) for name, times in ms.items()}
print(", ".join(f"{name}: {value:.0f} ms" for name, value in least.items()))
assert least["cumsum"] > 2.5 * least["a loop of additions"], least
PYTHON
