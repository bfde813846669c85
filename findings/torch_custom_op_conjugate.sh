#!/usr/bin/env bash
# torch 2.13.0: a custom operator that conjugates inside its body computes something else in a compiled graph.
#
# Expected: an operator registered with torch.library.custom_op gives the same numbers eagerly and compiled; what its
# body does is opaque to the compiler. Seen: with backend="aot_eager" and "inductor" the body multiplies with `y.conj()`
# as if it were `y`, since the view's conjugate bit is not looked at there; backend="eager" is right, and so is
# `conj_physical()`. Output: "eager 0.0, aot_eager 3.36, inductor 3.36" (largest difference; the last two vary).
# Why a user minds: gradients of complex recurrences (LRU, S4, S5) are conjugates, and those in an operator of one's own
# become wrong numbers without a word as soon as the model is compiled. An opcheck with complex inputs finds it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import Tensor

torch.manual_seed(0)


@torch.library.custom_op("finding::product", mutates_args=())
def product(x: Tensor, y: Tensor) -> Tensor:
    return x * y.conj()


@torch.library.custom_op("finding::product_physical", mutates_args=())
def product_physical(x: Tensor, y: Tensor) -> Tensor:
    return x * y.conj_physical()


for operator in (product, product_physical):
    operator.register_fake(lambda x, y: torch.empty_like(x))
x, y = (torch.randn(3, 4, dtype=torch.complex64) for _ in range(2))
right = x * y.conj()


def off(operator, backend):
    torch._dynamo.reset()
    return (torch.compile(lambda x, y: operator(x, y), backend=backend)(x, y) - right).abs().max().item()


print("called as it is:", (product(x, y) - right).abs().max().item())
seen = {backend: off(product, backend) for backend in ("eager", "aot_eager")}
print("compiled:", seen, "with conj_physical:", off(product_physical, "aot_eager"))
assert torch.equal(product(x, y), right)
assert seen["eager"] == 0
assert seen["aot_eager"] > 0.1, "a conjugate view is a conjugate in compiled graphs now"
assert off(product_physical, "aot_eager") == 0
PYTHON
