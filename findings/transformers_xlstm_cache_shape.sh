#!/usr/bin/env bash
# transformers 5.23.0: xLSTM with its own default widths raises in PyTorch as soon as it keeps states, as it does by default.
#
# Expected: a model made from xLSTMConfig runs in evaluation and generates; keys are half as wide as values
# (qk_dim_factor=0.5, v_dim_factor=1.0), so that a memory is [heads, keys, values].
# Seen: the cache lays memories out as [heads, values, values], and the layer refuses them: "matC_old has wrong shape, got
# torch.Size([1, 4, 16, 16])" for a few steps, a RuntimeError about 8 and 16 for a chunk of 64. Without a cache, or with
# keys as wide as values, the same model runs.
# Why a user minds: the first forward pass of a fresh model fails with a sentence about a tensor that nobody passed in;
# use_cache=False lets it be evaluated, but not generate step by step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import xLSTMConfig, xLSTMModel

SIZES = {"vocab_size": 50, "hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "num_hidden_layers": 2}


def outcome(steps, **options):
    torch.manual_seed(0)
    model = xLSTMModel(xLSTMConfig(**SIZES, **options)).eval()
    try:
        with torch.no_grad():
            model(torch.randint(0, 50, (1, steps)))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "runs"


found = {
    "7 steps": outcome(7),
    "64 steps": outcome(64),
    "64 steps, use_cache=False": outcome(64, use_cache=False),
    "64 steps, qk_dim_factor=1.0": outcome(64, qk_dim_factor=1.0),
}
for case, what in found.items():
    print(f"{case}: {what}")
assert "matC_old has wrong shape" in found["7 steps"], found
assert "must match the existing size" in found["64 steps"], found
assert found["64 steps, use_cache=False"] == found["64 steps, qk_dim_factor=1.0"] == "runs", found
PYTHON
