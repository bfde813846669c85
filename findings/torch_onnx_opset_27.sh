#!/usr/bin/env bash
# torch 2.13.0 with onnx 1.23.2 and onnxscript 0.7.2: torch.onnx.export(opset_version=27) gives a model of opset 18 with an
# operator of opset 23 in it.
#
# Expected: a model of opset 27, or an exception. Seen: for torch.nn.RMSNorm the graph holds RMSNormalization, which opset 23
# brought, no converter knows it, and the model, of which a logged line says "not modified", claims opset 18; onnxruntime
# refuses it. Output: "opset 18 ['RMSNormalization']", "onnxruntime: InvalidGraph".
# Why a user minds: export ends without an exception, and the file is found invalid where it is to run. With opset_version=18
# the normalisation is written in plain operators, and the model is right.
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
program = torch.onnx.export(torch.nn.RMSNorm(4).eval(), (torch.ones(2, 4),), opset_version=27, verbose=False)
operators = [node.op_type for node in program.model.graph if node.op_type == "RMSNormalization"]
print("opset", program.model.opset_imports[""], operators)
assert program.model.opset_imports[""] == 18 and operators, "the model is of the opset that was asked for"
try:
    onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
except Exception as error:
    print("onnxruntime:", type(error).__name__)
else:
    raise SystemExit("onnxruntime takes it now")
PYTHON
