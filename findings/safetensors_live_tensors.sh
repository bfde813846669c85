#!/usr/bin/env bash
# safetensors 0.8.0: tensors that were loaded change when their file is written in place afterwards.
#
# Expected: load_file returns tensors of one's own, as torch.load does by default. Seen: they are private maps of the
# file, in which a later write in place shows.
# Output: "loaded: tensor([1., 1., 1., 1.])" for a file that held zeros when it was loaded.
# Why a user minds: a checksum over the file, or a check of the tensors' shapes, says nothing of what the model computes
# with later if somebody copies a new checkpoint over the old one (cp, rsync --inplace); writers that replace the file by
# renaming are safe, and `.clone()` after loading is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

path = Path("weights.safetensors")
save_file({"w": torch.zeros(4)}, path)
loaded, copied = load_file(path)["w"], load_file(path)["w"].clone()
content = bytearray(path.read_bytes())
content[-16:] = torch.ones(4).numpy().tobytes()
with path.open("r+b") as file:
    file.write(content)
print("loaded:", loaded, "copied:", copied)
assert torch.equal(loaded, torch.ones(4)), "loaded tensors are one's own now"
assert torch.equal(copied, torch.zeros(4))
PYTHON
