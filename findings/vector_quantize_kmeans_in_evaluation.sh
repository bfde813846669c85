#!/usr/bin/env bash
# vector-quantize-pytorch 1.32.0: with kmeans_init the codebook is made of the first batch, even one of evaluation.
#
# Expected: in evaluation no buffer changes; the codebook is made of the first batch of training.
# Seen: a forward pass after `.eval()`, under `torch.no_grad()`, runs k-means on what it is given and keeps it for good;
# training goes on from there.
# Output: "mean of the codebook before: 0.0", "after a batch of evaluation about 10: 10.0", "after a step of training about 0: 9.9".
# Why a user minds: PyTorch Lightning validates two batches before it trains (num_sanity_val_steps), and summaries, exports
# and warm-ups run a batch of anything: the codebook then comes from that, and moves away as slowly as its average decays.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 vector-quantize-pytorch==1.32.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from vector_quantize_pytorch import VectorQuantize

torch.manual_seed(0)
quantizer = VectorQuantize(dim=8, codebook_size=4, kmeans_init=True, decay=0.99).eval()


def mean():
    return round(quantizer.codebook.mean().item(), 1)


before = mean()
with torch.no_grad():
    quantizer(10 + torch.randn(1, 64, 8))
evaluated = mean()
quantizer.train()
quantizer(torch.randn(1, 64, 8))
trained = mean()
print(f"mean of the codebook before: {before}")
print(f"after a batch of evaluation about 10: {evaluated}")
print(f"after a step of training about 0: {trained}")
assert before == 0 and abs(evaluated - 10) < 0.5 and trained > 9
PYTHON
