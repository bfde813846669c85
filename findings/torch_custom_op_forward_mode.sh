#!/usr/bin/env bash
# torch 2.13.0: forward-mode derivatives through a custom operator are exactly zero, or missing, without a word.
#
# Expected: an operator that has register_autograd and nothing for forward mode is refused in it, as a
# torch.autograd.Function without `jvp` is. Seen: torch.func.jvp gives a tangent of zeros, and under
# torch.autograd.forward_ad the output has no tangent at all. Output: "jvp: tensor([0., 0., 0.])", "forward_ad: None".
# Why a user minds: torch.func.jacfwd, hessian and what is built on them (Laplace, tangent kernels) treat the operator as
# a constant: a model with one such layer among others gets a derivative of plausible size that is wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.library.custom_op("finding::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


double.register_autograd(lambda ctx, gradient: 2 * gradient)


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


x, way = torch.ones(3), torch.ones(3)
tangent = torch.func.jvp(double, (x,), (way,))[1]
print("jvp:", tangent)
with forward_ad.dual_level():
    missing = forward_ad.unpack_dual(double(forward_ad.make_dual(x, way))).tangent
print("forward_ad:", missing)
assert torch.equal(tangent, torch.zeros(3)), "a custom operator has a tangent now"
assert missing is None
try:
    torch.func.jvp(Double.apply, (x,), (way,))
except (RuntimeError, NotImplementedError) as error:
    print("torch.autograd.Function is refused:", str(error)[:70])
else:
    raise AssertionError("a Function without jvp is no longer refused")
PYTHON
