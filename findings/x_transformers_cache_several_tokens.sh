#!/usr/bin/env bash
# x-transformers 2.31.10: with a cache only the last token is computed, however many are new; the others are left out.
#
# Expected: a decoder that has read 7 tokens and is given all 20 with that cache computes the 13 new ones, or refuses.
# Seen: it computes one, the last, on the 7 keys that it has: logits are off by a third of the largest, the cache returned
# counts 8 tokens, and nothing is said. With `cache_age=13`, or one token at a time, logits are those without a cache.
# Output: "20 tokens on a cache of 7: 1 logits, off by 0.29, 8 keys kept", "cache_age=13: 13 logits, off by 3e-07".
# Why a user minds: a prompt fed in two parts, a speculative draft or a chat's next turn continues as if its beginning had
# never been said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 x-transformers==2.31.10
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> messages <<'PYTHON' || { cat messages; exit 1; }
import torch
from x_transformers import Decoder, TransformerWrapper

torch.manual_seed(0)
layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True)
model = TransformerWrapper(num_tokens=50, max_seq_len=64, attn_layers=layers).eval()
tokens = torch.randint(0, 50, (1, 20))


def off(logits):
    expected = whole[:, -logits.shape[1] :]
    return ((logits - expected).abs().max() / expected.abs().max()).item()


with torch.no_grad():
    whole = model(tokens)
    _, cache = model(tokens[:, :7], return_intermediates=True)
    one, after = model(tokens, cache=cache, return_intermediates=True)
    _, cache = model(tokens[:, :7], return_intermediates=True)
    all_new = model(tokens, cache=cache, cache_age=13)
print(f"20 tokens on a cache of 7: {one.shape[1]} logits, off by {off(one):.2g}, {after.cache_length} keys kept")
print(f"cache_age=13: {all_new.shape[1]} logits, off by {off(all_new):.0e}")
assert one.shape[1] == 1 and off(one) > 0.1 and after.cache_length == 8
assert all_new.shape[1] == 13 and off(all_new) < 1e-5
PYTHON
