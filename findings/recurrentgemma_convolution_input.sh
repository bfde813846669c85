#!/usr/bin/env bash
# recurrentgemma 1.0.1: the short convolution sets the last steps of each packed document to zero, in the caller's tensor.
#
# Expected: `Conv1D(x, segment_pos)` of recurrentgemma.torch keeps documents in a row apart and leaves `x` as it was, as
# the RG-LRU of the same package does.
# Seen: outputs are right (each document as if alone, exactly), and afterwards the last `temporal_width - 1` steps of `x`
# before every boundary are zero: windows are views of the input, and are multiplied by the mask in place. So
# `x + conv(x)` is not what `x.clone() + conv(x)` gives, nor is a second call with the same input.
# Why a user minds: inside the package the input is never used again, and its tests pass; whoever takes the layer for a
# model of their own, with a residual branch or a gate beside it, trains on zeros where documents end, and only on packed
# rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 jax==0.9.1 flax==0.12.4 "recurrentgemma[torch]==1.0.1"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from recurrentgemma.torch.layers import RGLRU, Conv1D

torch.manual_seed(0)
given = torch.randn(1, 24, 16)
packed = torch.cat([torch.arange(10), torch.arange(14)])[None]
conv = Conv1D(width=16, temporal_width=4)


def changed(layer, segment_pos):
    """The steps of its input that a call changes."""
    x = given.clone()
    layer(x, segment_pos)
    return (x != given).any(-1).nonzero()[:, 1].tolist()


with torch.no_grad():
    found = {
        "Conv1D, one document": changed(conv, torch.arange(24)[None]),
        "Conv1D, documents of 10 and 14 steps": changed(conv, packed),
        "RGLRU, documents of 10 and 14 steps": changed(RGLRU(width=16, num_heads=2), packed),
    }
    parts = [conv(part.clone(), torch.arange(part.shape[1])[None])[0] for part in given.split([10, 14], 1)]
    off = (conv(given.clone(), packed)[0] - torch.cat(parts, 1)).abs().max().item()
    x = given.clone()
    out, _ = conv(x, packed)
for case, steps in found.items():
    print(f"{case}: input changed at steps {steps}")
print(f"documents against each alone: {off:.0e}; largest value of the input at steps 7 to 9 afterwards: {x[:, 7:10].max():g}")
assert list(found.values()) == [[], [7, 8, 9], []] and off < 1e-6 and not x[:, 7:10].any(), found
PYTHON
