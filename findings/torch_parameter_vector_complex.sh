#!/usr/bin/env bash
# torch 2.13.0: vector_to_parameters makes every real parameter complex once one of the model is.
#
# Expected: vector_to_parameters(parameters_to_vector(p), p) leaves a model as it was, or refuses parameters of two dtypes, as
# it refuses those on two devices.
# Seen: the vector is complex, as torch.cat promotes, and each piece of it becomes the `.data` of its parameter, whatever
# its dtype was. Real weights are complex from then on; with float32 and bfloat16 the latter become float32. Nothing is said.
# Output: "weight: float32, then complex64", "D: bfloat16, then complex64", "C: complex64, then complex64", "output: float32,
# then complex64".
# Why a user minds: evolution, averaging of models, line searches and Hessians go through this vector. The model runs on, with
# phases in its gates and norms, until something that has no complex form (a comparison, softplus) raises far from here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

model = torch.nn.Module()
model.weight = torch.nn.Parameter(torch.randn(4))
model.D = torch.nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
model.C = torch.nn.Parameter(torch.randn(4, dtype=torch.complex64))


def dtypes():
    found = {name: p.dtype for name, p in model.named_parameters()}
    return found | {"output": (model.weight * torch.ones(4)).dtype}


before = dtypes()
with torch.no_grad():
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
after = dtypes()
for name in before:
    print(f"{name}: {before[name]}, then {after[name]}".replace("torch.", ""))
assert before["weight"] == torch.float32 and before["D"] == torch.bfloat16
assert set(after.values()) == {torch.complex64}, after
PYTHON
