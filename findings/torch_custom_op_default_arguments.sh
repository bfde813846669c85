#!/usr/bin/env bash
# torch 2.13.0: the backward function of a custom operator may see fewer entries in ctx.needs_input_grad than its
# setup_context saw inputs.
#
# Expected: one entry for each argument of the schema, as many as setup_context is given inputs. Seen: a trailing
# argument that equals its default is dropped before autograd, though it was passed: three inputs, two entries. With
# another value there are three. Output: "passed None: 3 inputs, 2 entries; passed a tensor: 3 inputs, 3 entries".
# Why a user minds: indexing or unpacking needs_input_grad by position works until the optional argument is left at its
# default, and then raises inside backward, or with zip(strict=False) pairs gradients with the wrong inputs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import Tensor


@torch.library.custom_op("finding::scale", mutates_args=())
def scale(x: Tensor, a: Tensor, factor: Tensor | None = None) -> Tensor:
    return x * a if factor is None else x * a * factor


counts = {}


def setup_context(ctx, inputs, output):
    counts["inputs"] = len(inputs)
    ctx.save_for_backward(*inputs[:2])


def backward(ctx, gradient):
    counts["entries"] = len(ctx.needs_input_grad)
    x, a = ctx.saved_tensors
    return gradient * a, gradient * x, None


scale.register_autograd(backward, setup_context=setup_context)
x, a = (torch.ones(3, requires_grad=True) for _ in range(2))
scale(x, a, None).sum().backward()
print("passed None:", counts)
assert counts == {"inputs": 3, "entries": 2}, "needs_input_grad has an entry for each input now"
scale(x, a, torch.ones(3)).sum().backward()
print("passed a tensor:", counts)
assert counts == {"inputs": 3, "entries": 3}
PYTHON
