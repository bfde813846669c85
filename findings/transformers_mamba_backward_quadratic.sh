#!/usr/bin/env bash
# transformers 5.23.0: where mamba_ssm is not installed, the backward pass of Mamba takes time quadratic in the length.
#
# Expected: the reference path is a loop over steps, slow but linear, as its forward pass is.
# Seen: each step takes its part of tensors of all steps by an index, and the gradient of an index is a tensor of zeros
# as large as all of it, [batch, channels, T, states]: T of them are filled and added. On one thread, width 64, batch 1,
# 128, 256, 512 and 1,024 steps go forward in 5, 10, 19 and 41 ms and back in 22, 68, 266 and 1,889 ms.
# Why a user minds: the warning says "correct but much slower", and a forward pass shows how much; training is slower by
# a further factor, which grows with T: 4 times at 128 steps, 46 times at 1,024.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import time

import torch
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

torch.manual_seed(0)
mixer = MambaMixer(MambaConfig(hidden_size=64, state_size=16), layer_idx=0)


def milliseconds(T):
    forward, backward = [], []
    for _ in range(3):
        start = time.process_time()
        y = mixer(torch.randn(1, T, 64))
        between = time.process_time()
        y.sum().backward()
        forward.append(1e3 * (between - start))
        backward.append(1e3 * (time.process_time() - between))
    return min(forward), min(backward)


found = {T: milliseconds(T) for T in (128, 256, 512, 1024)}
for T, (forward, backward) in found.items():
    print(f"{T} steps: forward {forward:.0f} ms, backward {backward:.0f} ms")
forward, backward = (found[1024][i] / found[256][i] for i in (0, 1))
assert forward < 8, f"forward {forward:.1f} times as long over 4 times as many steps"
assert backward > 9, f"backward {backward:.1f} times as long over 4 times as many steps"
PYTHON
