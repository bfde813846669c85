#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: custom_translation_table of torch.onnx.export is not looked at for an operator that is
# given complex numbers.
#
# Expected: the translation that the caller hands over for an operator is taken. Seen: with a complex argument the export
# fails with "No ONNX function found for ... No decompositions registered for the complex-valued input", and the same table
# works for the same operator of real numbers. Output: "real: exported", "complex: not found".
# Why a user minds: the message says that the translation is missing, and nothing public registers one for complex numbers;
# an operator that takes torch.view_as_real(z) goes through.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import warnings

import torch
from onnxscript import opset18
from torch import Tensor

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)


@torch.library.custom_op("findings::itself", mutates_args=())
def itself(x: Tensor) -> Tensor:
    return x.clone()


itself.register_fake(lambda x: x.new_empty(x.shape))
table = {torch.ops.findings.itself.default: lambda x: opset18.Identity(x)}


class Real(torch.nn.Module):
    def forward(self, x):
        return itself(x)


class Complex(torch.nn.Module):
    def forward(self, x):
        return torch.view_as_real(itself(torch.view_as_complex(x)))


torch.onnx.export(Real(), (torch.ones(3, 2),), custom_translation_table=table, verbose=False)
print("real: exported")
try:
    torch.onnx.export(Complex(), (torch.ones(3, 2),), custom_translation_table=table, verbose=False)
except Exception as error:
    assert "complex-valued input" in str(error), error
    print("complex: not found")
else:
    raise SystemExit("the table is looked at now")
PYTHON
