#!/usr/bin/env bash
# torch 2.13.0: a custom operator with register_autograd and register_vmap cannot be differentiated by torch.func.grad.
#
# Expected: an operator whose derivative is registered with a setup_context, and that has a rule for vmap, goes through
# grad, vjp and vmap(grad), as operators of PyTorch do. Seen: "In order to use an autograd.Function with functorch
# transforms (vmap, grad, jvp, jacrev, ...), it must override the setup_context staticmethod", of a class that the user has
# not written; x.backward() and vmap by itself work. Output: "backward: True", "vmap: True", "grad: RuntimeError".
# Why a user minds: per-sample gradients, jacrev and what is built on them refuse every model that holds such an operator,
# and the message asks for what is there; a torch.autograd.Function around the operator, with a `vmap` of its own, does it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import Tensor


@torch.library.custom_op("findings::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


double.register_fake(lambda x: x.new_empty(x.shape))
double.register_autograd(lambda ctx, dy: 2 * dy, setup_context=lambda ctx, inputs, output: None)
double.register_vmap(lambda info, dims, x: (double(x), dims[0]))

x = torch.ones(3, requires_grad=True)
double(x).sum().backward()
print("backward:", bool((x.grad == 2).all()))
print("vmap:", bool((torch.vmap(double)(torch.ones(2, 3)) == 2).all()))
try:
    found = torch.func.grad(lambda x: double(x).sum())(torch.ones(3))
except RuntimeError as error:
    assert "must override the setup_context" in str(error), error
    print("grad: RuntimeError")
else:
    raise SystemExit(f"grad works now: {found}")
PYTHON
