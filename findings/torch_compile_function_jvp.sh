#!/usr/bin/env bash
# torch 2.13.0: giving a torch.autograd.Function a forward-mode derivative makes models that use it refuse
# fullgraph=True, also where no forward mode is used.
#
# Expected: `jvp` is looked at in forward mode only; PyTorch's pages on extending autograd recommend to write it. Seen:
# Dynamo stops at any Function that defines `jvp`: torch.compile(fullgraph=True) raises "Unsupported custom jvp", and
# without fullgraph the graph is broken there in silence, three for one. Output: "Unsupported: Unsupported custom jvp"
# and "graphs: 3".
# Why a user minds: a kernel with all its derivatives costs the compiled model more than one without; to have both, tell
# forward mode apart before the Function is called.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._dynamo.testing import CompileCounter


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


def model(x):
    return Double.apply(x.sin()).cos()


x = torch.ones(2, requires_grad=True)
try:
    torch.compile(model, fullgraph=True, backend="eager")(x)
except Exception as error:
    print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    assert "jvp" in str(error)
else:
    raise AssertionError("a Function with jvp is compiled whole now")
torch._dynamo.reset()
counter = CompileCounter()
torch.compile(model, backend=counter)(x)
print("graphs:", counter.frame_count)
assert counter.frame_count == 3
PYTHON
