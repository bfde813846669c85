#!/usr/bin/env bash
# FLASH-pytorch 0.1.9: its GAU divides scores by the batch's length, so that a sequence depends on padding that a mask hides.
#
# Expected: a sequence of 8 steps gives the same, alone and beside padding that the mask marks: masked weights become 0.
# Seen: scores are divided by the padded length before they are squared, so that beside 24 steps of padding all that the
# layer adds falls to a sixteenth. FLASH without a direction divides its sum over chunks by the padded length, too (to a
# quarter); causal FLASH, which divides by the chunk, agrees.
# Output: what a layer adds beside padding, 1 alone: "GAU: 0.0625", "FLASH's sum over chunks: 0.25", "causal FLASH: 1".
# Why a user minds: how far a text moves its residual stream goes with the square of the longest text of its batch, in
# training and in evaluation, and a score over single texts is another model's than over batches.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 FLASH-pytorch==0.1.9
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from flash_pytorch import FLASH, GAU


def beside_padding(layer, residual):
    """How large what the layer adds is, where it is 1 alone."""
    layer.to_out[0].bias.data.zero_() if isinstance(layer, GAU) else layer.to_out.bias.data.zero_()
    torch.manual_seed(0)
    x = torch.randn(1, 32, 32)
    with torch.no_grad():
        alone, padded = layer(x[:, :8]), layer(x, mask=torch.arange(32)[None] < 8)[:, :8]
        if residual:
            alone, padded = alone - x[:, :8], padded - x[:, :8]
    return ((padded * alone).sum() / alone.square().sum()).item()


torch.manual_seed(0)
gau = GAU(dim=32, query_key_dim=16, add_residual=False)
chunks = FLASH(dim=32, group_size=8, query_key_dim=16)
causal = FLASH(dim=32, group_size=8, query_key_dim=16, causal=True)
for flash in (chunks, causal):
    flash.qk_offset_scale.gamma.data.normal_()
chunks.qk_offset_scale.gamma.data[0] = 0  # queries within a chunk: what is left is the sum over chunks
chunks.rel_pos_bias.relative_attention_bias.weight.data.zero_()
found = {
    "GAU": beside_padding(gau, residual=False),
    "FLASH's sum over chunks": beside_padding(chunks, residual=True),
    "causal FLASH": beside_padding(causal, residual=True),
}
for name, size in found.items():
    print(f"{name}: {size:.4g}")
for size, seen in zip(found.values(), (1 / 16, 1 / 4, 1), strict=True):
    assert abs(size - seen) < 1e-4, found
PYTHON
