#!/usr/bin/env bash
# torch 2.13.0: torch.onnx.export writes expm1 as Exp less 1, and log1p as the Log of 1 more.
#
# Expected: what expm1 and log1p are there for, as many digits near 0 as elsewhere. Seen: of 1e-8 in single precision the
# exported model makes 0 for both. Output: "torch: [1e-08, 1e-08]", "onnxruntime: [0.0, 0.0]".
# Why a user minds: sqrt(1 - a²) of a gated recurrence, written with expm1 because a is near 1, is 0 or off by per cents in
# the exported model alone. ONNX has neither function; 2 t / (1 - t) with t = tanh(x / 2) is expm1 to all digits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import warnings

import onnxruntime
import torch

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)


class Small(torch.nn.Module):
    def forward(self, x):
        return torch.expm1(x), torch.log1p(x)


x = torch.tensor([1e-8])
program = torch.onnx.export(Small(), (x,), verbose=False)
session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
found = [float(y[0]) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
print("torch:", [round(float(y), 12) for y in Small()(x)])
print("onnxruntime:", found)
assert found == [0.0, 0.0], "small numbers are kept now"
PYTHON
