#!/usr/bin/env bash
# huggingface_hub 2.4.0: PyTorchModelHubMixin.from_pretrained leaves weights that the file lacks as they were drawn.
#
# Expected: a checkpoint that has not all weights of the model is refused, or at least named in a warning, as
# `load_state_dict` and transformers do.
# Seen: strict is False by default: the layer that the file lacks has other random weights at each load, and the only
# output is "Loading weights from local directory". strict=True raises.
# Why a user minds: a class that got a layer since it was saved, or a renamed one, loads without a word and predicts at
# random, differently each time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 huggingface_hub==2.4.0 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


class Before(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 4):
        super().__init__()
        self.first = nn.Linear(width, width)


class After(Before):
    def __init__(self, width: int = 4):
        super().__init__(width)
        self.second = nn.Linear(width, width)


Before().save_pretrained("model")
with warnings.catch_warnings():
    warnings.simplefilter("error")
    one, other = After.from_pretrained("model"), After.from_pretrained("model")
print("the same weights after two loads: first", torch.equal(one.first.weight, other.first.weight), end="")
print(", second", torch.equal(one.second.weight, other.second.weight))
assert torch.equal(one.first.weight, other.first.weight)
assert not torch.equal(one.second.weight, other.second.weight)
try:
    After.from_pretrained("model", strict=True)
    raise SystemExit("strict=True lets it pass, too")
except RuntimeError as error:
    print("strict=True:", str(error).split("\n")[1].strip())
    assert "second.weight" in str(error)
PYTHON
