#!/usr/bin/env bash
# performer-pytorch 1.1.4: the mask of its SelfAttention hides values, not keys, so that a sequence depends on its padding.
#
# Expected: a sequence of 8 steps gives the same, alone and with padding that the mask marks, up to the estimate's epsilon.
# Seen: with 24 steps of padding behind it outputs are off by 0.74 of the largest, because features of padded keys stay in
# the denominator. Causal, where padding comes after all that is real, by 0.004: the keys' features are stabilised by a
# maximum that is taken over all steps, padding too.
# Output: "both ways: 0.74", "causal: 0.0041".
# Why a user minds: a text's score depends on the longest text in its batch, in training as in evaluation, and no error says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 performer-pytorch==1.1.4
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from performer_pytorch import SelfAttention


def apart(causal):
    """Relative to the largest number, of a sequence alone and the same sequence beside padding."""
    torch.manual_seed(0)
    attention = SelfAttention(32, heads=2, dim_head=16, causal=causal, nb_features=32).eval()
    x = torch.randn(1, 32, 32)
    with torch.no_grad():
        alone, padded = attention(x[:, :8]), attention(x, mask=torch.arange(32)[None] < 8)[:, :8]
    return ((padded - alone).abs().max() / alone.abs().max()).item()


both_ways, causal = apart(False), apart(True)
print(f"both ways: {both_ways:.2g}\ncausal: {causal:.2g}")
assert both_ways > 0.3 and 1e-4 < causal < 0.1
PYTHON
