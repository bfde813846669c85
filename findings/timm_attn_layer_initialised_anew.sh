#!/usr/bin/env bash
# timm 1.0.31: a VisionTransformer draws the linear layers of an attention of one's own anew, and takes no partial of one.
#
# Expected: a layer given as attn_layer=, which the signature types as str, callable or class, keeps the weights and biases
# that it was built with, and may be a functools.partial.
# Seen: every nn.Linear in it is drawn with a standard deviation of 0.02 and its bias set to zero after it is built, unless
# the module has a method `init_weights`, which then has the last word; a partial raises "issubclass() arg 1 must be a
# class".
# Why a user minds: layers whose biases matter, such as the step sizes of Mamba or gates that begin open, start where they do
# not train, and nothing says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchvision==0.28.0 numpy==2.4.6 timm==1.0.31
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from functools import partial

import torch
from torch import nn

try:
    import torchvision
except RuntimeError:  # it is built for another device, and timm needs none of its operators
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm


class Gated(nn.Module):
    def __init__(self, dim, **_):
        super().__init__()
        self.gate = nn.Linear(dim, dim)
        nn.init.constant_(self.gate.bias, 3.0)  # begins open

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.gate(x).sigmoid() * x


class Kept(Gated):
    def init_weights(self):
        nn.init.constant_(self.gate.bias, 3.0)


def bias(kind):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.models.VisionTransformer(attn_layer=kind, **sizes).blocks[0].attn.gate.bias.mean().item()


print("bias of 3 after the model is built:", bias(Gated), "; with init_weights:", bias(Kept))
assert bias(Gated) == 0
assert bias(Kept) == 3
try:
    bias(partial(Gated))
    raise SystemExit("a partial is taken now")
except TypeError as error:
    print("a partial:", error)
    assert "issubclass" in str(error)
PYTHON
