#!/usr/bin/env bash
# torch 2.13.0: nn.TransformerEncoderLayer turns a boolean padding mask into numbers before its attention sees it, and in
# evaluation asks that attention for parameters that only PyTorch's own has.
#
# Expected: an attention put in place of `layer.self_attn`, with the signature of nn.MultiheadAttention, is given the
# mask that the layer is given, and what works in training works in evaluation.
# Seen: a bool `src_key_padding_mask`, true where there is padding, arrives as float32, 0 where there is none and -inf
# where there is. In training the layer needs no attribute of the attention; after `eval()` it fails with
# "'Own' object has no attribute 'batch_first'", and with that and two more given, for want of 'in_proj_bias'.
# Why a user minds: `~mask` or `mask.sum(1)` on what arrives is an error at best; `mask.bool()` is right by luck, as -inf
# is true. And a model trains to its end before the first validation raises.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn


class Own(nn.Module):
    def forward(self, query, key, value, attn_mask=None, key_padding_mask=None, need_weights=False, is_causal=False):
        self.seen = key_padding_mask
        return query, None


padding = torch.tensor([[False, False, True]])
layer = nn.TransformerEncoderLayer(8, 1, 16, batch_first=True)
layer.self_attn = Own()
layer.train()(torch.randn(1, 3, 8), src_key_padding_mask=padding)
print("in training the attention is given", layer.self_attn.seen)
assert layer.self_attn.seen.dtype == torch.float32
assert layer.self_attn.seen.tolist() == [[0.0, 0.0, -float("inf")]]

for given in ({}, {"batch_first": True, "_qkv_same_embed_dim": False, "num_heads": 1}):
    for name, value in given.items():
        setattr(layer.self_attn, name, value)
    try:
        layer.eval()(torch.randn(1, 3, 8), src_key_padding_mask=padding)
        raise SystemExit("evaluation asks for no attribute any more")
    except AttributeError as error:
        print("in evaluation:", error)
        assert ("in_proj_bias" if given else "batch_first") in str(error)
PYTHON
