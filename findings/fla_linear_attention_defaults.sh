#!/usr/bin/env bash
# flash-linear-attention 0.5.2: forms of one operation divide by the sum of weights, or do not, by their defaults.
#
# Expected: chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn and the naive functions beside them
# are one operation, called in the same way for the same numbers. Seen: the two chunked ones have normalize=True, the
# recurrent one and both naive ones normalize=False; all of them multiply q by 1/sqrt(K) unless told otherwise. Output:
# "chunk True, fused_chunk True, fused_recurrent False, naive False; outputs differ 37.2-fold".
# Why a user minds: a model trained with the chunked form and decoded with the recurrent one, both by their defaults,
# decodes with other outputs than it was trained with, and a test of the chunked form against the naive one fails (or a
# kernel of one's own is "wrong" against either). Name normalize= and scale= in every call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6 einops==0.8.2 transformers==5.23.0
"$folder/venv/bin/pip" install --quiet --no-deps flash-linear-attention==0.5.2 fla-core==0.5.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import inspect

import torch
from fla.ops import linear_attn
from fla.ops.linear_attn import naive

forms = {
    "chunk": linear_attn.chunk_linear_attn,
    "fused_chunk": linear_attn.fused_chunk_linear_attn,
    "fused_recurrent": linear_attn.fused_recurrent_linear_attn,
    "naive": naive.naive_recurrent_linear_attn,
    "naive_chunk": naive.naive_chunk_linear_attn,
}
normalised = {name: inspect.signature(form).parameters["normalize"].default for name, form in forms.items()}
torch.manual_seed(0)
q, k, v = (torch.rand(1, 64, 1, 16) for _ in range(3))
plain, divided = (naive.naive_recurrent_linear_attn(q, k, v, normalize=way)[0] for way in (False, True))
ratio = (plain.norm() / divided.norm()).item()
print(normalised, f"outputs differ {ratio:.1f}-fold")
assert normalised == {
    "chunk": True, "fused_chunk": True, "fused_recurrent": False, "naive": False, "naive_chunk": False
}
assert torch.equal(naive.naive_recurrent_linear_attn(q, k, v)[0], plain)
assert ratio > 2
PYTHON
